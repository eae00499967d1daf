# A real panic, not a log line that looks like one.
echo 1 >/proc/sys/kernel/panic_on_oops
echo c >/proc/sysrq-trigger
sleep 60
