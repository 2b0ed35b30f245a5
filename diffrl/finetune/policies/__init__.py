"""Fine-tuning of trained policies on the denoising chain: in their environment (DPPO), and from preferences (DPO)."""

from diffrl.finetune.policies.dpo import Pairs, PreferenceLearner, PreferenceTrainer
from diffrl.finetune.policies.environments import Environments
from diffrl.finetune.policies.gae import RewardScale, gae
from diffrl.finetune.policies.ppo import DPPOTrainer, Experience
from diffrl.finetune.policies.preferences import Preferences, judge

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
