"""What the trainer steps and what it leaves: parameters without a gradient, and exchanges that fail."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffrl.images.algorithms import ALGORITHMS, Finetuner
from diffrl.images.config import FinetuneConfig
from diffrl.images.model import Lora, Tuned
from diffrl.images.models import load_model
from diffrl.images.rewards import parse
from diffrl.images.samples import RunState, Setup, chain_of, plain
from diffrl.images.world import LostProcess, World
from diffrl.support.errors import UserError
from tests.images import newer
from tests.images.toy import begin, toy_setup


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan 2.2 A14B."""
    return newer.save_wan(tmp_path_factory.mktemp("wan") / "a14b", second=True)


def of_two_experts(folder: Path, layers: tuple[str, ...] | None = None, **settings: Any) -> Finetuner:
    """A trainer of Wan's two networks: decisions at times 1 and .9 are the first one's, at .75 and .5 the second's.

    layers: trained whole, and no adapters. settings: of the configuration, by default GRPO's with a window of one step.
    """
    options: dict[str, Any] = {"lora": Lora(2)} if layers is None else {"lora": None, "layers": layers}
    grpo = {} if "algo" in settings else {"algo": "grpo", "window": 1, "group": 4}
    given = {"steps": 5, "reward": "jpeg", **grpo, **settings}
    config = FinetuneConfig(
        model=str(folder),
        lora=2 if layers is None else 0,
        layers=layers,
        size=32,
        guidance=1.0,
        batch=4,
        queries=16,
        updates=1,
        warm_up=0,
        eval_samples=2,
        **given,
    )
    model = load_model(str(folder), size=32, precision=config.precision, **options)
    setup = Setup(config, model, chain_of(model, config), plain(["a cat"]), parse(given["reward"]))
    state = RunState()
    return Finetuner(setup, state, ALGORITHMS[config.algo](setup, state))


def of(tuner: Finetuner, expert: str) -> dict[str, Tensor]:
    found = {n: p.detach().clone() for n, p in tuner.parameters.items() if n.startswith(f"{expert}.")}
    assert found
    return found


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_an_expert_that_was_not_called_is_not_stepped(wan: Path) -> None:
    """Neither by Adam's momentum nor by its weight decay; a run that goes on counts the steps of each."""
    tuner = of_two_experts(wan)
    moved = []
    for _ in range(3):
        before = [of(tuner, expert) for expert in ("transformer", "transformer_2")]
        tuner.advance()
        after = [of(tuner, expert) for expert in ("transformer", "transformer_2")]
        moved.append([not equal(one, other) for one, other in zip(before, after, strict=True)])
    assert moved == [[True, False], [True, False], [False, True]]

    tensors, info = tuner.state_dict()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    assert info["optimiser_steps"] == 2
    assert set(info["fewer_steps"].values()) == {1}
    again = of_two_experts(wan)
    again.load_state_dict(3, tensors, info)
    for _ in range(3):
        tuner.advance()
        again.advance()
    for name, parameter in tuner.parameters.items():
        assert torch.equal(parameter, again.parameters[name]), name


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("window", [1, 0])
def test_rounds_that_call_only_the_frozen_one_of_two_networks_make_no_step(
    window: int, precision: str, wan: Path
) -> None:
    """Of a network trained whole; said once, and no round without a signal. fp16's scale is as it was."""
    tuner = of_two_experts(wan, ("transformer_2.proj_out",), window=window, precision=precision)
    said: list[str] = []
    tuner.state.say = said.append
    before, steps = of(tuner, "transformer_2"), []
    for _ in range(4):
        scaler = dict(tuner.scaler.state_dict())
        tuner.advance()
        steps.append(tuner.state.updates)
        if not steps[-1]:
            assert equal(before, of(tuner, "transformer_2"))
            assert tuner.scaler.state_dict() == scaler
    assert steps == ([0, 0, 1, 2] if window else [1, 2, 3, 4])
    assert not equal(before, of(tuner, "transformer_2"))
    assert tuner.state.silent == 0
    assert [line for line in said if "call none of the trained layers" in line] == said[: window and 1] == said


@pytest.mark.parametrize(
    ("part", "settings", "why"),
    [
        ("transformer_2", {"steps": 2}, r"below time 0\.875, .* are at 1"),
        ("transformer_2", {"steps": 2, "algo": "d3po"}, r"below time 0\.875, .* are at 1"),
        ("transformer", {"algo": "draft", "reward": "symmetry"}, r"from time 0\.875 on, .* are at 0\.503 to 0\.00893"),
    ],
)
def test_a_network_of_two_that_no_step_calls_is_refused(
    part: str, settings: dict[str, Any], why: str, wan: Path
) -> None:
    other = {"transformer": "transformer_2", "transformer_2": "transformer"}[part]
    with pytest.raises(UserError, match=rf"are in {part} alone, which .* {why}: name layers of {other}, or"):
        of_two_experts(wan, (part,), **settings)


def test_of_several_processes_a_gradient_that_only_others_have_is_zero_here() -> None:
    """By torch's own group of processes, of one that stands for two: what nobody has stays None."""

    class Both(World):
        """Two processes, of which the other one has a gradient of 1 where its `others` say so."""

        others = (1.0, 0.0, 1.0)

        def __init__(self) -> None:
            super().__init__()
            self.size = 2

        def _sum(self, tensor: Tensor) -> Tensor:
            if tensor.tolist() == [1.0, 0.0, 0.0]:
                return tensor + torch.tensor(self.others)
            return tensor + 1

    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad = torch.full((2,), 3.0)
    Both().sum_gradients(parameters)
    gradients: list[Any] = [None if p.grad is None else p.grad.tolist() for p in parameters]
    assert gradients == [[4.0, 4.0], None, [1.0, 1.0]]


def test_an_exchange_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's words: here of a group of processes that was never made."""
    world = World()
    world.size = 2

    class Accelerator:
        def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
            raise RuntimeError("No backend type associated with device type cpu\nand more")

    world._accelerator = Accelerator()
    with pytest.raises(LostProcess, match=r"No backend type associated with device type cpu$"):
        world.any(True)


@pytest.mark.parametrize("algo", ["dpo", "d3po", "rwr"])
def test_no_more_images_than_a_micro_batch_have_a_graph_at_once(algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both images of a pair count."""
    call, backward = Tuned.__call__, Tensor.backward
    held, most = 0, 0

    def counted(self: Tuned, x: Tensor, *arguments: Any, **named: Any) -> Any:
        nonlocal held, most
        if torch.is_grad_enabled() and not named.get("reference"):
            held += len(x)
            most = max(most, held)
        return call(self, x, *arguments, **named)

    def freed(self: Tensor, *arguments: Any, **named: Any) -> None:
        nonlocal held
        held = 0
        backward(self, *arguments, **named)

    settings = {"queries": 32, "rounds": 1} if algo == "dpo" else {"queries": 16}
    groups = {} if algo == "rwr" else {"group": 4}
    setup = toy_setup(algo=algo, batch=16, updates=1, micro_batch=4, eval_samples=2, **settings, **groups)
    algorithm, state = begin(setup)
    monkeypatch.setattr(Tuned, "__call__", counted)
    monkeypatch.setattr(Tensor, "backward", freed)
    Finetuner(setup, state, algorithm).advance()
    assert most == 4
