"""The ONNX graph of a policy is the policy, to rounding, by onnxruntime; what cannot be a graph is refused."""

import functools
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import agents
import diffrl
from agents.base import Agent
from agents.critic import CandidateNoise
from diffrl.runs.export.export import export
from diffrl.runs.export.onnx import Acting
from diffrl.runs.run import Run
from diffrl.support.errors import UserError
from tests.rounding import rounding
from tests.runs.made_runs import made_run, small

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

FAST = "diffusion_ql"
"""Tried at every change; the others take as long each, five seconds, in the slow tests."""
GRAPHS = (
    *("bc", "td3_bc", "iql", "diffusion_bc", "diffusion_ql", "edp", "idql", "fql", "qam", "rlpd", "consistency_ac"),
    *("consistency_ac improved", "consistency_ac angular"),
)
"""Agents, and forms of them that are other equations; tests/tuning has a distilled student."""
ROUNDINGS = 200
"""Of an action: 3 to 5 networks in a row of three layers of 8, each sum of ten terms, and the sampler between them."""


def own_noise(agent: Agent, x: torch.Tensor, seed: int) -> tuple[Any, dict[str, np.ndarray]]:
    """Noise as the agent's own `act_from` takes it, and the same as the graph's inputs, a row an observation."""
    g, K, B = torch.Generator().manual_seed(seed), getattr(agent.config, "act_candidates", 1), x.shape[1]
    noise = agent.policy.sampling_noise(x, g, K)
    *lead, _, _, A = noise.shape
    graph = noise.view(*lead, B, K, A).movedim(-3, 0)
    if not isinstance(agent.config, agents.DiffusionQL | agents.ConsistencyAC | agents.EDP | agents.IDQL):
        return noise, {"noise": graph.squeeze(-2).numpy()}
    gumbel = -torch.empty(1, B, K).exponential_(generator=g).log()
    return CandidateNoise(noise, gumbel), {"noise": graph.numpy(), "gumbel": gumbel[0].numpy()}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Gives an agent's run and its exported folder, made once."""

    @functools.cache
    def made(name: str) -> tuple[Path, Path]:
        path = tmp_path_factory.mktemp(name)
        agent, _, form = name.partition(" ")
        run = made_run(path / "run", small(agent, act_temperature=0.5, **({"form": form} if form else {})))
        return run, export(run, path / "to", onnx=True)

    return made


Exported = Callable[[str], tuple[Path, Path]]


@pytest.mark.long
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == FAST else [pytest.mark.slow]) for name in GRAPHS]
)
def test_the_graph_is_the_policy_to_rounding(name: str, exported: Exported) -> None:
    """In the environment's units, for one observation and for many, and for each noise."""
    run, to = exported(name)
    policy, scales = diffrl.load_policy(to), Run.read(run).preprocessing
    session = onnxruntime.InferenceSession(str(to / "policy.onnx"))
    random = policy.agent.config.policy_kind != "deterministic"
    actions = []
    for seed, B in ((0, 1), (1, 3), (2, 40), (3, 40)):
        x = torch.from_numpy(np.random.default_rng(7).uniform(-2, 2, (B, 3)).astype(np.float32))
        z = scales.observations(x)[None]
        noise, inputs = own_noise(policy.agent, z, seed) if random else (None, {})
        with torch.no_grad():
            ours = policy.agent.act_from(z, noise) if random else policy.agent.act(z, torch.Generator())
        expected = scales.actions.inverse(ours)[0].numpy()
        if not random:
            np.testing.assert_array_equal(policy(x.numpy()), expected)
        (found,) = session.run(["action"], {"observation": x.numpy(), **inputs})
        size = float((scales.actions.scale + scales.actions.shift.abs()).max())
        np.testing.assert_allclose(found, expected, rtol=0, atol=rounding(torch.float32, ROUNDINGS, size))
        actions.append(found)
    assert len(np.unique(actions[2])) > 1  # not all are cut off at the bounds
    assert np.array_equal(actions[2], actions[3]) is not random


def test_the_card_says_how_to_call_it(exported: Exported) -> None:
    """Its example, run as it stands, gives one action; the table names the graph's inputs and their shapes."""
    _, to = exported(FAST)
    card = (to / "README.md").read_text()
    session = onnxruntime.InferenceSession(str(to / "policy.onnx"))
    for given in session.get_inputs():
        shape = ", ".join(["batch", *map(str, given.shape[1:])])
        assert f"| `{given.name}` | ({shape}) |" in card
    example = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[1].replace("policy.onnx", str(to / "policy.onnx"))
    variables: dict[str, Any] = {"observation": np.zeros(3)}
    exec(example, variables)
    assert variables["action"].shape == (1,)
    assert str(Path.cwd()).encode() not in (to / "policy.onnx").read_bytes()


def test_a_graph_that_is_cut_short_is_seen_by_its_checksum(exported: Exported, tmp_path: Path) -> None:
    """Which `sha256sum` checks; `load_policy` makes no use of the graph."""
    to = Path(shutil.copytree(exported(FAST)[1], tmp_path / "to"))
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(check, cwd=to, capture_output=True).returncode == 0
    (to / "policy.onnx").write_bytes((to / "policy.onnx").read_bytes()[:-1])
    done = subprocess.run(check, cwd=to, capture_output=True, text=True)
    assert done.returncode == 1
    assert "policy.onnx: FAILED" in done.stdout
    diffrl.load_policy(to)


def test_the_graph_makes_no_finite_action_of_what_is_not(exported: Exported) -> None:
    """Where the policy refuses: the card says so."""
    _, to = exported(FAST)
    session = onnxruntime.InferenceSession(str(to / "policy.onnx"))
    rng = np.random.default_rng(0)
    inputs = {g.name: rng.standard_normal((1, *g.shape[1:])).astype(np.float32) for g in session.get_inputs()}
    inputs["observation"][0, 0] = np.nan
    assert not np.isfinite(session.run(["action"], inputs)[0]).all()
    with pytest.raises(ValueError, match="finite"):
        diffrl.load_policy(to)(inputs["observation"])
    assert "It checks nothing: of an observation that is not finite" in (to / "README.md").read_text()


@pytest.mark.parametrize(("name", "why"), [("diffuser", "a graph has no memory"), ("q_guidance", "takes gradients")])
def test_what_cannot_be_a_graph_is_refused_in_a_sentence(name: str, why: str, tmp_path: Path) -> None:
    """And no folder is made."""
    run = made_run(tmp_path / "run", small(name))
    with pytest.raises(UserError, match=rf"The agent {name} cannot be exported as ONNX: it .*{why}"):
        export(run, tmp_path / "to", onnx=True)
    assert not (tmp_path / "to").exists()


def test_what_the_exporter_cannot_do_is_said_in_one_whole_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    """Of an operation that ONNX lacks, as an agent of another package may have: which one, and what to do instead."""
    run = made_run(tmp_path / "run", small("bc"))
    kind = type(diffrl.load_policy(run).agent)
    own = kind.act
    monkeypatch.setattr(kind, "act", lambda self, z, g: torch.hypot(own(self, z, g), z[..., :1]))
    with pytest.raises(UserError) as told:
        export(run, tmp_path / "to", onnx=True)
    assert str(told.value) == (
        "The agent bc cannot be exported as ONNX: DispatchError: No ONNX function found for "
        "<OpOverload(op='prims.hypot', overload='default')>. Without --onnx it can be exported."
    )
    assert not (tmp_path / "to").exists()


def test_without_the_extra_it_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    run = made_run(tmp_path / "run", small("bc"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"--onnx needs onnxscript.*pip install 'diffrl\[onnx\]'"):
        export(run, tmp_path / "to", onnx=True)


def test_what_is_random_is_an_input(tmp_path: Path) -> None:
    """No noise where the action is one; no Gumbel noise where the best is taken, or there is no choice."""
    names = {
        ("bc", 1, 1.0): ["observation"],
        ("diffusion_bc", 1, 1.0): ["observation", "noise"],
        ("diffusion_ql", 4, 1.0): ["observation", "noise", "gumbel"],
        ("diffusion_ql", 4, 0.0): ["observation", "noise"],
        ("diffusion_ql", 1, 1.0): ["observation", "noise"],
    }
    for i, ((name, K, temperature), expected) in enumerate(names.items()):
        run = made_run(tmp_path / str(i), small(name, act_candidates=K, act_temperature=temperature))
        acting = Acting(diffrl.load_policy(run).agent, Run.read(run).preprocessing)
        assert [given.name for given in acting.inputs] == expected
