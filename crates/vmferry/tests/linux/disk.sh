#!/bin/busybox sh
# The first process of a guest with a disk: several workers write to their parts of it, and read them back from the medium.
# All that it says is lines "linux: ...".

/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod "$module"; done
dmesg -n 1
echo "linux: ready serial=$(cat /sys/block/vda/serial) block=$(cat /sys/block/vda/queue/logical_block_size)"

# A part of the disk has a megabyte.
work() {
    while :; do
        head -c 1048576 /dev/urandom > "/tmp/$1"
        dd if="/tmp/$1" of=/dev/vda bs=64k seek=$(($1 * 16)) conv=notrunc,fsync 2> "/tmp/words$1"
        echo 1 > /proc/sys/vm/drop_caches
        dd if=/dev/vda of="/tmp/read$1" bs=64k skip=$(($1 * 16)) count=16 2> "/tmp/words$1"
        if cmp -s "/tmp/$1" "/tmp/read$1"; then echo "linux: verified $1"; else echo "linux: corrupt $1"; fi
    done
}

for part in 0 1 2 3; do work $part & done
while :; do
    dmesg | grep -E 'BUG:|WARNING:|Call Trace|lockup|self-detected stall|I/O error' | sed 's/^/linux: kernel=/'
    sleep 1
done
