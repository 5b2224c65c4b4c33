# Keeps files of known content in memory and on a disk, verifies them, rewrites them, and says so, with what the kernel
# has to say among its lines. Echoes what it gets over the network. Powers off when the power button is pressed.

FILES=8
ON_DISK=16
mkdir /keep /sums /disk
mount -t tmpfs -o size=75% keep /keep
mount -t tmpfs sums /sums
cd /keep || exit

fill() { head -c 524288 /dev/urandom > "$1" && sha256sum "$1" > "/sums/$1"; }
file=0
while [ $file -lt $FILES ]; do fill $file; file=$((file + 1)); done

# Each file on the disk has its sum beside it. Says in /run/disk how many were written and how many were wrong.
fill_disk() {
    cd /disk || exit
    written=0 wrong=0
    while [ ! -e /run/stop ]; do
        name=$((written % ON_DISK))
        head -c 65536 /dev/urandom > $name && sha256sum $name > $name.sum && sync
        written=$((written + 1))
        # The one that was written longest ago is read back, and not from memory.
        echo 1 > /proc/sys/vm/drop_caches
        oldest=$((written % ON_DISK))
        [ $written -lt $ON_DISK ] || sha256sum -c -s $oldest.sum || wrong=$((wrong + 1))
        echo "$written $wrong" > /run/disk.new
        mv /run/disk.new /run/disk
    done
}

mount -t ext4 /dev/vda /disk || echo "linux: corrupt disk"
# From now on the kernel does not tell of every time that caches are dropped.
echo 4 > /proc/sys/vm/drop_caches
if [ -e /sys/class/net/eth0 ]; then
    ip addr add "$address" dev eth0
    ip link set eth0 up
    nc -ll -p 7 -e cat &
fi
(power_button; touch /run/stop) &

# The kernel's own lines would come in the middle of ours.
dmesg -n 1
complaints | sed 's/^/linux: boot=/'
messages=$(dmesg | wc -l)
echo "linux: ready files=$FILES cpus=$(nproc) release=$(uname -r)"
fill_disk &
disk=$!

# Every other CPU has something to do as well.
sum=$(md5sum /bin/busybox)
for cpu in $(seq 2 "$(nproc)"); do
    while [ "$sum" = "$(md5sum /bin/busybox)" ]; do usleep 20000; done && echo "linux: corrupt /bin/busybox" &
done

beat=0 corrupt=0 sweeps=0 written=0 wrong=0
while [ ! -e /run/stop ]; do
    file=$((beat % FILES))
    sha256sum -c -s "/sums/$file" || corrupt=$((corrupt + 1))
    # The one that was verified longest ago gets new content.
    fill $(((file + 1) % FILES))
    if [ $file = 0 ]; then
        dmesg | tail -n +$((messages + 1)) | sed 's/^/linux: kernel=/'
        messages=$(dmesg | wc -l)
    fi
    [ -e /run/disk ] && read -r written wrong < /run/disk
    beat=$((beat + 1)) sweeps=$((beat / FILES))
    # Seconds and hundredths since boot.
    read -r up rest < /proc/uptime
    echo "linux: beat=$beat up=$up sweeps=$sweeps disk=$written corrupt=$((corrupt + wrong))"
done

wait $disk
dmesg | tail -n +$((messages + 1)) | sed 's/^/linux: kernel=/'
umount /disk || echo "linux: corrupt disk"
poweroff -f
