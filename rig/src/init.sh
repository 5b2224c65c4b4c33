#!/bin/busybox sh
# The first process of the first level: makes a system, runs the command, and says how it ended.

/bin/busybox --install -s /bin
export PATH=/bin HOME=/root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs shm /dev/shm
for module in /modules/*; do insmod "$module"; done
ip link set lo up

# Ports appear some time after their driver.
port() {
    while :; do
        for port in /sys/class/virtio-ports/*; do
            [ "$(cat "$port/name" 2>/dev/null)" = "$1" ] && echo "/dev/${port##*/}" && return
        done
        usleep 10000
    done
}

# A port can be opened once only, so the command gets pipes, which it may open again as /dev/stdout.
drain() { { cat "$1"; printf '%s%s\n' "$(cat /rig/mark)" "$(cat /rig/status)"; } > "$2"; }
stdout=$(port stdout)
stderr=$(port stderr)
mkfifo /rig/stdout /rig/stderr
drain /rig/stdout "$stdout" &
drain /rig/stderr "$stderr" &
exec 3> /rig/stdout 4> /rig/stderr

setsid sh /rig/command < /dev/null >&3 2>&4 3>&- 4>&-
echo $? > /rig/status

# What the command has left behind would keep the pipes open.
for process in /proc/[0-9]*; do
    pid=${process#/proc/}
    [ "$(cut -d' ' -f6 "$process/stat" 2>/dev/null)" = 0 ] || kill -9 "$pid" 2>/dev/null
done
exec 3>&- 4>&-
wait
# The host ends the machine when it has read everything.
while :; do sleep 1000; done
