"""One YAML a (algorithm, data set) with the published values; `diffrl train NAME` finds them by name."""

__part_of__ = "diffrl"  # `diffrl.support.shadowing` looks for this line
