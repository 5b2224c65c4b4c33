# Fills most of its memory, frees it again, and keeps verifying the rest.

mkdir /keep
# Huge pages, as a program with much memory has them: Linux tells the balloon of blocks of 4 MiB only, and small pages
# leave fewer of these whole.
mount -t tmpfs -o huge=always,size=95% keep /keep
cd /keep || exit
head -c 8388608 /dev/urandom > kept
sha256sum kept > sum
# Twenty copies are 62 % of 256 MiB.
for copy in $(seq 20); do cp kept "copy$copy" || echo "linux: corrupt copy $copy"; done
rm copy*
dmesg -n 1

while :; do
    if sha256sum -c -s sum; then echo "linux: verified"; else echo "linux: corrupt"; fi
    complaints | sed 's/^/linux: kernel=/'
    usleep 100000
done
