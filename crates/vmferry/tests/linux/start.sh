#!/bin/busybox sh
# The first process of a guest. Every guest begins like this; behind it comes what it is for.
# All that a guest says is lines "linux: ...".

/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
for module in /modules/*; do [ -e "$module" ] && insmod "$module"; done

# What no kernel should ever have to say.
complaints() { dmesg | grep -E 'BUG:|WARNING:|Call Trace|lockup|self-detected stall'; }

# What happens to the power button from now on is not missed.
[ -e /dev/input/event0 ] && exec 3< /dev/input/event0

# Waits until somebody presses it: an event of 24 bytes, of which the last eight say key, power, pressed.
power_button() {
    while [ "$(dd bs=24 count=1 <&3 2>/dev/null | tail -c 8 | xxd -p)" != 0100740001000000 ]; do :; done
}

