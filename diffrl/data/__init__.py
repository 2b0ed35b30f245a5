"""Data sets: transitions, replay buffers, normalisers; D4RL's HDF5, Minari and Stable-Baselines3 in and out."""
