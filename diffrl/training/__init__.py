"""The training loop, checkpoints, logging, roll-outs: knows agents as protocols only."""
