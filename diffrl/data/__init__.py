"""Data sets: transitions, normalisers; D4RL HDF5 and Minari in and out. Modules are imported where they are used."""
