import json

import pytest
import torch
from torch import Tensor

from diffrl.alignment import PromptStatistics, group_advantages
from diffrl.support.errors import UserError

F64 = torch.float64


def batches(n: int, size: int = 24) -> list[tuple[list[str], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (n, size), generator=generator)
    rewards = torch.randn(n, size, generator=generator, dtype=F64) + 2 * labels
    return [([f"digit {i}" for i in row], r) for row, r in zip(labels.tolist(), rewards, strict=True)]


def test_prompt_statistics_are_ddpos() -> None:
    """Written out: the last 12 rewards of the prompt, or, below 6 of them, the batch; a biased deviation."""
    statistics = PromptStatistics(size=12, least=6, clip=None)
    seen: dict[str, list[float]] = {}
    fell_back = 0
    for prompts, rewards in batches(4, size=15):
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            seen.setdefault(prompt, []).append(reward)
        expected = []
        for prompt, reward in zip(prompts, rewards, strict=True):
            last = torch.tensor(seen[prompt][-12:], dtype=F64)
            fell_back += len(last) < 6
            of = rewards if len(last) < 6 else last
            expected.append((reward - of.mean()) / (((of - of.mean()) ** 2).mean().sqrt() + 1e-6))
        torch.testing.assert_close(statistics.advantages(prompts, rewards), torch.stack(expected), rtol=1e-10, atol=0)
    assert 0 < fell_back < 30
    assert max(map(len, seen.values())) > 12


def test_a_prompts_own_level_is_taken_away() -> None:
    """An easy prompt and a hard one: what counts is each sample against its own; over the batch it would not be so."""
    prompts, rewards = ["easy"] * 8 + ["hard"] * 8, torch.cat([torch.arange(8.0) + 100, torch.arange(8.0)])
    own = PromptStatistics(size=8, least=8).advantages(prompts, rewards)
    torch.testing.assert_close(own[:8], own[8:])
    assert own[7] > 0 > own[8]
    batch = PromptStatistics(size=0).advantages(prompts, rewards)
    assert (batch[:8] > 0).all()


def test_a_resumed_run_goes_on_with_its_statistics() -> None:
    (first, second, third) = batches(3)
    statistics = PromptStatistics(size=20, least=10)
    statistics.advantages(*first)
    statistics.advantages(*second)
    resumed = PromptStatistics(size=20, least=10)
    resumed.load_state_dict(json.loads(json.dumps(statistics.state_dict())))
    expected = statistics.advantages(*third)
    assert torch.equal(resumed.advantages(*third), expected)
    assert not torch.equal(PromptStatistics(size=20, least=10).advantages(*third), expected)


def test_advantages_are_clipped_and_keep_the_rewards_type() -> None:
    rewards = torch.zeros(100)
    rewards[3] = 1e4
    advantages = PromptStatistics(size=0).advantages(["a"] * 100, rewards)
    assert advantages.dtype == torch.float32
    assert advantages.max() == 5
    assert (-PromptStatistics(size=0).advantages(["a"] * 100, -rewards)).max() == 5


@pytest.mark.parametrize("value", [0.1, 1e3])
def test_equal_rewards_teach_nothing(value: float) -> None:
    rewards = torch.full((7,), value)
    assert group_advantages(rewards).abs().max() < 1e-3 * max(1.0, value)
    assert PromptStatistics(size=0).advantages(["a"] * 7, rewards).abs().max() < 1e-3


def test_group_advantages_are_grpos() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 10.0, 10.0, 20.0]], dtype=F64)
    std = torch.tensor([1.25, 18.75], dtype=F64).sqrt()[:, None]
    centred = torch.tensor([[-1.5, -0.5, 0.5, 1.5], [-2.5, -2.5, -2.5, 7.5]], dtype=F64)
    torch.testing.assert_close(group_advantages(rewards), centred / (std + 1e-4))
    torch.testing.assert_close(group_advantages(rewards, scale=False), centred)
    assert group_advantages(rewards, clip=1.0).max() == 1


def test_mistakes_are_named() -> None:
    statistics = PromptStatistics(size=16, least=16)
    with pytest.raises(UserError, match="'b' is nan"):
        statistics.advantages(["a", "b"], torch.tensor([1.0, float("nan")]))
    assert statistics.state_dict() == {}
    with pytest.raises(ValueError, match="need one each"):
        statistics.advantages(["a"], torch.zeros(2))
    with pytest.raises(ValueError, match="size >= least"):
        PromptStatistics(size=8)
    with pytest.raises(ValueError, match="at least two"):
        group_advantages(torch.zeros(3, 1))
