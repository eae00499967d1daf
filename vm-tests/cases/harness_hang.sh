# The harness must kill this case at its time limit.
note "hanging"
sleep 1000
