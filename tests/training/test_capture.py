"""What a CUDA graph needs of a training step, checked where there is no GPU; and the graphs themselves where there is.

A captured step is a recording of kernels on fixed memory, repeated blindly. `Tape` is that on a CPU: the operations of
one step, repeated with no Python of ours running. A step that branches on a counter, keeps a number on the side or puts
a state into a new tensor ends elsewhere than eagerly.
"""

import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import diffrl
from agents import AGENTS, RLPD, AgentConfig
from diffrl.data.replay import MixedSource, ReplayBuffer
from diffrl.support.errors import UserError
from diffrl.support.machine import products
from diffrl.training import checkpoint
from diffrl.training.stack import Captured, StackTrainer
from tests.training.conftest import AGENT, assert_same_run, final_state, tiny
from tests.training.subjects import CONFIGS, binned, distilled, improving, pairs, trainer, transitions, tuned

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

OTHERS = pytest.mark.parametrize("make", [binned, pairs, tuned, distilled, improving])
"""Of learners whose batches are not transitions alone, or that no configuration of `CONFIGS` builds."""


def snapshot(trainer: StackTrainer[Any]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.state().items()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def advance(trainer: StackTrainer[Any], steps: int) -> None:
    while steps:
        steps -= trainer.advance(steps, lambda: False)


class Tape(TorchDispatchMode):
    """A `CUDAGraph` of the CPU: the operations of a step with the very tensors they worked on, to be repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self.generators: list[torch.Generator] = []

    def register_generator_state(self, generator: torch.Generator) -> None:
        self.generators.append(generator)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, tree_flatten(result)[0]))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self.calls:
            for output, again in zip(outputs, tree_flatten(func(*args, **kwargs))[0], strict=True):
                if isinstance(output, Tensor) and output.data_ptr() != again.data_ptr():
                    output.copy_(again)


class Taped:
    """A trainer whose steps are `Captured`, with tapes in the place of graphs. Counts what it records."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, eager: StackTrainer[Any]) -> None:
        self.trainer = eager
        self.recorded = 0
        self.pools: list[tuple[int, int]] = []
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, stand_in in {
            "Stream": lambda device: stream,
            "current_stream": lambda: stream,
            "stream": lambda stream: nullcontext(),
            "device": lambda device: nullcontext(),
            "CUDAGraph": Tape,
            "graph": self.record,
            "graph_pool_handle": lambda: (0, self.recorded),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        self.trainer._make_step = Captured(self.trainer.step, self.trainer._generator, self.trainer.learner.period)

    @contextmanager
    def record(self, tape: Tape, stream: Any, pool: tuple[int, int]) -> Iterator[None]:
        """A capture executes nothing: what the recorded step did is undone, also to registered generators."""
        self.recorded += 1
        self.pools.append(pool)
        live = {name: tensor for name, tensor in self.trainer.state().items() if name != "generator"}
        before = {name: tensor.clone() for name, tensor in live.items()}
        states = [generator.get_state() for generator in tape.generators]
        with tape:
            yield
        for name, tensor in live.items():
            tensor.copy_(before[name])
        for generator, state in zip(tape.generators, states, strict=True):
            generator.set_state(state)


@pytest.mark.long
@pytest.mark.parametrize("n_seeds", [1, 3])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.name}-{config.layers}")
def test_a_recorded_step_repeated_blindly_is_training(
    config: AgentConfig, n_seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, taped = trainer(config, n_seeds), Taped(monkeypatch, trainer(config, n_seeds))
    for each in (eager, taped.trainer):
        advance(each, 12)
    assert taped.recorded == eager.learner.period
    assert len(set(taped.pools)) == 1  # which all graphs share
    assert_equal(snapshot(eager), snapshot(taped.trainer))


@pytest.mark.long
@OTHERS
@pytest.mark.parametrize("n_seeds", [1, 3])
def test_a_recorded_step_is_training_whatever_a_batch_is(
    make: Callable[..., StackTrainer[Any]], n_seeds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, taped = make(n_seeds), Taped(monkeypatch, make(n_seeds))
    for each in (eager, taped.trainer):
        advance(each, 23)
    assert taped.recorded == eager.learner.period
    assert_equal(snapshot(eager), snapshot(taped.trainer))


def test_a_replay_buffer_may_grow_between_recorded_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded draw reads how full the buffer is when it is repeated, not when it was recorded."""
    data = transitions("cpu")

    def online() -> tuple[StackTrainer[Any], ReplayBuffer]:
        agent = RLPD(width=8, layers=1, batch_size=4, actor_every=3).build(3, 2, (0, 1), "cpu")
        buffer = ReplayBuffer(2, 20, 3, 2)
        source = MixedSource([data, buffer], [0.5, 0.5])
        return StackTrainer(agent, source, 4, torch.Generator().manual_seed(1)), buffer

    (eager, of_eager), (recorded, of_recorded) = online(), online()
    taped = Taped(monkeypatch, recorded)
    for subject, buffer in ((eager, of_eager), (taped.trainer, of_recorded)):
        for row in range(30):
            buffer.add(data.rows[row : row + 1].expand(2, 1, 12))
            advance(subject, 3)
    assert taped.recorded == 3
    assert_equal(snapshot(eager), snapshot(taped.trainer))


def test_the_tape_tells_a_step_that_is_not_static(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that puts its counter into a new tensor ends elsewhere when it is repeated blindly."""
    config = CONFIGS[0]
    eager, taped = trainer(config), Taped(monkeypatch, trainer(config))
    update = type(eager.learner).update

    def rebinding(self: Any, batch: Any, generator: torch.Generator, phase: int) -> Any:
        result = update(self, batch, generator, phase)
        self.step = self.step + 1
        return result

    monkeypatch.setattr(type(eager.learner), "update", rebinding)
    for each in (eager, taped.trainer):
        advance(each, 12)
    with pytest.raises(AssertionError, match=r"learner\.step"):
        assert_equal(snapshot(eager), snapshot(taped.trainer))


def test_a_recording_survives_checkpoints_resets_and_a_seed_that_is_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that happens between steps happens in place: a recording stays valid, and is made anew for a frozen seed."""
    config = CONFIGS[-1]
    eager, taped = trainer(config, 3), Taped(monkeypatch, trainer(config, 3))
    for each in (eager, taped.trainer):
        advance(each, 5)
        saved = snapshot(each)
        advance(each, 4)
        each.load(saved, 5)
        advance(each, 3)
        each.reset()
        advance(each, 2)
        each.hold([1], {n.removeprefix("learner."): t for n, t in saved.items() if n.startswith("learner.")})
        advance(each, 6)
    assert taped.recorded == 2
    assert len(set(taped.pools)) == 2  # a pool anew for a graph anew
    assert_equal(snapshot(eager), snapshot(taped.trainer))
    name = "learner.critic.mlp.linears.0.weight"
    assert torch.equal(eager.state()[name][1], saved[name][1])
    assert not torch.equal(eager.state()[name][0], saved[name][0])


def test_a_step_that_cannot_be_captured_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    taped = Taped(monkeypatch, trainer(CONFIGS[0]))
    advance(taped.trainer, 3)

    def waiting(phase: int) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore lines")

    monkeypatch.setattr(taped.trainer._make_step, "_step", waiting)
    with pytest.raises(UserError, match=r"not permitted when stream is capturing.*--no-capture"):
        advance(taped.trainer, 1)


def test_a_seed_that_is_frozen_stays_whatever_becomes_of_it() -> None:
    """NaN does not leak through the mask, and the other seeds do not notice."""
    config = AGENTS["bc"](width=8, layers=1, batch_size=4)
    alone, beside = trainer(config, 3), trainer(config, 3)
    for each in (alone, beside):
        advance(each, 3)
    good = {n.removeprefix("learner."): t for n, t in snapshot(beside).items() if n.startswith("learner.")}
    with torch.no_grad():
        beside.learner.state_dict()["actor.linears.0.weight"][1].fill_(float("nan"))
    beside.hold([1], good)
    for each in (alone, beside):
        advance(each, 5)
    for name, tensor in beside.learner.state_dict().items():
        if tensor.ndim:
            assert torch.equal(tensor[1], good[name][1]), name
            assert torch.equal(tensor[::2], alone.learner.state_dict()[name][::2]), name


SYNCHRONISE = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere",
    "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount", "repeat_interleave.Tensor",
}  # fmt: skip
"""Operations that wait for the device, since they need values on the host."""


class Waits(TorchDispatchMode):
    """Notes operations that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if name.split(".")[0] in SYNCHRONISE or name in SYNCHRONISE:
            self.found.append(name)
        if name.startswith(("index", "_index")):
            masks = [t for t in tree_flatten(args)[0] if isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8)]
            self.found += [f"{name} by a mask"] * bool(masks and "index_select" not in name)
        return func(*args, **(kwargs or {}))


class HostTensors(TorchFunctionMode):
    """Notes tensors made of Python numbers or without a device: on a GPU, copies that wait, or tensors out of place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray):
            self.found.append(f"{func.__name__} of host data")
        elif func in _device_constructors() and kwargs.get("device") is None:
            self.found.append(f"{func.__name__} without a device")
        elif func in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            self.found.append(func.__name__)
        elif func in (Tensor.__getitem__, Tensor.__setitem__):
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.found += ["an index by a list"] * any(isinstance(index, list) for index in indices)
        return func(*args, **kwargs)


@contextmanager
def watched() -> Iterator[list[str]]:
    """What a GPU would have to wait for while the block runs."""
    found: list[str] = []
    with Waits() as waits, HostTensors() as made:
        yield found
    found += waits.found + made.found


@pytest.mark.long
@pytest.mark.parametrize("n_seeds", [1, 3])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.name}-{config.layers}")
def test_a_step_waits_for_no_device_and_keeps_every_state_in_its_place(config: AgentConfig, n_seeds: int) -> None:
    check_static(trainer(config, n_seeds))


@OTHERS
@pytest.mark.parametrize("n_seeds", [1, 3])
def test_a_step_waits_for_no_device_whatever_a_batch_is(make: Callable[..., StackTrainer[Any]], n_seeds: int) -> None:
    check_static(make(n_seeds))


def check_static(subject: StackTrainer[Any]) -> None:
    advance(subject, 1)
    if subject.learner.n_seeds > 1:
        subject.hold([1], subject.learner.state_dict())
    places = {name: tensor.data_ptr() for name, tensor in subject.state().items() if name != "generator"}
    with watched() as found:
        for step in range(1, 4):
            subject.step(step % subject.learner.period)
    assert not found
    assert places == {name: tensor.data_ptr() for name, tensor in subject.state().items() if name != "generator"}


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: bool(x.sum() > 0),
        lambda x: x.max().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x * torch.tensor([1.0, 2.0, 3.0]),
        lambda x: x + torch.ones(3),
        lambda x: x.unique(),
        lambda x: x[[0, 2]],
        lambda x: x.tolist(),
    ],
)
def test_the_watch_sees_what_it_is_for(wait: Callable[[Tensor], Any]) -> None:
    x = torch.randn(3)
    with watched() as found:
        wait(x)
    assert found


def on_gpu(config: AgentConfig, n_seeds: int, steps: int, capture: bool) -> dict[str, Tensor]:
    subject = trainer(config, n_seeds, "cuda", capture)
    advance(subject, steps)
    return snapshot(subject)


@needs_gpu
@pytest.mark.parametrize("n_seeds", [1, 8])
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"{config.name}-{config.layers}")
def test_captured_steps_are_the_eager_ones(config: AgentConfig, n_seeds: int) -> None:
    """The same kernels on the same numbers: equal, but for reductions whose order a GPU leaves open."""
    eager, captured = (on_gpu(config, n_seeds, 50, capture) for capture in (False, True))
    assert torch.equal(eager["generator"], captured["generator"])
    assert int(captured["learner.step"]) == 50
    for name in eager:
        torch.testing.assert_close(captured[name], eager[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: n + text)


@needs_gpu
@OTHERS
def test_captured_steps_are_the_eager_ones_whatever_a_batch_is(make: Callable[..., StackTrainer[Any]]) -> None:
    eager, captured = make(3, "cuda", False), make(3, "cuda", True)
    for each in (eager, captured):
        advance(each, 50)
    expected = snapshot(eager)
    for name, found in snapshot(captured).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: n + text)


@needs_gpu
def test_compiled_losses_are_captured_too() -> None:
    config = CONFIGS[-1]
    subject = trainer(config, 2, "cuda", capture=True)
    subject.learner.compile()  # type: ignore[attr-defined]
    advance(subject, 50)
    for name, expected in on_gpu(config, 2, 50, capture=False).items():
        torch.testing.assert_close(subject.state()[name], expected, rtol=1e-2, atol=1e-3)


@needs_gpu
@pytest.mark.usefixtures("own_data")
def test_a_captured_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    config = tiny(tmp_path / "straight", device="cuda")
    straight = diffrl.train(config, quiet=True)
    run = diffrl.train(dataclasses.replace(config, out=tmp_path / "halves", steps=100), quiet=True)
    diffrl.resume(run, steps=200, quiet=True)
    assert_same_run(straight, run)


@needs_gpu
@pytest.mark.usefixtures("own_data")
def test_a_seed_is_frozen_under_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Poisoned by a tensor's value, as a recording needs it: in the step after the 110th of seed 0."""
    from agents.diffusion_ql import DiffusionQLAgent

    update = DiffusionQLAgent.update

    def poisoned(self, batch, generator, phase):  # type: ignore[no-untyped-def]
        batch.rewards[0] += torch.where(self.step == 110, torch.inf, 0.0)
        return update(self, batch, generator, phase)

    straight = diffrl.train(tiny(tmp_path / "straight", device="cuda"), quiet=True)
    monkeypatch.setattr(DiffusionQLAgent, "update", poisoned)
    run = diffrl.train(tiny(tmp_path / "run", AGENT, device="cuda"), quiet=True)
    name = "learner.actor.mlp.linears.0.weight"
    held, whole = final_state(run)[name], final_state(straight)[name]
    assert torch.equal(held[0], checkpoint.load(run, 100).tensors[name][0])
    torch.testing.assert_close(held[1], whole[1], rtol=1e-4, atol=1e-5)
    assert checkpoint.load(run, 200).info["frozen"] == [0]


@pytest.mark.long
def test_no_step_leaves_a_tensor_behind() -> None:
    subject = trainer(CONFIGS[-1], 2)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    advance(subject, 20)
    before = tensors()
    advance(subject, 100)
    assert tensors() <= before


@needs_gpu
def test_no_step_leaves_gpu_memory_behind() -> None:
    subject = trainer(CONFIGS[-1], 2, "cuda", capture=True)
    advance(subject, 20)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    advance(subject, 200)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize(("device", "tf32", "expected"), [("cuda:0", True, "high"), ("cuda", False, "highest")])
def test_products_are_rounded_to_tf32_where_they_are_to_be(device: str, tf32: bool, expected: str) -> None:
    """A run says either way, so that one run's choice does not stay for the next one of a process."""
    before = torch.get_float32_matmul_precision()
    try:
        for start in ("highest", "high"):
            torch.set_float32_matmul_precision(start)
            with products("cpu", not tf32):
                assert torch.get_float32_matmul_precision() == start
            with products(device, tf32):
                assert torch.get_float32_matmul_precision() == expected
            assert torch.get_float32_matmul_precision() == start
    finally:
        torch.set_float32_matmul_precision(before)
