"""Flow-to-Better (Zhang et al. 2024, ICLR): better trajectories, generated from preferences between the data's."""
