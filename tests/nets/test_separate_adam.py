"""Of seeds that may stand still each makes the steps that it would make alone."""

import pytest
import torch
from torch import Tensor

from diffrl.nets import MLP, Adam, SeparateAdam, copy_state_

GOING = torch.tensor([[1, 0, 1]] * 7 + [[0, 0, 1]] * 2 + [[1, 1, 1]] * 6, dtype=torch.bool)
"""Which of three seeds go at each update: the middle one begins late, the first pauses."""
DATA = torch.randn(len(GOING), 3, 16, 4, generator=torch.Generator().manual_seed(0))


def network(seeds: list[int]) -> MLP:
    return MLP((len(seeds),), 4, 2, [torch.Generator().manual_seed(s) for s in seeds], width=5, layers=1)


def loss(net: MLP, i: int, seeds: list[int]) -> Tensor:
    x = DATA[i, seeds]
    return (net(x) - 3 * x[..., :2].sin()).square().mean((1, 2))


def trained(seeds: list[int], **settings: float) -> tuple[MLP, SeparateAdam]:
    """The networks of some of the three seeds after their updates, in one stack."""
    net = network(seeds)
    optimiser = SeparateAdam(net, 3e-3, n_seeds=len(seeds), **settings)  # type: ignore[arg-type]
    for i, going in enumerate(GOING[:, seeds]):
        optimiser.step_where(loss(net, i, seeds), going)
    return net, optimiser


@pytest.mark.parametrize("settings", [{}, {"clip": 0.5}, {"clip": 0.5, "warm_up": 5}], ids=str)
def test_a_seed_that_stands_still_makes_its_own_steps_later(settings: dict[str, float]) -> None:
    """As `Adam` does that is asked for the steps made alone: bias correction and warm-up are a seed's own."""
    net, optimiser = trained([0, 1, 2], **settings)
    for s in range(3):
        alone = network([s])
        adam = Adam(alone, 3e-3, **settings)  # type: ignore[arg-type]
        made = [i for i, going in enumerate(GOING[:, s]) if going]
        for i in made:
            adam.step(loss(alone, i, [s]))
        for ours, theirs in zip(net.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(ours[s], theirs[0], rtol=1e-5, atol=1e-6)
        assert {int(step[s]) for name, step in optimiser.state_dict().items() if name.endswith(".step")} == {len(made)}
    assert len({int(n) for n in GOING.sum(0)}) == 3


def test_torchs_adam_makes_the_late_seeds_steps() -> None:
    net, _ = trained([0, 1, 2])
    alone = network([1])
    adam = torch.optim.Adam(alone.parameters(), 3e-3)
    for i in range(9, 15):
        adam.zero_grad()
        loss(alone, i, [1]).sum().backward()
        adam.step()
    for ours, theirs in zip(net.parameters(), alone.parameters(), strict=True):
        assert torch.allclose(ours[1], theirs[0], rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_no_number_is_only_its_own_seeds() -> None:
    net = network([0, 1])
    before = [p.detach().clone() for p in net.parameters()]
    optimiser = SeparateAdam(net, 3e-3, 1.0, warm_up=3, n_seeds=2)
    optimiser.step_where(loss(net, 0, [0, 1]) * torch.tensor([torch.nan, 1.0]), torch.tensor([False, True]))
    assert all(torch.equal(p[0], old[0]) for p, old in zip(net.parameters(), before, strict=True))
    assert all(torch.isfinite(t).all() for t in (*net.parameters(), *optimiser.state_dict().values()))


def test_steps_together_are_adams_to_the_bit_and_a_count_of_older_versions_is_everybodys() -> None:
    nets = [network([0, 1, 2]) for _ in range(3)]
    one, two, three = Adam(nets[0], 3e-3, 0.5), *(SeparateAdam(net, 3e-3, 0.5, n_seeds=3) for net in nets[1:])
    for i in range(4):
        one.step(loss(nets[0], i, [0, 1, 2]))
        two.step(loss(nets[1], i, [0, 1, 2]))
    copy_state_(three.state_dict(), one.state_dict())
    nets[2].load_state_dict(nets[0].state_dict())
    for i in range(4, 8):
        one.step(loss(nets[0], i, [0, 1, 2]))
        two.step(loss(nets[1], i, [0, 1, 2]))
        three.step(loss(nets[2], i, [0, 1, 2]))
    for a, b, c in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
