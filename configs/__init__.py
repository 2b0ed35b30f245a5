"""One YAML file for each algorithm and data set; `diffrl train NAME` finds it by name.

Each file begins with where its values come from: the paper, the authors' code, CORL, or our own runs.
"""

__part_of__ = "diffrl"  # `diffrl.support.shadowing` looks for this line
