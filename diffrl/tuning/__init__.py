"""Trained policies are fine-tuned, in their environment (DPPO, NFT) or from preferences (DPO), and distilled."""
