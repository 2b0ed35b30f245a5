"""Trained policies are fine-tuned on their denoising chain: in their environment (DPPO), and from preferences (DPO)."""
