#!/bin/busybox sh
# The first process of a guest with a balloon: fills most of its memory, frees it again, and keeps verifying the rest.
# All that it says is lines "linux: ...".

/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod "$module"; done

mkdir /keep
mount -t tmpfs -o size=80% keep /keep
cd /keep || exit
head -c 16777216 /dev/urandom > kept
sha256sum kept > sum
for copy in 1 2 3 4 5 6 7; do cp kept "copy$copy"; done
rm copy*
dmesg -n 1
echo "linux: ready"

while :; do
    if sha256sum -c -s sum; then echo "linux: verified"; else echo "linux: corrupt"; fi
    dmesg | grep -E 'BUG:|WARNING:|Call Trace|lockup|self-detected stall' | sed 's/^/linux: kernel=/'
    usleep 100000
done
