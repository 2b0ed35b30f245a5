"""Rewards never share memory with the trainer: whatever one does to what it was given, a run is the same to the bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffrl.images.algorithms.base import Finetuner
from diffrl.images.evaluation import evaluate
from diffrl.images.rewards import Reward, Sum, ask, ask_parts, protocol
from diffrl.images.rewards.scaled import ScaledSum
from tests.images.toy import Target, begin, toy_setup


class Vandal(Target):
    """`Target`, which destroys all that it can reach, of this call and of earlier ones, and answers with a view."""

    def __init__(self, target: float = 1.0, name: str = "target", grouped: bool = False) -> None:
        super().__init__(target)
        self.name, self.grouped, self.kept = name, grouped, list[Tensor]()

    def __call__(self, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        for tensor in self.kept:
            tensor.fill_(7)
        with torch.no_grad():
            values = super().__call__(images, prompts, metadata)
        images.fill_(3)
        images.flatten(1)[:, 0] = values
        prompts[:] = ["spoilt"] * len(prompts)
        for row in metadata:
            row.clear() if isinstance(row, dict) else None
        self.kept = [images]
        return images.flatten(1)[:, 0]


class View:
    """The pixel itself: the values are the images' own memory."""

    name, differentiable = "view", True

    def __call__(self, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        return images[:, 0, 0, 0]


class Honest(View):
    """The same, computed."""

    def __call__(self, images: Tensor, prompts: Any, metadata: Any) -> Tensor:
        return images.mean((1, 2, 3))


def run(reward: Reward, algo: str, held_out: Reward | None = None, **settings: Any) -> dict[str, Any]:
    """All that two rounds leave, and what evaluations before and after them measure."""
    setup = toy_setup(reward, algo=algo, micro_batch=10, **settings)
    algorithm, state = begin(setup)
    tuner = Finetuner(setup, state, algorithm)
    measured = [evaluate(setup, state, held_out, None)]
    metrics = [tuner.advance() for _ in range(2)]
    measured.append(evaluate(setup, state, held_out, None))
    tensors, info = tuner.state_dict()
    seen = [{**one.measures, "images": one.images.tolist(), "prompts": one.prompts} for one in measured]
    return {"tensors": {n: t.tolist() for n, t in tensors.items()}, "info": info, "metrics": metrics, "seen": seen}


@pytest.mark.long
@pytest.mark.parametrize("algo", ["ddpo-is", "ddpo-sf", "grpo", "dpok", "nft", "rwr", "d3po", "dpo"])
def test_a_run_is_the_same_whatever_its_reward_destroys(algo: str) -> None:
    settings: dict[str, Any] = {"kl": 0.1} if algo not in ("dpo",) else {"queries": 64, "rounds": 2}
    settings |= {"eta": 1.0}
    assert run(Vandal(), algo, Vandal(0.0), **settings) == run(Target(1.0), algo, Target(0.0), **settings)


@pytest.mark.parametrize("kind", [Sum, ScaledSum])
@pytest.mark.parametrize("grouped", [False, True])
def test_so_is_one_of_a_sum_of_vandals(kind: type[Sum], grouped: bool) -> None:
    spoilt = kind([(1.0, Vandal(1.0, "a", grouped)), (2.0, Vandal(2.0, "b"))])
    honest = kind([(1.0, Vandal(1.0, "a", grouped)), (2.0, Vandal(2.0, "b"))])
    for _, part in honest.terms:
        part.__class__ = type("Kind", (Vandal,), {"__call__": Target.__call__})
    assert run(spoilt, "grpo", spoilt) == run(honest, "grpo", honest)


@pytest.mark.parametrize("algo", ["draft"])
def test_the_gradient_through_a_view_is_that_of_the_value(algo: str) -> None:
    assert run(View(), algo, View()) == run(Honest(), algo, Honest())


def test_what_comes_back_is_the_callers_own() -> None:
    images = torch.rand(4, 1, 1, 1)
    before = images.clone()
    total, parts = ask_parts(Sum([(1.0, View()), (1.0, Vandal())]), images, ["p"] * 4)
    alone = ask(View(), images, ["p"] * 4)
    memory = images.untyped_storage().data_ptr()
    for values in (total, alone, *parts.values()):
        assert values.untyped_storage().data_ptr() != memory
        values.fill_(9)
    assert torch.equal(images, before)


def test_a_server_of_rewards_keeps_its_images_too() -> None:
    """In one call, and one by one where the sizes differ."""
    generator = torch.Generator().manual_seed(0)
    for shapes in ([(3, 4, 4)] * 3, [(3, 4, 4), (3, 2, 2)]):
        images = [torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8) for shape in shapes]
        before = [image.clone() for image in images]
        metadata: list[dict[str, Any]] = [{"deep": {"list": [0]}} for _ in images]
        request = protocol.Request([], ["p"] * len(images), metadata)  # type: ignore[arg-type]
        assert protocol.scores(Vandal(), request, images) == protocol.scores(Target(1.0), request, images)
        assert all(torch.equal(a, b) for a, b in zip(images, before, strict=True))
        assert request.prompts == ["p"] * len(images)
        assert metadata == [{"deep": {"list": [0]}} for _ in images]
