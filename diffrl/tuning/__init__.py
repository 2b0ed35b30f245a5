"""Fine-tuning of trained policies on the denoising chain: in their environment (DPPO), and from preferences (DPO)."""

from diffrl.alignment.gae import RewardScale, gae
from diffrl.tuning.dpo import Pairs, PreferenceLearner, PreferenceTrainer
from diffrl.tuning.environments import Environments
from diffrl.tuning.ppo import DPPOTrainer, Experience
from diffrl.tuning.preferences import Preferences, judge

__all__ = [
    "DPPOTrainer",
    "Environments",
    "Experience",
    "Pairs",
    "PreferenceLearner",
    "PreferenceTrainer",
    "Preferences",
    "RewardScale",
    "gae",
    "judge",
]
