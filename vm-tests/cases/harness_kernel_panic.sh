# A real one, not a line that looks like one: the kernel dies under the script.
echo 1 >/proc/sys/kernel/panic_on_oops
echo c >/proc/sysrq-trigger
sleep 60
