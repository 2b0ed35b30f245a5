"""Compiling an agent: whether it pays, how long it will take, where the result is kept, and what if it fails."""

import json
import os
import shutil
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import platformdirs
import torch
from rich.markup import escape

from agents.base import Agent
from agents.config import AgentConfig
from diffrl.console import console
from diffrl.data.transitions import Transitions

PAYS_FROM = 10_000
"""Steps from which compiling pays although nothing is cached: a minute's wait against a third of a step's time."""
ACTING_PAYS_FROM = 100_000
"""Steps from which the evaluations on the way are worth a compiled `act` too."""


def cache_folder() -> Path:
    """Where compiled kernels are kept: `$TORCHINDUCTOR_CACHE_DIR`, else in the user's cache folder.

    (PyTorch's own choice is below /tmp, which the next reboot clears.)
    """
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(platformdirs.user_cache_dir("diffrl")) / "compiled")


def compiler_found(device: str) -> bool:
    """Whether there is what torch.compile needs: on a CPU, a C++ compiler. (Triton, on a GPU, comes with PyTorch.)"""
    if torch.device(device).type != "cpu":
        return True
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))


def wanted(choice: bool | None, steps: int, device: str) -> bool:
    """Whether a run of `steps` steps is to be compiled: as was said (`choice`), else where it pays and can be done."""
    if choice is None:
        return steps >= PAYS_FROM and compiler_found(device)
    if choice and not compiler_found(device):
        console.print(
            "[yellow]--compile needs a C++ compiler (g++ or clang++; for example `apt install g++`), and none is found:"
            " going on without.[/]"
        )
        return False
    return choice


def compile_agent(
    agent: Agent,
    config: AgentConfig,
    transitions: Transitions,
    *,
    acting: bool = False,
    say: Callable[[str], None] = console.print,
) -> bool:
    """Compile the agent's losses now, by a step on a batch of `transitions` that is then undone. False if it failed.

    acting: also compile `act`, which happens at the first evaluation. Says beforehand how long it will take, and where
    it fails, why; the agent then stays as it was, uncompiled.
    """
    folder = cache_folder()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    mark = folder / "diffrl" / _fingerprint(agent, config)
    wait = "some ten seconds: it has been compiled here before" if mark.exists() else "about a minute, the first time"
    say(f"Compiling the losses ({wait}; --no-compile: without) ...")
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    generator = torch.Generator(device=agent.device).manual_seed(0)
    start = time.monotonic()
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        agent.compile(acting)
        agent.update(transitions.sample(config.batch_size, agent.n_seeds, generator), generator)
        mark.touch()
    except (RuntimeError, OSError) as error:  # what compilers, linkers, full disks and PyTorch's own checks raise
        agent.uncompile()
        reason = str(error).strip().splitlines() or [""]
        say(
            f"[yellow]The losses could not be compiled ({type(error).__name__}: {escape(reason[0])}): going on "
            "uncompiled, which is slower. --no-compile avoids the attempt.[/]"
        )
        return False
    finally:
        agent.load_state_dict(before)
    say(f"Compiled in {time.monotonic() - start:.0f} s; kept in {folder} for the next run.")
    return True


def _fingerprint(agent: Agent, config: AgentConfig) -> str:
    """What the compiled code depends on, as a file name."""
    facts = [torch.__version__, str(config), str(agent.device), agent.n_seeds]
    facts += [agent.observation_size, agent.action_size, list(agent.compilable)]
    return sha256(json.dumps(facts).encode()).hexdigest()[:24]
