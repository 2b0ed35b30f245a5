"""OGBench (Park et al., arXiv 2410.20092): its tasks, and its data sets rebuilt here from the oracles in its wheel.

`names`: what ids mean. `worlds`: the environments. `oracles`: one episode of data. `generation`: a data set, by
processes (`worker`). `reading`: a file as transitions, with the rewards of a task. `fidelity`: how it is known to be
the same.
"""
