#!/bin/busybox sh
# The first process of the guest: keeps files of known content in memory, verifies them, rewrites them, and says so.
# All that it says is lines "linux: ...", with what the kernel has to say among them.

/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /modules/*; do [ -e "$module" ] && insmod "$module"; done

FILES=8
mkdir /keep /sums
mount -t tmpfs -o size=75% keep /keep
mount -t tmpfs sums /sums
cd /keep || exit

fill() { head -c 1048576 /dev/urandom > "$1" && sha256sum "$1" > "/sums/$1"; }
file=0
while [ $file -lt $FILES ]; do fill $file; file=$((file + 1)); done

# The kernel's own lines would come in the middle of ours.
dmesg -n 1
dmesg | grep -E 'BUG:|WARNING:|Call Trace|lockup|self-detected stall' | sed 's/^/linux: boot=/'
messages=$(dmesg | wc -l)
echo "linux: ready files=$FILES cpus=$(nproc) release=$(uname -r)"

# Every other CPU has something to do as well.
sum=$(md5sum /bin/busybox)
for cpu in $(seq 2 "$(nproc)"); do
    while [ "$sum" = "$(md5sum /bin/busybox)" ]; do :; done && echo "linux: corrupt /bin/busybox" &
done

beat=0 corrupt=0 sweeps=0
while :; do
    file=$((beat % FILES))
    sha256sum -c -s "/sums/$file" || corrupt=$((corrupt + 1))
    # The one that was verified longest ago gets new content.
    fill $(((file + 1) % FILES))
    if [ $file = 0 ]; then
        dmesg | tail -n +$((messages + 1)) | sed 's/^/linux: kernel=/'
        messages=$(dmesg | wc -l)
    fi
    beat=$((beat + 1)) sweeps=$((beat / FILES))
    # Seconds and hundredths since boot.
    read -r up rest < /proc/uptime
    echo "linux: beat=$beat up=$up sweeps=$sweeps corrupt=$corrupt"
done
