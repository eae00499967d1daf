# The harness must report this line although the script succeeds.
echo "<4>WARNING: CPU: 0 PID: 1 at drivers/md/provoked.c:1 by the harness's own case" >/dev/kmsg
