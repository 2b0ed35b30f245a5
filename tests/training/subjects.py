"""Small trainers of every kind of learner whose steps a GPU records (`diffrl/training/stack.py`)."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents import AGENTS, DTQL, RLPD, AgentConfig, Diffuser, DiffusionQL
from diffrl.augment.flow_to_better.blocks import BlockPairs, Blocks
from diffrl.augment.flow_to_better.config import DiffuserConfig
from diffrl.augment.flow_to_better.diffuser import PairSource, TrajectoryCodec, TrajectoryDiffuser
from diffrl.augment.synther.codec import RowCodec
from diffrl.augment.synther.config import SynthERConfig
from diffrl.augment.synther.model import ModelRows, TransitionDiffusion
from diffrl.data.preferences import Preferences
from diffrl.data.preprocessing import Normaliser, Preprocessing
from diffrl.data.segments import SegmentSource, Windows
from diffrl.data.transitions import Transitions
from diffrl.training.stack import StackTrainer
from diffrl.tuning.config import DPOConfig, NFTConfig
from diffrl.tuning.distil import DistilLearner, Teacher
from diffrl.tuning.distil_config import DistilConfig, student_config
from diffrl.tuning.dpo import PreferenceLearner, PreferenceTrainer, SegmentPairs
from diffrl.tuning.nft import NFTLearner
from diffrl.tuning.owned import OwningTrainer

OWN = ("diffuser", "rlpd")
"""Agents whose defaults are too long for the few steps here: plans, and a period of 20.

A Diffuser of width 8 has one channel in each group that is normalised: what a convolution's bias adds is taken away
again, its gradient is rounding alone, and Adam makes whole steps of it. A width of 12 has three.
"""
CONFIGS = [AGENTS[name](width=8, layers=1, batch_size=4) for name in sorted(AGENTS) if name not in OWN] + [
    RLPD(width=8, layers=1, batch_size=4, actor_every=3),
    AGENTS["bfn"](width=8, layers=1, batch_size=4, chunk=3),  # type: ignore[call-arg]
    AGENTS["fql"](width=8, layers=1, batch_size=4, chunk=3),  # type: ignore[call-arg]
    AGENTS["fql"](width=8, layers=1, batch_size=4, n_step=3),  # type: ignore[call-arg]
    Diffuser(width=12, layers=1, batch_size=4, horizon=8, ema_start=3),
    Diffuser(width=12, layers=1, batch_size=4, horizon=8, ema_start=3, guidance="return"),
    DTQL(width=8, layers=1, batch_size=4, actor_start=6, lr_decay_steps=9, lr_decay_waits=True),
    DiffusionQL(width=8, layers=1, batch_size=4, ema_start=3, ema_every=2, critic_layer_norm=True, max_q_backup=True),
]


def transitions(device: str) -> Transitions:
    """One episode of 64 rows."""
    rows = torch.rand(64, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows[:, -2], rows[:, -1] = 0, torch.arange(64)
    return Transitions(rows.to(device), 3, 2)


def trainer(config: AgentConfig, n_seeds: int = 1, device: str = "cpu", capture: bool = False) -> StackTrainer:
    agent = config.build(3, 2, tuple(range(n_seeds)), device)
    generator = torch.Generator(device=device).manual_seed(1)
    return StackTrainer(agent, agent.source(transitions(device)), config.batch_size, generator, capture=capture)


def binned(n_seeds: int = 1, device: str = "cpu", capture: bool = False) -> StackTrainer[Any]:
    """A conditional model of transitions: its batches hold a `Batch` and bins, a tuple in a tuple."""
    rows = torch.rand(64, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows[:, -3] = (rows[:, -3] > 0).float()
    config = SynthERConfig(width=8, blocks=1, condition="reward", bins=4)
    data = ModelRows.of(Transitions(rows, 3, 2), config)
    model = TransitionDiffusion(config, RowCodec.fit(data.transitions), tuple(range(n_seeds)), device)
    generator = torch.Generator(device=device).manual_seed(1)
    return StackTrainer(model, data.to(device), 4, generator, capture=capture)


def pairs(n_seeds: int = 1, device: str = "cpu", capture: bool = False) -> StackTrainer[Any]:
    """A policy that learns from preferences: its batches are pairs of segments."""
    g = torch.Generator().manual_seed(0)
    columns = (torch.rand(16, 3, size, generator=g).numpy() for size in (3, 2, 3, 2))
    as_they_are = Preprocessing(*(Normaliser(torch.zeros(size), torch.ones(size)) for size in (3, 2)))
    agent = AGENTS["diffusion_bc"](width=8, layers=1).build(3, 2, tuple(range(n_seeds)), device)
    learner = PreferenceLearner(agent, DPOConfig(start_run=Path(), batch_size=4))
    source = SegmentPairs(Preferences(*columns), as_they_are, torch.device(device))
    generator = torch.Generator(device=device).manual_seed(1)
    return PreferenceTrainer(learner, source, generator, lambda step, on_progress: np.zeros(0), capture=capture)


def tuned(n_seeds: int = 1, device: str = "cpu", capture: bool = False) -> StackTrainer[Any]:
    """A policy that NFT tunes by its critics: each seed counts its own steps."""
    agent = AGENTS["idql"](width=8, layers=1).build(3, 2, tuple(range(n_seeds)), device)
    config = NFTConfig(start_run=Path(), advantages="critics", group=4, states=4, warm_up=5, anchor=0.1)
    generator = torch.Generator(device=device).manual_seed(1)
    return OwningTrainer(
        NFTLearner(agent, config), transitions(device), 4, generator, lambda *_: np.zeros(0), capture=capture
    )


def distilled(n_seeds: int = 1, device: str = "cpu", capture: bool = False) -> StackTrainer[Any]:
    """A consistency policy that learns a flow's map; its tangent warms up over 9 steps."""
    seeds = tuple(range(n_seeds))
    agent = AGENTS["edp"](width=8, layers=1).build(3, 2, seeds, device)
    config = DistilConfig(start_run=Path(), batch_size=4, loss="scm", warm_up=9)
    student = student_config(agent.config, config, Teacher(agent.policy, config.levels).noise_range)
    learner = DistilLearner(student.build(3, 2, seeds, device), agent, config)
    generator = torch.Generator(device=device).manual_seed(1)
    return OwningTrainer(learner, transitions(device), 4, generator, lambda *_: np.zeros(0), capture=capture)


def improving(n_seeds: int = 1, device: str = "cpu", capture: bool = False) -> StackTrainer[Any]:
    """Flow-to-Better's diffuser of trajectories, on pairs of blocks."""
    g = torch.Generator().manual_seed(0)
    codec = TrajectoryCodec.fit(rows := torch.randn(60, 2, generator=g), 1)
    windows = Windows.of(np.arange(60).reshape(10, 6)[:, [0, -1]] + np.array([0, 1]), 6)
    segments = SegmentSource(rows.to(device), torch.zeros(60, device=device), 1, windows)
    pairs = BlockPairs(Blocks(np.arange(10) % 3, np.arange(3.0)))
    model = TrajectoryDiffuser(DiffuserConfig(width=12, multipliers=(1,)), codec, tuple(range(n_seeds)), device)
    generator = torch.Generator(device=device).manual_seed(1)
    return StackTrainer(model, PairSource(segments, pairs, codec), 4, generator, capture=capture)
