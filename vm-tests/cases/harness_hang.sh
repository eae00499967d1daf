# Must be killed at the time limit.
note "hanging"
sleep 1000
