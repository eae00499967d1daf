# The harness must report a failure: a command in the middle fails, and the rest must not run.
note "before"
false
note "after: the script continued"
