"""Compiling an agent: how long it will take, where the result is kept, and what if it fails."""

import gc
import json
import time
from collections.abc import Callable, Collection
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape

import agents
import diffrl.diffusion
import diffrl.nets
from agents.base import Agent
from agents.base_config import AgentConfig
from diffrl.data.transitions import Source
from diffrl.support.console import console
from diffrl.support.errors import UserError, first_line
from diffrl.support.machine import compiled_code_folder


def compile_agent(
    agent: Agent,
    config: AgentConfig,
    source: Source[Any],
    *,
    act_rows: Collection[int] = (),
    say: Callable[[str], None] = console.print,
) -> bool:
    """Compile the agent's losses now, by a step on a batch of `source` that is then undone. False if it failed.

    act_rows: also compile `act`, for these numbers of states of each seed at once. Says beforehand how long it will
    take, and where it fails, why; the agent then stays as it was, uncompiled. Raises UserError for an agent that does
    not keep to `agents.contract`.
    """
    folder = compiled_code_folder()
    mark = folder / "diffrl" / _fingerprint(agent, config, act_rows)
    wait = "some ten seconds: it has been compiled here before" if mark.exists() else "about a minute, the first time"
    say(f"Compiling the losses ({wait}; --no-compile: without) ...")
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    generator = torch.Generator(device=agent.device).manual_seed(0)
    start, failure = time.monotonic(), ""
    torch._dynamo.reset()  # its memory of a method is shared by all agents of a process, and limited to eight variants
    try:
        mark.parent.mkdir(parents=True, exist_ok=True)
        agent.compile(acting=bool(act_rows))
        for phase in range(agent.period):
            agent.update(source.draw(config.batch_size, agent.n_seeds, generator), generator, phase)
        for n in act_rows:
            agent.act(torch.zeros(agent.n_seeds, n, agent.observation_size, device=agent.device), generator)
        mark.touch()
    except UserError:  # what is wrong with an agent of another package is no fault of the compiler
        agent.uncompile()
        raise
    except Exception as error:  # compilers, linkers, full disks and PyTorch's own checks raise what they like
        agent.uncompile()
        failure = f"{type(error).__name__}: {escape(first_line(error))}"
    finally:
        agent.load_state_dict(before)
    if failure:
        gc.collect()  # the failed step's graph is tied to this stream, and would break the capture of the next one
        say(f"[yellow]The losses could not be compiled ({failure}): going on uncompiled, which is slower.[/]")
        return False
    say(f"Compiled in {time.monotonic() - start:.0f} s; kept in {folder} for the next run.")
    return True


def _fingerprint(agent: Agent, config: AgentConfig, act_rows: Collection[int]) -> str:
    """A file name that stands for all that the compiled code depends on, our own sources included."""
    facts = [torch.__version__, str(config), str(agent.device), agent.n_seeds, list(act_rows)]
    facts += [agent.observation_size, agent.action_size]
    text = json.dumps(facts).encode()
    for module in (agents, diffrl.nets, diffrl.diffusion):
        for path in sorted(Path(str(module.__file__)).parent.glob("*.py")):
            text += path.read_bytes()
    return sha256(text).hexdigest()[:24]
