# Every recipe is one line over scripts/.

default:
    @just --list

# Install what building and testing needs
setup:
    ./scripts/setup

# Everything: formatting, clippy, unit, property, command and VM tests
test *ARGS:
    ./scripts/test {{ARGS}}

# VM cases by name
vm *ARGS:
    ./scripts/vm {{ARGS}}

# The main job, shown in a VM (or with --native on this machine)
demo *ARGS:
    ./scripts/demo {{ARGS}}

# The figures
bench *ARGS:
    ./scripts/bench {{ARGS}}
