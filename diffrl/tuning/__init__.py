"""Trained policies are fine-tuned, in their environment (DPPO, DiffusionNFT) or from preferences (DPO), and distilled."""
