# The guest meets the assumptions of the cases: root, the right kernel, disks in order, device nodes, filesystems.
[ "$(id -u)" = 0 ] || fail "not root"
case "$(uname -r)" in "$KERNEL".*) ;; *) fail "kernel $(uname -r), not $KERNEL" ;; esac
[ -x "$TIDEMARK" ] || fail "there is no binary at $TIDEMARK"
[ "$(type -P tidemark)" = "$TIDEMARK" ] || fail "the binary under test is not first in PATH"

assert_same "size of disk 0" "$(blockdev --getsize64 "$(disk 0)")" $((64 << 20))
assert_same "size of disk 1" "$(blockdev --getsize64 "$(disk 1)")" $((96 << 20))
if [ "$MACHINE" = um ]; then block=512; else block=4096; fi
assert_same "block of disk 1" "$(blockdev --getss "$(disk 1)")" "$block"

# Writes go to the guest's overlay, not to the host's files.
touch "$REPO/written-in-the-guest"
rm "$REPO/written-in-the-guest"

# A device-mapper node without udev, a mount of each filesystem on it, and a loop device.
dmsetup create tidemark-test-a --table "0 131072 linear $(disk 0) 0"
settle
[ -b /dev/mapper/tidemark-test-a ] || fail "no node for a new device"
assert_same "the node by number" "$(stat -c %t:%T "$(dm_node tidemark-test-a)")" \
    "$(stat -L -c %t:%T /dev/mapper/tidemark-test-a)"
mkdir -p /mnt/a /mnt/b
mkfs.ext4 -q /dev/mapper/tidemark-test-a
mount /dev/mapper/tidemark-test-a /mnt/a
fill /mnt/a/file 1048576 one
cp /mnt/a/file "$ARTIFACTS/file"
umount /mnt/a
dmsetup remove tidemark-test-a
truncate -s 400M /tmp/xfs.img
mkfs.xfs -q /tmp/xfs.img
mount -o loop /tmp/xfs.img /mnt/b
umount /mnt/b

# Equal seed and label give equal bytes; another label gives others.
fill /tmp/again 1048576 one
fill /tmp/other 1048576 two
assert_identical /tmp/again "$ARTIFACTS/file"
assert_same "size of a filled file" "$(stat -c %s /tmp/again)" 1048576
cmp -s /tmp/again /tmp/other && fail "two labels gave the same bytes"
assert_same "rand" "$(rand x 5 9)" "$(rand x 5 9)"
[ "$(rand y 3 3)" = 3 ] || fail "rand exceeds its bounds"
case "$(pick z red green)" in red | green) ;; *) fail "pick returned none of its arguments" ;; esac
assert_status 3 bash -c 'exit 3'
assert_no_tidemark_left
