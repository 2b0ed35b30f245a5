"""One YAML a (algorithm, data set) with the published values; `diffrl train NAME` finds them by name."""
