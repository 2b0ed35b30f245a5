"""Laws of the temporal U-Net: it is the plain PyTorch network of each seed, and no seed knows of another."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from diffrl.diffusion import classifier_free, drop_condition
from diffrl.nets import seed_generator
from diffrl.nets.temporal import TemporalUNet, TemporalValue
from tests.rounding import assert_equal_to_rounding

F64 = torch.float64
D, D_C, C = 3, 2, 1
ROUNDINGS = 2000.0  # some thirty layers in a row, each a sum of up to 480 products (22 roundings) and a normalisation


def network(seeds: tuple[int, ...] = (0, 1), multipliers: tuple[int, ...] = (1, 2, 3), **settings: Any) -> TemporalUNet:
    """A small network in double precision, its learned nulls away from 0."""
    settings = {"trajectory_features": D_C, "vector_features": C, **settings}
    net = TemporalUNet(D, [seed_generator(s) for s in seeds], width=16, multipliers=multipliers, **settings)
    for seed, name in ((s, n) for s in range(len(seeds)) for n in ("null_trajectory", "null_vector")):
        if (null := getattr(net, name)) is not None:
            null.data[seed] = 0.5 + seeds[seed]
    return net.to(F64)


def inputs(n_seeds: int = 2, batch: int = 2, rows: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, t, a condition trajectory of 5 rows and a condition vector."""
    g = torch.Generator().manual_seed(7)
    shapes = ((rows, D), (), (5, D_C), (C,))
    x, t, trajectory, vector = (torch.randn(n_seeds, batch, *s, generator=g, dtype=F64) for s in shapes)
    return x, t, trajectory, vector


# --- One seed, written with PyTorch's own layers --------------------------------------------------------------------


class Plain:
    """The network of one seed on (B, H, D): `nn.Conv1d`, `nn.GroupNorm`, ... with that seed's weights."""

    def __init__(self, net: TemporalUNet | TemporalValue, seed: int) -> None:
        self.weights = {name: p.detach()[seed] for name, p in net.named_parameters()}
        self.levels = len(net.down)

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        o, i, k = self.weights[f"{name}.weight"].shape
        layer = nn.Conv1d(i, o, k, stride=stride, padding=k // 2, dtype=F64)
        return self.filled(layer, name)(x)

    def norm(self, name: str, x: Tensor) -> Tensor:
        groups = max(g for g in range(1, 9) if x.shape[1] % g == 0 and g in (1, 2, 4, 8))
        return self.filled(nn.GroupNorm(groups, x.shape[1], dtype=F64), name)(x)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def filled(self, layer: nn.Module, name: str) -> nn.Module:
        layer.load_state_dict({key: self.weights[f"{name}.{key}"] for key in ("weight", "bias")})
        return layer

    def mlp(self, name: str, x: Tensor) -> Tensor:
        hidden = functional.mish(self.linear(f"{name}.linears.0", x))
        return self.linear(f"{name}.linears.1", hidden)

    def block(self, name: str, x: Tensor) -> Tensor:
        return functional.mish(self.norm(f"{name}.norm", self.conv(f"{name}.conv", x)))

    def residual(self, name: str, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.block(f"{name}.first", x) + self.linear(f"{name}.shift", functional.mish(embedding))[:, :, None]
        skip = self.conv(f"{name}.skip", x) if f"{name}.skip.weight" in self.weights else x
        return self.block(f"{name}.second", h) + skip

    def attention(self, name: str, x: Tensor, context: Tensor) -> Tensor:
        channels = x.shape[1]
        n = channels // 32 if channels % 32 == 0 else 1
        query = self.linear(f"{name}.query", self.norm(f"{name}.norm", x).mT) + sinusoids(x.shape[2], channels)
        key = self.linear(f"{name}.key", context) + sinusoids(context.shape[1], channels)
        value = self.linear(f"{name}.value", context)
        found = [
            torch.softmax(q @ k.mT / math.sqrt(channels / n), -1) @ v
            for q, k, v in zip(query.chunk(n, -1), key.chunk(n, -1), value.chunk(n, -1), strict=True)
        ]
        return x + self.linear(f"{name}.out", torch.cat(found, -1)).mT

    def level(self, name: str, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        x = self.residual(f"{name}.first", x, embedding)
        x = self.residual(f"{name}.second", x, embedding)
        return self.attention(f"{name}.attention", x, context)

    def __call__(self, x: Tensor, t: Tensor, trajectory: Tensor, vector: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-math.log(1e4) / 7 * torch.arange(8)).to(F64)  # made in single precision
        embedding = self.mlp("time.mlp", torch.cat([angles.sin(), angles.cos()], -1)) + self.mlp("vector", vector)
        context = self.linear("context", trajectory)
        h, kept = x.mT, []
        for i in range(self.levels):
            h = self.level(f"down.{i}", h, embedding, context)
            kept.append(h)
            if i + 1 < self.levels:
                h = self.conv(f"shorten.{i}", h, stride=2)
        h = self.level("middle", h, embedding, context)
        for i in range(self.levels - 1):
            h = self.level(f"up.{i}", torch.cat([h, kept[-1 - i]], 1), embedding, context)
            channels = h.shape[1]
            h = self.filled(nn.ConvTranspose1d(channels, channels, 4, 2, 1, dtype=F64), f"lengthen.{i}")(h)
        return self.conv("out", self.block("last", h)).mT


class PlainValue(Plain):
    """The value network of one seed, on (B, H, D), t (B,)."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-math.log(1e4) / 7 * torch.arange(8)).to(F64)
        embedding, h = self.mlp("time.mlp", torch.cat([angles.sin(), angles.cos()], -1)), x.mT
        for i in range(self.levels):
            h = self.conv(f"shorten.{i}", self.residual(f"down.{i}", h, embedding), stride=2)
        return self.mlp("head", torch.cat([h.mean(-1), functional.mish(embedding)], -1))[:, 0]


def sinusoids(rows: int, size: int) -> Tensor:
    """sin and cos of place / 10000^(2 i / size)."""
    table = [[place / 10_000 ** (2 * i / size) for i in range(size // 2)] for place in range(rows)]
    angles = torch.tensor(table, dtype=F64)
    return torch.cat([angles.sin(), angles.cos()], -1)


@pytest.mark.parametrize("multipliers", [(1, 2, 3), (2,)])
def test_each_seed_is_the_plain_network_with_its_weights(multipliers):
    net, arguments = network(multipliers=multipliers), inputs()
    m = net(*arguments)
    for seed in range(2):
        plain = Plain(net, seed)(*(v[seed] for v in arguments))
        assert_equal_to_rounding(m[seed], plain, ROUNDINGS)


@pytest.mark.parametrize("rows", [1, 7, 8])
def test_each_seeds_value_is_the_plain_networks_with_its_weights(rows):
    """In a stack of two, and alone; at a time a row, and at one for all."""
    stack, alone = (
        TemporalValue(D, [seed_generator(s) for s in seeds], width=16, multipliers=(1, 2, 3)).to(F64)
        for seeds in ((0, 1), (1,))
    )
    x, t, *_ = inputs(rows=rows)
    values = stack(x, t)
    assert values.shape == (2, 2)
    for seed in range(2):
        assert_equal_to_rounding(values[seed], PlainValue(stack, seed)(x[seed], t[seed]), ROUNDINGS)
    assert_equal_to_rounding(alone(x[1:], t[1:])[0], values[1], ROUNDINGS)
    assert_equal_to_rounding(stack(x, t[0, 0])[0, 0], values[0, 0], ROUNDINGS)


def test_the_weights_of_one_seed_change_its_answer_and_gradient_alone():
    net, arguments = network(), inputs()
    before = net(*arguments)
    before[1].square().sum().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is None or (parameter.grad[0] == 0).all(), name
    with torch.no_grad():
        for parameter in net.parameters():
            parameter[1] += 0.1
        after = net(*arguments)
    assert torch.equal(after[0], before[0])
    assert (after[1] != before[1]).any()


def test_the_inputs_of_one_seed_change_its_answer_alone():
    net, arguments = network(), inputs()
    before = net(*arguments)
    for argument in arguments:
        changed = [v.clone() for v in arguments]
        changed[[v is argument for v in arguments].index(True)][1] += 1
        after = net(*changed)
        assert torch.equal(after[0], before[0])
        assert (after[1] != before[1]).any()


def test_a_seed_starts_with_the_same_weights_alone_and_in_a_stack():
    stack, alone = network((0, 1)), network((1,))
    for a, b in zip(stack.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a[1], b[0])


def test_initial_weights_have_the_ranges_of_pytorch_s_layers():
    net = network()
    torch.manual_seed(0)
    for ours, theirs in ((net.out, nn.Conv1d(16, D, 1)), (net.lengthen[0], nn.ConvTranspose1d(32, 32, 4, 2, 1))):
        bound = theirs.bias.abs().max().item()
        for value in (*ours.parameters(),):
            assert value.abs().max() < 1.2 / math.sqrt(16 if ours is net.out else 32 * 4)
        assert 0.5 * bound < ours.bias.abs().max().item() < 2 * bound


@pytest.mark.parametrize("rows", [1, 7, 9])
def test_any_number_of_rows_is_the_network_on_the_last_row_repeated(rows):
    net = network()
    x, *rest = inputs(rows=rows)
    whole = 4 * math.ceil(rows / 4)
    padded = torch.cat([x, *[x[:, :, -1:]] * (whole - rows)], 2)
    m = net(x, *rest)
    assert m.shape == x.shape
    assert_equal_to_rounding(m, net(padded, *rest)[:, :, :rows], ROUNDINGS)


def test_one_time_for_all_is_that_time_in_every_row():
    net = network()
    x, _, *rest = inputs()
    t = torch.tensor(0.3, dtype=F64)
    assert_equal_to_rounding(net(x, t, *rest), net(x, t.expand(2, 2), *rest), ROUNDINGS)


def test_a_dropped_condition_is_the_learned_null():
    net, (x, t, trajectory, vector) = network(), inputs()
    none = net(x, t)
    dropped = drop_condition(trajectory, net.null_trajectory, 1.0, torch.Generator(), event_dims=2)
    without = drop_condition(vector, net.null_vector, 1.0, torch.Generator())
    assert_equal_to_rounding(net(x, t, dropped, without), none, ROUNDINGS)
    # One row's conditions dropped: that row is the null's, the other the condition's.
    noise = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    some = drop_condition(trajectory, net.null_trajectory, 0.5, noise=noise, event_dims=2)
    m, kept = net(x, t, some, vector), net(x, t, trajectory, vector)
    gone = net(x, t, None, vector)
    assert_equal_to_rounding(m, torch.where((noise < 0.5)[..., None, None], gone, kept), ROUNDINGS)
    assert (gone != kept).any()
    m.sum().backward()
    assert (net.null_trajectory.grad != 0).all()


def test_classifier_free_guidance_takes_the_network_and_its_null():
    net, (x, t, trajectory, vector) = network(), inputs()
    guided = classifier_free(net, trajectory, net.null_trajectory, 1.2, event_dims=2)
    m_u, m_c = net(x, t), net(x, t, trajectory)
    assert_equal_to_rounding(guided(x, t), m_u + 1.2 * (m_c - m_u), ROUNDINGS)
    by_return = classifier_free(lambda x, t, c: net(x, t, vector=c), vector, net.null_vector, 2.0, event_dims=2)
    assert_equal_to_rounding(by_return(x, t), 2 * net(x, t, vector=vector) - m_u, 2 * ROUNDINGS)


def test_attention_sees_the_order_of_the_condition():
    net, (x, t, trajectory, _) = network(), inputs()
    assert (net(x, t, trajectory) - net(x, t, trajectory.flip(2))).abs().max() > 1e-6


def test_without_conditions_there_are_none():
    net = network(trajectory_features=None, vector_features=None)
    x, t, trajectory, vector = inputs()
    assert net.null_trajectory is None
    assert net.null_vector is None
    assert net(x, t).shape == x.shape
    with pytest.raises(ValueError, match="no condition trajectory"):
        net(x, t, trajectory)
    with pytest.raises(ValueError, match="no condition vector"):
        net(x, t, None, vector)


@pytest.mark.parametrize("settings", [{"multipliers": ()}, {"kernel": 4}])
def test_settings_no_network_can_have_are_refused(settings):
    with pytest.raises(ValueError, match="need multipliers"):
        network(**settings)


@pytest.mark.slow
def test_compiled_is_eager_with_its_gradients():
    net = network(multipliers=(1, 1), trajectory_features=None, vector_features=None)
    x, t, *_ = inputs(rows=3)
    eager, compiled = net(x, t), torch.compile(net, fullgraph=True)(x, t)
    assert_equal_to_rounding(compiled, eager, ROUNDINGS)
    gradients = [torch.autograd.grad(m.square().sum(), list(net.parameters())) for m in (eager, compiled)]
    largest = max(float(g.abs().max()) for g in gradients[0])
    for ours, theirs in zip(*gradients, strict=True):
        assert_equal_to_rounding(theirs, ours, ROUNDINGS, largest)


@pytest.mark.slow
def test_the_whole_network_is_one_graph():
    """Attention and both conditions too: no step looks at a value or leaves the graph."""
    net, arguments = network(multipliers=(1, 2)), inputs(rows=7)
    traced = torch.compile(net, fullgraph=True, backend="eager")
    assert_equal_to_rounding(traced(*arguments), net(*arguments), ROUNDINGS)
