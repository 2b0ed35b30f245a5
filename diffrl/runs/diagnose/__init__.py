"""Whether a run's diffusion policy is well trained, well sampled, well tuned."""
