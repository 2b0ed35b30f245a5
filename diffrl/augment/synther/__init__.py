"""SynthER (Lu et al. 2023, arXiv 2303.06614): a diffusion model of transitions, and rows drawn from it."""
