"""What random numbers of augmenters are for: the last number of each path that is given to `generator_at`.

All are above 0, since the hash of paths does not see zeros at their end. Before them stand the seed and what each says.
"""

HELD_OUT = 1
"""Which rows are held out: nothing more."""
TRAINING = 2
"""Batches and noise of a model's training: nothing more."""
CHUNK = 3
"""Generated rows: the number of their chunk."""
REFIT_TRAINING = 4
"""Batches and noise of a model that is fitted online: the number of the fit."""
REFIT_CHUNK = 5
"""Rows that such a model generates: the number of the fit, and that of the chunk."""
DRAW = 6
"""Batches of a Stable-Baselines3 buffer: nothing more."""
