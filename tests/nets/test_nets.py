"""Mish against PyTorch's, stacks against single networks, Adam against torch.optim, averages by hand."""

import pytest
import torch
import torch.nn.functional as F

from diffrl.nets import (
    MLP,
    Adam,
    ResidualMLP,
    TimeEmbedding,
    average_,
    dropout_mask,
    initialise_fan_average_,
    mish,
    seed_generator,
    seed_norms,
)
from diffrl.nets.mlp import few_products


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_mish_is_mish(dtype: torch.dtype, tolerance: float) -> None:
    x = torch.linspace(-60, 60, 5001, dtype=dtype)
    relative = (mish(x) - F.mish(x)).abs() / F.mish(x).abs().clamp(min=1)
    assert relative.max() < tolerance
    with_grad = x.clone().requires_grad_()
    torch.testing.assert_close(mish(with_grad), F.mish(x), rtol=tolerance * 10, atol=tolerance)


def test_mish_gradient() -> None:
    few = torch.linspace(-30, 30, 101, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mish, few)
    assert torch.autograd.gradcheck(lambda x: mish(x.repeat(50)).view(50, -1)[::10].sum(0), few)
    x = torch.linspace(-30, 30, 5001, dtype=torch.float64, requires_grad=True)
    (ours,) = torch.autograd.grad(mish(x).sum(), x)
    (theirs,) = torch.autograd.grad(F.mish(x).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [101, 5001])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_mish_in_forward_mode(n: int, requires_grad: bool) -> None:
    """On few numbers and many, with a backward pass wanted or not, and under no_grad: the derivative of PyTorch's."""
    x = torch.linspace(-30, 30, n, dtype=torch.float64, requires_grad=True)
    (derivative,) = torch.autograd.grad(F.mish(x).sum(), x)
    direction = torch.randn(n, dtype=torch.float64)
    x = x.detach().requires_grad_(requires_grad)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            value, tangent = torch.func.jvp(mish, (x,), (direction,))
        torch.testing.assert_close(value, F.mish(x), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(tangent, derivative * direction, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.func.grad(lambda x: mish(x).sum())(x), derivative, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("no_grad", [False, True])
def test_networks_in_forward_mode(no_grad: bool) -> None:
    """Stacked layers, layer norm and time embedding, on a small batch and on a large: against central differences."""
    generators = [seed_generator(0), seed_generator(1)]
    mlp = MLP((2,), 5 + 16, 3, generators, width=24, layers=2, layer_norm=True).double()
    embed = TimeEmbedding(2, 16, generators).double()

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return mlp(torch.cat([x, embed(t)], -1))

    for batch in (3, 300):
        (x, dx), (t, dt) = torch.randn(2, 2, batch, 5).double(), torch.rand(2, 2, batch).double()
        with torch.set_grad_enabled(not no_grad):
            value, tangent = torch.func.jvp(network, (x, t), (dx, dt))
        h = 1e-5
        torch.testing.assert_close(value, network(x, t), rtol=1e-12, atol=1e-12)
        difference = (network(x + h * dx, t + h * dt) - network(x - h * dx, t - h * dt)) / (2 * h)
        torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("twins", [(), (2,)])
def test_a_stack_is_its_networks_side_by_side(twins: tuple[int, ...]) -> None:
    seeds = (3, 8)
    stack = MLP((2, *twins), 5, 4, [seed_generator(s) for s in seeds], width=7, layers=2)
    x = torch.randn(2, *twins, 6, 5)
    y = stack(x)
    for i, seed in enumerate(seeds):
        alone = MLP((1, *twins), 5, 4, [seed_generator(seed)], width=7, layers=2)
        torch.testing.assert_close(alone(x[i : i + 1]), y[i : i + 1])


def test_mlp_is_torchs_layers() -> None:
    """Against torch.nn.Linear with the same weights: no transposition, no forgotten bias, no activation at the end."""
    ours = MLP((1,), 5, 3, [seed_generator(0)], width=7, layers=2)
    layers: list[torch.nn.Module] = []
    for linear in ours.linears:
        theirs = torch.nn.Linear(*linear.weight.shape[1:])
        theirs.weight.data, theirs.bias.data = linear.weight[0].T.detach(), linear.bias[0, 0].detach()
        layers += [theirs, torch.nn.Mish()]
    x = torch.randn(1, 6, 5)
    torch.testing.assert_close(ours(x), torch.nn.Sequential(*layers[:-1])(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("after", [False, True])
def test_layer_norm_is_torchs_for_every_network_of_the_stack(after: bool) -> None:
    """Before the activation, or after it."""
    generators = [seed_generator(0), seed_generator(1)]
    stack = MLP((2,), 5, 3, generators, width=7, layers=1, layer_norm=True, norm_after=after)
    for parameter in stack.norms.parameters():
        parameter.data = torch.randn_like(parameter)
    x = torch.randn(2, 6, 5)
    hidden, last, norm = stack.linears[0](x), stack.linears[1], stack.norms[0]
    for i in range(2):
        before = F.mish(hidden[i]) if after else hidden[i]
        normed = F.layer_norm(before, (7,), norm.weight[i, 0], norm.bias[i, 0])
        expected = (normed if after else F.mish(normed)) @ last.weight[i] + last.bias[i]
        torch.testing.assert_close(stack(x)[i], expected, rtol=1e-4, atol=1e-5)


def test_weights_by_the_average_of_the_fans_are_torchs_xavier_seed_by_seed() -> None:
    """U(-b, b) with b = sqrt(6 / (in + out)): the bound is reached to a hundredth, the variance is b^2 / 3 to five
    standard deviations; biases 0; a seed has the same weights alone and in a stack of twins."""
    stack = MLP((2, 2), 60, 1, [seed_generator(3), seed_generator(8)], width=40, layers=1, layer_norm=True)
    initialise_fan_average_(stack, [seed_generator(3), seed_generator(8)])
    for linear, (i, o) in zip(stack.linears, ((60, 40), (40, 1)), strict=True):
        bound, n = (6 / (i + o)) ** 0.5, 4 * i * o
        assert linear.weight.shape == (2, 2, i, o)
        assert not linear.bias.any()
        assert 0.9 * bound < linear.weight.abs().max() <= bound
        # The square of U(-b, b) has the deviation sqrt(4/45) b^2.
        assert abs(linear.weight.square().mean() - bound**2 / 3) < 5 * bound**2 * (4 / 45 / n) ** 0.5
        assert abs(linear.weight.mean()) < 5 * bound * (1 / 3 / n) ** 0.5
    assert torch.equal(stack.norms[0].weight, torch.ones(2, 2, 1, 40))
    alone = MLP((1, 2), 60, 1, [seed_generator(0)], width=40, layers=1)
    initialise_fan_average_(alone, [seed_generator(8)])
    assert all(torch.equal(a.weight[0], b.weight[1]) for a, b in zip(alone.linears, stack.linears, strict=True))


@pytest.mark.parametrize("dropout", [False, True])
def test_residual_mlp_is_its_blocks_written_out(dropout: bool) -> None:
    """h + W_2 mish(W_1 norm(keep h)), block by block: only the branch is dropped out, before its norm."""
    net = ResidualMLP((2,), 5, 3, [seed_generator(0), seed_generator(1)], width=8, blocks=2)
    for parameter in net.norms.parameters():
        parameter.data = torch.randn_like(parameter)
    x = torch.randn(2, 6, 5)
    keep = dropout_mask((2, 2, 6, 8), 0.5, torch.Generator().manual_seed(0)) if dropout else None
    y = net(x, keep)
    for i in range(2):
        h = x[i] @ net.first.weight[i] + net.first.bias[i]
        for j, (norm, widen, narrow) in enumerate(zip(net.norms, net.widen, net.narrow, strict=True)):
            branch = h if keep is None else keep[j, i] * h
            branch = F.layer_norm(branch, (8,), norm.weight[i, 0], norm.bias[i, 0])
            branch = F.mish(branch @ widen.weight[i] + widen.bias[i])
            assert branch.shape[-1] == 32
            h = h + branch @ narrow.weight[i] + narrow.bias[i]
        expected = F.mish(h) @ net.last.weight[i] + net.last.bias[i]
        torch.testing.assert_close(y[i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.7])
def test_dropout_has_its_rate_and_mean_one(rate: float) -> None:
    """Over 200,000 factors, of which a share `rate` is 0: to five standard deviations."""
    n = 200_000
    keep = dropout_mask((n // 4, 4), rate, torch.Generator().manual_seed(0))
    assert keep.shape == (n // 4, 4)
    values = keep.unique()
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / (1 - rate)] if rate else [1.0]))
    noise = (rate * (1 - rate) / n) ** 0.5
    assert abs((keep == 0).float().mean() - rate) <= 5 * noise
    assert abs(keep.mean() - 1) <= 5 * noise / (1 - rate) + 1e-6
    assert torch.equal(keep, dropout_mask((n // 4, 4), rate, torch.Generator().manual_seed(0)))


def test_adams_rate_falls_along_torchs_cosine_and_stays_at_nothing() -> None:
    x, target, steps = torch.randn(1, 9, 4), torch.randn(1, 9, 2), 7
    ours, theirs = (MLP((1,), 4, 2, [seed_generator(0)], width=8, layers=1) for _ in range(2))
    adam = Adam(ours, 1e-2, decay_steps=steps)
    reference = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(reference, steps)
    for _ in range(steps):
        adam.step((ours(x) - target).square().mean((1, 2)))
        reference.zero_grad()
        (theirs(x) - target).square().mean().backward()
        reference.step()
        schedule.step()
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    before = [p.clone() for p in ours.parameters()]
    for _ in range(3):
        adam.step((ours(x) - target).square().mean((1, 2)))
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))


def test_adams_rate_rises_in_equal_parts_over_its_warm_up() -> None:
    """With a gradient that does not change, Adam's step is its rate: 1/4, 2/4, 3/4 of it, then all."""
    net = MLP((1,), 1, 1, [seed_generator(0)], width=1, layers=0)
    adam, x = Adam(net, 1e-2, warm_up=4), torch.ones(1, 1, 1)
    for share in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0):
        before = float(net(x).detach())
        adam.step(net(x).sum((1, 2)))
        assert before - float(net(x).detach()) == pytest.approx(2 * 1e-2 * share, rel=1e-3)  # of weight and bias


def test_adams_rate_is_where_its_counter_is_also_after_a_restart() -> None:
    """The rate follows the optimiser's own steps: of a state that is loaded, from where it stood."""
    x, target = torch.randn(1, 9, 4), torch.randn(1, 9, 2)
    nets = [MLP((1,), 4, 2, [seed_generator(0)], width=8, layers=1) for _ in range(2)]
    first, second = (Adam(net, 1e-2, decay_steps=10) for net in nets)
    for _ in range(4):
        first.step((nets[0](x) - target).square().mean((1, 2)))
    nets[1].load_state_dict(nets[0].state_dict())
    for name, value in second.state_dict().items():
        value.copy_(first.state_dict()[name])
    for adam, net in ((first, nets[0]), (second, nets[1])):
        for _ in range(4):
            adam.step((net(x) - target).square().mean((1, 2)))
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_time_embedding_of_a_scalar_is_that_of_every_row() -> None:
    embed = TimeEmbedding(2, 16, [seed_generator(0), seed_generator(1)])
    t = torch.tensor(1.7)
    rows = embed(t.expand(2, 5))
    assert rows.shape == (2, 5, 16)
    torch.testing.assert_close(embed(t).expand(2, 5, 16), rows)
    assert not torch.allclose(embed(t), embed(t + 0.5))


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_adam_is_torchs_with_a_norm_clipped_seed_by_seed(seeds: tuple[int, ...], clip: float, fused: bool) -> None:
    x, target = torch.randn(len(seeds), 9, 4), torch.randn(len(seeds), 9, 2)
    ours = MLP((len(seeds),), 4, 2, [seed_generator(s) for s in seeds], width=8, layers=1)
    adam = Adam(ours, 1e-2, clip)
    if fused:
        adam.fuse(lambda step: step)
    for _ in range(5):
        norms = adam.step((ours(x) - target).square().mean((1, 2)))
    for i, seed in enumerate(seeds):
        theirs = MLP((1,), 4, 2, [seed_generator(seed)], width=8, layers=1)
        reference = torch.optim.Adam(theirs.parameters(), lr=1e-2)
        for _ in range(5):
            reference.zero_grad()
            (theirs(x[i : i + 1]) - target[i : i + 1]).square().mean().backward()
            limit = clip if clip else float("inf")
            norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), limit)
            reference.step()
        torch.testing.assert_close(norms[i], norm, rtol=1e-4, atol=1e-6)
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a[i], b[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", [{}, {"decay_steps": 20}, {"decay_steps": 20, "warm_up": 5}])
def test_adam_written_out_is_the_same_adam(schedule: dict[str, int]) -> None:
    """`plain_step`, which a GPU compiles whole, and torch's fused one: weights, moments, counters, norms; float64."""
    x, target = torch.randn(3, 5, 4, dtype=torch.float64), torch.randn(3, 5, 2, dtype=torch.float64)
    nets = [MLP((3,), 4, 2, [seed_generator(s) for s in range(3)], width=8, layers=2).double() for _ in range(2)]
    fused, plain = (Adam(net, 1e-2, 0.02, **schedule) for net in nets)
    plain.fuse(lambda step: torch.compile(step, fullgraph=True, backend="aot_eager"))
    for _ in range(15):
        norms = [
            adam.step((net(x) - target).square().mean((1, 2))) for adam, net in zip((fused, plain), nets, strict=True)
        ]
        torch.testing.assert_close(*norms)
    assert norms[0].min() > 0.02  # clipped
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], value)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("stack", "size_in", "size_out"), [((3,), 2, 50), ((3,), 50, 2), ((3, 2), 50, 1), ((2,), 4, 3)]
)
def test_few_products_are_the_matrix_product(stack: tuple[int, ...], size_in: int, size_out: int) -> None:
    x = torch.randn(*stack, 7, size_in, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(*stack, size_in, size_out, dtype=torch.float64, requires_grad=True)
    ours, plain = few_products(x, weight), x @ weight
    torch.testing.assert_close(ours, plain)
    upstream = torch.randn_like(plain)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), upstream) for y in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b)


def test_adam_leaves_other_networks_without_gradients() -> None:
    first, second = (MLP((1,), 3, 3, [seed_generator(s)], width=4, layers=1) for s in (0, 1))
    Adam(first, 1e-3).step(second(first(torch.randn(1, 5, 3))).square().mean((1, 2)))
    assert all(p.grad is None for p in second.parameters())


def test_seed_norms_are_the_joint_norms() -> None:
    tensors = [torch.randn(3, 4, 5), torch.randn(3, 1, 5)]
    expected = torch.stack([torch.cat([t[i].flatten() for t in tensors]).norm() for i in range(3)])
    torch.testing.assert_close(seed_norms(tensors), expected)
    torch.testing.assert_close(seed_norms([t[:1] for t in tensors]), expected[:1])


@pytest.mark.parametrize("as_tensor", [False, True])
def test_average_moves_towards_the_online_network(as_tensor: bool) -> None:
    target, online = (MLP((1,), 2, 2, [seed_generator(s)], width=3, layers=1) for s in (0, 1))
    before = [p.clone() for p in target.parameters()]
    average_(target, online, torch.tensor(0.25) if as_tensor else 0.25)
    for old, new, source in zip(before, target.parameters(), online.parameters(), strict=True):
        torch.testing.assert_close(new, 0.75 * old + 0.25 * source)
