"""The training loop, checkpoints, logging: knows agents as protocols only."""
