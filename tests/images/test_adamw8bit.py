"""AdamW with its moments in 8 bits: its memory, its distance from AdamW, and that it goes on bit for bit."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffrl.images.algorithms import adamw8bit
from diffrl.images.algorithms.adamw8bit import bytes_of, moment_from, tensors_of
from diffrl.images.algorithms.base import FIRST, SECOND
from diffrl.images.config import FinetuneConfig
from diffrl.images.job import finetune, resume
from diffrl.support import folder as folders
from diffrl.support.errors import UserError
from diffrl.training import checkpoint
from tests.images.test_algorithms import trained
from tests.images.toy import toy_setup

BLOCK, LEAST = 256, 4096


@pytest.fixture
def torchao() -> Any:
    return pytest.importorskip("torchao")


def gradient_of(parameter: Tensor, step: int) -> Tensor:
    return parameter.detach() + torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))


def make(kind: str, parameters: list[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    of = adamw8bit.make if kind == "adamw8bit" else torch.optim.AdamW
    return of(parameters, lr=lr, weight_decay=weight_decay)


def steps(kind: str, parameters: list[nn.Parameter], n: int, first: int = 0, **options: Any) -> torch.optim.Optimizer:
    optimiser = make(kind, parameters, 1e-2, options.get("weight_decay", 0.1))
    go_on(optimiser, parameters, n, first)
    return optimiser


def go_on(optimiser: torch.optim.Optimizer, parameters: list[nn.Parameter], n: int, first: int = 0) -> None:
    for step in range(first, first + n):
        for parameter in parameters:
            parameter.grad = gradient_of(parameter, step)
        optimiser.step()


def fresh(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(7)))


def test_a_torchao_of_another_pytorch_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is newer than PyTorch misses something of it, at its import."""
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao/__init__.py").write_text("import torch\ntorch.not_there_yet")
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match=r"--optimiser adamw8bit needs a torchao that is made for PyTorch .*not_there_yet"
    ):
        adamw8bit.require()


def test_a_parameter_costs_two_bytes_and_a_scale_for_each_block(torchao: Any) -> None:
    """2 (1 + 4/256) bytes a parameter; of a tensor below 4,096 values, or that 256 does not divide, 8 as ever."""
    for shape, each in (((64, 128), 2 * (1 + 4 / BLOCK)), ((10,), 8), ((LEAST - BLOCK,), 8), ((LEAST + 1,), 8)):
        parameter = fresh(*shape)
        assert bytes_of(steps("adamw8bit", [parameter], 2)) == each * parameter.numel()
        assert bytes_of(steps("adamw", [fresh(*shape)], 2)) == 8 * parameter.numel()


def test_a_moment_is_right_to_half_a_gap_of_its_table(torchao: Any) -> None:
    """Each value to half the distance of the table's values about it, times the largest of its block."""
    parameter = fresh(64, 128)
    exact = fresh(64, 128)
    eight, plain = steps("adamw8bit", [parameter], 1), steps("adamw", [exact], 1)
    for name in ("exp_avg", "exp_avg_sq"):
        moment, truth = eight.state[parameter][name], plain.state[exact][name].view(-1, BLOCK)
        largest = truth.abs().amax(-1, keepdim=True)
        table = moment.qmap.double().sort().values
        share = (truth / largest).double()
        above = torch.searchsorted(table, share.clamp(table[0], table[-1])).clamp(1, len(table) - 1)
        gap = (table[above] - table[above - 1]) * largest
        error = (moment.dequantize().view(-1, BLOCK).double() - truth).abs()
        assert (error <= gap / 2 + 8 * torch.finfo(torch.float32).eps * largest).all()
        assert error.max() > 0


def test_the_first_step_is_adamws_and_later_ones_stay_near(torchao: Any) -> None:
    """The step is made before the moments are rounded: the first one is exact. Later each parameter lags by at most
    what rounding of its moments makes of a step of about lr: the mean distance is a few per cent of the way."""
    for n, share in ((1, 0.0), (20, 0.1)):
        parameter, exact = fresh(64, 128), fresh(64, 128)
        began = exact.detach().clone()
        steps("adamw8bit", [parameter], n)
        steps("adamw", [exact], n)
        away, moved = (parameter - exact).abs().mean(), (exact - began).abs().mean()
        rounding = 16 * torch.finfo(torch.float32).eps * exact.abs().mean()
        assert away <= share * moved + rounding
        assert moved > 1e-3
    assert away > rounding


def test_it_finds_the_least_of_a_square(torchao: Any) -> None:
    """|p|^2 / 2 from deviation 1: AdamW at lr 1e-2 ends within a few steps' length of 0, and so does 8 bits."""
    ends = []
    for kind in ("adamw", "adamw8bit"):
        parameter = fresh(64, 128)
        optimiser = make(kind, [parameter], 1e-2, 0.0)
        for _ in range(600):
            parameter.grad = parameter.detach().clone()
            optimiser.step()
        ends.append(float(parameter.detach().square().mean().sqrt()))
    assert max(ends) < 5e-2


def test_small_tensors_are_adamws(torchao: Any) -> None:
    parameter, exact = fresh(10), fresh(10)
    for kind, each in (("adamw8bit", parameter), ("adamw", exact)):
        steps(kind, [each], 5)
    bound = 32 * torch.finfo(torch.float32).eps * float(exact.detach().abs().max())
    assert torch.allclose(parameter, exact, rtol=0, atol=bound)


def test_moments_go_to_files_and_back(torchao: Any) -> None:
    """Two steps and two equal four, bit for bit, through plain tensors; codes of another shape are refused."""
    whole, first = [fresh(64, 128), fresh(10)], [fresh(64, 128), fresh(10)]
    steps("adamw8bit", whole, 4)
    optimiser = steps("adamw8bit", first, 2)
    second = [nn.Parameter(parameter.detach().clone()) for parameter in first]
    again = make("adamw8bit", second, 1e-2, 0.1)
    for old, new in zip(first, second, strict=True):
        state = optimiser.state[old]
        again.state[new] = {"step": torch.tensor(2.0)}
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            values, scale = (None if t is None else t.clone() for t in tensors_of(state[name]))
            assert values is not None
            assert (values.dtype, scale is None) == ((torch.uint8, False) if old.ndim == 2 else (torch.float32, True))
            again.state[new][name] = values if scale is None else moment_from(values, scale, new, signed=signed)
    go_on(again, second, 2, first=2)
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))
    with pytest.raises(ValueError, match="codes of shape"):
        moment_from(torch.zeros(3, dtype=torch.uint8), torch.ones(1), second[0], signed=True)


def test_each_optimiser_goes_on_from_the_others_moments(torchao: Any) -> None:
    """A run whose settings were edited: AdamW steps from the numbers that codes stand for, 8 bits from float32."""
    ends = {}
    for kind, other in (("adamw8bit", "adamw"), ("adamw", "adamw8bit")):
        first = fresh(64, 128)
        old = steps(kind, [first], 2).state[first]
        second, plain = (nn.Parameter(first.detach().clone()) for _ in range(2))
        again, exact = make(other, [second], 1e-2, 0.1), make("adamw", [plain], 1e-2, 0.1)
        tuner = trained(toy_setup(algo="ddpo-is", optimiser=other), 0)
        again.state[second], exact.state[plain] = {"step": torch.tensor(2.0)}, {"step": torch.tensor(2.0)}
        for name, which in (("exp_avg", FIRST), ("exp_avg_sq", SECOND)):
            values, scale = tensors_of(old[name])
            assert (scale is None) == (kind == "adamw")
            again.state[second][name] = tuner._moment(values, scale, second, which)
            exact.state[plain][name] = old[name].dequantize() if kind == "adamw8bit" else old[name].clone()
        go_on(again, [second], 2, first=2)
        go_on(exact, [plain], 2, first=2)
        ends[kind] = float((second - plain).detach().abs().max() / plain.detach().abs().max())
    assert max(ends.values()) <= 64 * torch.finfo(torch.float32).eps


def test_a_toy_run_learns_what_adamw_learns(torchao: Any) -> None:
    """One parameter, far below 4,096: the same run to rounding, while the rate rises, too."""
    made = [trained(toy_setup(algo="ddpo-is", optimiser=kind, warm_up=9), 3) for kind in ("adamw", "adamw8bit")]
    for tuner in made:
        share = min(1.0, tuner.state.updates / 10)
        assert float(tuner.optimiser.param_groups[0]["lr"]) == pytest.approx(tuner.setup.config.lr * share)
    assert tuner.state.updates < 10
    values = [float(tuner.setup.model.tuned.network.m.detach()) for tuner in made]  # type: ignore[union-attr, operator]
    assert math.isclose(*values, rel_tol=1e-4)
    assert values[0] != 0


@pytest.mark.slow
def test_a_run_is_resumed_bit_for_bit(torchao: Any, tmp_path: Path) -> None:
    """tiny-emoji trained whole: four rounds at once, or two and two; its moments are bytes in the checkpoint."""
    common = {"algo": "nft", "optimiser": "adamw8bit", "batch": 8, "group": 2, "updates": 1, "steps": 2}
    common |= {"eval_samples": 2, "eval_every": 2, "warm_up": 0}
    whole = finetune(FinetuneConfig(**common, queries=32, out=tmp_path / "whole"), quiet=True)
    part = finetune(FinetuneConfig(**common, queries=16, out=tmp_path / "part"), quiet=True)
    resume(part, steps=32, quiet=True)
    saved = [checkpoint.load_latest(run)[0] for run in (whole, part)]
    names = [set(each.tensors) for each in saved]
    assert names[0] == names[1]
    assert all(torch.equal(saved[0].tensors[name], saved[1].tensors[name]) for name in names[0])
    codes = [t for name, t in saved[0].tensors.items() if name.startswith("first_moment.") and t.dtype is torch.uint8]
    assert sum(t.numel() for t in codes) > 1_000_000
    assert folders.read_json(part / "run.json")


def test_without_the_library_it_is_said_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    said = r"--optimiser adamw8bit needs torchao, which is not installed: pip install 'diffrl\[adamw8bit\]' brings it"
    with pytest.raises(UserError, match=said):
        finetune(FinetuneConfig(optimiser="adamw8bit", model="not/read", out=tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="optimiser"):
        FinetuneConfig(optimiser="sgd")


def test_without_the_library_a_run_that_goes_on_names_what_needs_it(
    torchao: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its settings where they ask for 8 bits, its checkpoint where they were edited to AdamW: no option of resume."""
    common = {"algo": "nft", "optimiser": "adamw8bit", "batch": 2, "group": 2, "updates": 1, "steps": 2}
    run = finetune(
        FinetuneConfig(**common, model="tiny-emoji", queries=2, eval_samples=2, out=tmp_path / "run"), quiet=True
    )
    monkeypatch.setitem(sys.modules, "torchao", None)
    needs = r" needs torchao, which is not installed: pip install 'diffrl\[adamw8bit\]' brings it"
    with pytest.raises(UserError, match=rf"^{run}/finetune.yaml says optimiser: adamw8bit, which{needs}"):
        resume(run, steps=4, quiet=True)
    file = run / "finetune.yaml"
    file.write_text(file.read_text().replace("optimiser: adamw8bit", "optimiser: adamw"))
    folders.accept(run)
    with pytest.raises(UserError, match=rf"^Reading a checkpoint whose moments are in 8 bits, .*{needs}"):
        resume(run, steps=4, quiet=True)
