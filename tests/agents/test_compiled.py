"""Compiled losses are the eager ones: the gradients of a step, twenty steps of training, and acting."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from agents import (
    AGENTS,
    BFN,
    DTQL,
    EDP,
    FQL,
    IDQL,
    IFQL,
    QAM,
    RLPD,
    AgentConfig,
    ConsistencyAC,
    Diffuser,
    DiffusionBC,
    DiffusionQL,
)
from agents.base import Agent
from agents.bc import DiffusionBCAgent
from agents.diffusion_ql import DiffusionQLAgent, DiffusionQLNoise
from diffrl.data.transitions import Transitions
from diffrl.runs import config as configuration
from diffrl.support.machine import choose_compiling
from diffrl.training import compilation
from tests.agents.agent_cases import make_batch, make_batch_for
from tests.agents.test_diffusion_ql import build

CONFIG = DiffusionQL(width=16, layers=1, batch_size=8, denoising_steps=2, critic_layer_norm=True, act_candidates=4)
CLONING = DiffusionBC(width=16, layers=1, batch_size=8, denoising_steps=2)
"""Compiled in a third of the time: one loss, no critic."""


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def losses(agent: Agent) -> list[list[torch.Tensor]]:
    """The gradients of each loss at one batch, with the same noise."""
    g = torch.Generator().manual_seed(3)
    batch = transitions().draw(8, 1, g)  # laid out as what was compiled; of another layout all is compiled anew
    if isinstance(agent, DiffusionBCAgent):
        loss = agent.bc_loss(batch, agent.actor.bc_noise(batch.actions, g))
        return [list(torch.autograd.grad(loss.sum(), list(agent.actor.parameters())))]
    assert isinstance(agent, DiffusionQLAgent)
    noise = torch.randn(3, 1, 8, 2, generator=g)
    cloning = agent.actor.bc_noise(batch.actions, g)
    critic = agent.critic_loss(batch, noise)[0]
    actor = agent.actor_loss(batch, DiffusionQLNoise(cloning, noise, torch.tensor([[0.3]])))[0]
    pairs = ((critic, agent.critic), (actor, agent.actor))
    return [list(torch.autograd.grad(loss.sum(), list(network.parameters()))) for loss, network in pairs]


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing is compiled yet; by this process alone, as each other one imports PyTorch first."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("config", [CLONING, CONFIG], ids=lambda c: c.name)
@pytest.mark.usefixtures("own_cache")
def test_the_gradients_of_a_compiled_step_are_the_eager_ones(
    config: AgentConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """To 1e-5 of their size in float32. Compiling itself trains nothing, and says what it takes."""
    eager, compiled = (config.build(3, 2, (0,)) for _ in range(2))
    assert compilation.compile_agent(compiled, config, transitions())
    assert "about a minute" in capsys.readouterr().err
    for key, value in eager.state_dict().items():
        assert torch.equal(compiled.state_dict()[key], value), key
    for ours, theirs in zip(losses(compiled), losses(eager), strict=True):
        scale = max(float(gradient.abs().max()) for gradient in theirs)
        assert scale > 1e-3
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_acting_compiles_too_and_what_was_compiled_is_remembered(capsys: pytest.CaptureFixture[str]) -> None:
    eager, x = build(CONFIG), torch.randn(1, 5, 3)
    for message in ("about a minute", "compiled here before"):
        compiled = build(CONFIG)
        assert compilation.compile_agent(compiled, CONFIG, transitions(), act_rows=(5,))
        assert message in capsys.readouterr().err
        ours, theirs = (agent.act(x, torch.Generator().manual_seed(0)) for agent in (compiled, eager))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


SIZE: dict[str, Any] = {"width": 16, "layers": 1, "batch_size": 8}
CONFIGS = {name: schema(**SIZE) for name, schema in AGENTS.items()} | {
    "diffusion_ql": dataclasses.replace(CONFIG, ema_start=5),
    "edp": EDP(**SIZE, sampling_steps=2, ema_start=5),
    "consistency_ac": ConsistencyAC(**SIZE, q_norm=True, ema_start=5, boundaries_steps=20),
    "idql": IDQL(**SIZE, blocks=1, denoising_steps=2),
    "fql": FQL(**SIZE, flow_steps=2),
    "bfn": BFN(**SIZE, flow_steps=2),
    "qc": BFN(**SIZE, flow_steps=2, chunk=3),
    "qc_fql": FQL(**SIZE, flow_steps=2, chunk=3),
    "n_step_fql": FQL(**SIZE, flow_steps=2, n_step=3),
    "ifql": IFQL(**SIZE, flow_steps=2),
    "dtql": DTQL(**SIZE, actor_start=5, likelihood_weight=1.0, act_candidates=4),
    "rlpd": RLPD(**SIZE, n_critics=3, actor_every=2),
    "qam": QAM(**SIZE, flow_steps=2, n_critics=3),
    "diffuser": Diffuser(**SIZE, horizon=8, denoising_steps=3, ema_start=5),
    "guided_diffuser": Diffuser(**SIZE, horizon=8, denoising_steps=3, ema_start=5, guidance="return"),
}
TRACED = ("idql", "td3_bc")
"""Of these the fast tier traces the losses; td3_bc has phases."""


@pytest.mark.long
@pytest.mark.parametrize("name", [n if n in TRACED else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
@pytest.mark.usefixtures("double")
def test_losses_and_acting_are_one_graph_each(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole, whatever structure their noise comes in; a step and an action are the eager ones to rounding."""
    torch._dynamo.reset()
    monkeypatch.setattr(
        "agents.base.compiled", lambda function, device: torch.compile(function, fullgraph=True, backend="aot_eager")
    )
    results = []
    for traced in (False, True):
        agent, g = CONFIGS[name].build(3, 2, (0,)), torch.Generator().manual_seed(0)
        if traced:
            agent.compile(acting=True)
            assert {*agent.compilable, *agent.acting} <= vars(agent).keys()
        for phase in range(agent.period):
            agent.update(make_batch_for(agent, seed=phase), g, phase)
        results.append({**agent.state_dict(), "action": agent.act(torch.ones(1, 2, 3), g)})
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-12, atol=1e-12, msg=lambda t, k=key: f"{k}: {t}")


@pytest.mark.long
@pytest.mark.parametrize("name", [n if n == "bc" else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
@pytest.mark.usefixtures("double")
def test_twenty_compiled_steps_are_twenty_eager_ones(name: str) -> None:
    """In float64, where rounding is far below 1e-9 even after Adam has amplified it."""
    torch._dynamo.reset()
    states = []
    for compiled in (False, True):
        agent, g = CONFIGS[name].build(3, 2, (0,)), torch.Generator().manual_seed(0)
        if compiled:
            agent.compile()
            assert agent.compilable
            for method in agent.compilable:
                assert method in vars(agent)
        for step in range(20):
            agent.update(make_batch_for(agent, seed=step), g, step % agent.period)
        states.append(agent.state_dict())
    parameters = [value for key, value in states[0].items() if key.startswith("actor.")]
    assert all(value.dtype == torch.float64 for value in parameters)
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-9, atol=1e-9, msg=lambda text, k=key: f"{k}: {text}")


def transitions() -> Transitions:
    return Transitions(torch.rand(50, 2 * 3 + 2 + 4, generator=torch.Generator().manual_seed(0)), 3, 2)


def test_without_a_compiler_a_run_goes_on_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose_compiling(None, 1_000_000, "cpu")
    assert not choose_compiling(None, 100, "cpu")
    assert choose_compiling(True, 100, "cpu")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert not choose_compiling(None, 100, "cpu")
    assert capsys.readouterr().err == ""
    for choice in (None, True):
        assert not choose_compiling(choice, 1_000_000, "cpu")
        assert "C++ compiler" in capsys.readouterr().err


@pytest.mark.usefixtures("own_cache")
def test_a_failed_compilation_leaves_the_agent_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The compiler is found but fails; the agent is neither changed nor half compiled, and trains.

    The setting is changed by PyTorch's own means: pytest's takes it away at the end, and no later test could compile.
    """
    fake = tmp_path / "g++"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    agent, twin = (CLONING.build(3, 2, (0,)) for _ in range(2))
    with torch._inductor.config.patch({"cpp.cxx": (None, str(fake))}):
        assert not compilation.compile_agent(agent, CLONING, transitions())
    assert "could not be compiled" in capsys.readouterr().err
    for a in (agent, twin):
        a.update(make_batch(), torch.Generator().manual_seed(0))
    for key, value in twin.state_dict().items():
        assert torch.equal(agent.state_dict()[key], value), key


@pytest.mark.long
@pytest.mark.parametrize("name", configuration.shipped())
def test_no_shipped_configuration_makes_a_short_run_wait_for_the_compiler(name: str) -> None:
    """--steps 300 of one begins at once: it leaves the choice to the number of steps, or says that it never pays."""
    config = configuration.configuration(name, steps=300)
    assert not choose_compiling(config.compile, config.steps, "cpu")
