"""What a user may say of the rows of a data set whose marks or units mislead (`diffrl.data.checks.Taken`). No torch."""

from __future__ import annotations

from typing import Literal

TimeLimitTerminals = Literal["terminals", "timeouts"]
"""What terminal rows at an environment's limit of steps are."""
HDF5_SUFFIXES = (".hdf5", ".h5")
"""Of the files of data that are written here."""
ActionUnits = Literal["environment", "normalised"]
"""What units actions are in: their environment's, or scaled to [-1, 1]."""
