# Must be reported as a failure: a command in the middle fails, what follows must not run.
note "before"
false
note "after: the script went on"
