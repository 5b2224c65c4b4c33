# Panics in its first life, resets itself in the second, and powers off in the third when the power button is pressed.
# The disk knows how many lives there were.

life=$(head -c 1 /dev/vda)
printf '%d' $((life + 1)) | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null
complaints | sed 's/^/linux: boot=/'
echo "linux: life=$life"
case $life in
    0) echo c > /proc/sysrq-trigger ;;
    1) reboot -f ;;
    *)
        power_button
        echo "linux: button"
        poweroff -f
        ;;
esac
