"""What a caller set of torch, default dtype, no_grad, inference_mode or autocast, changes no training and no acting."""

import contextlib
import filecmp
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import diffrl
from diffrl.augment.synther.augmenter import synther
from diffrl.augment.synther.config import Sampling, SynthERConfig
from diffrl.images import FinetuneConfig, finetune
from diffrl.support.machine import usual_torch
from tests.runs.made_runs import MAZE, made_run, observations_of, small, trained_run

State = Callable[[], contextlib.AbstractContextManager[object]]


@contextlib.contextmanager
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def half() -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cpu", torch.bfloat16)


STATES = pytest.mark.parametrize("state", [double, torch.no_grad, torch.inference_mode, half])


def found() -> tuple[torch.dtype, bool, bool]:
    return torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()


@STATES
def test_the_callers_state_comes_back_after_an_error_too(state: State) -> None:
    with state():
        before = found()
        with contextlib.suppress(KeyError), usual_torch():
            assert found() == (torch.float32, True, False)
            raise KeyError
        assert found() == before


def test_blocks_of_threads_that_overlap_give_the_callers_type_back_with_the_last() -> None:
    """And each sees float32 to its end, also where the block that was entered first is left first."""
    entered, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with torch.no_grad(), usual_torch():
            entered.set()
            leave.wait(10)
            seen.append(torch.get_default_dtype())

    with double():
        thread = threading.Thread(target=other)
        with usual_torch():
            thread.start()
            assert entered.wait(10)
        seen.append(torch.get_default_dtype())
        leave.set()
        thread.join()
        assert seen == [torch.float32, torch.float32]
        assert torch.get_default_dtype() == torch.float64


@STATES
@pytest.mark.parametrize("name", ["diffusion_ql", "q_guidance", "fql", "diffuser", "consistency_ac"])
def test_a_policy_acts_the_same(tmp_path: Path, name: str, state: State) -> None:
    run = made_run(tmp_path / "run", small(name), MAZE)
    observations = observations_of(run)
    expected = diffrl.load_policy(run)(observations)
    assert expected.dtype == np.float32
    before = diffrl.load_policy(run)
    with state():
        for policy in (before, diffrl.load_policy(run)):
            actions = policy(observations)
            assert actions.dtype == np.float32
            np.testing.assert_array_equal(actions, expected)


@STATES
def test_runs_evaluations_and_synthesis_are_the_same(tmp_path: Path, own_data: Path, state: State) -> None:
    def made(out: Path) -> tuple[Path, object, Path, Path]:
        run = trained_run(out / "run", small("diffusion_ql"), steps=10, workers=1, eval_workers=0)
        scores = diffrl.evaluate(run, episodes=1, which="last", max_episode_steps=4, quiet=True)
        diffrl.resume(run, steps=12, quiet=True)
        model = SynthERConfig(width=16, steps=3, batch_size=8)
        rows = synther(
            "maze2d-umaze-v1", out / "new.hdf5", rows=500, samples=50, model=model,
            sampling=Sampling(sampling_steps=2), report=False, quiet=True,
        )  # fmt: skip
        online = diffrl.online(run, steps=4, warm_up=1, eval_every=4, out=out / "online", quiet=True)
        return run, scores, rows, online

    run, scores, rows, online = made(tmp_path / "usual")
    with state():
        again = made(tmp_path / "unusual")
    assert again[1] == scores
    assert filecmp.cmp(rows, again[2], shallow=False)
    for ours, theirs, last in ((run, again[0], "12"), (online, again[3], "4")):
        (weights,) = ours.glob(f"checkpoints/*{last}/*.safetensors")
        assert filecmp.cmp(weights, theirs / weights.relative_to(ours), shallow=False)


@STATES
def test_a_run_of_images_is_the_same(tmp_path: Path, state: State) -> None:
    def made(out: Path) -> list[dict[str, float]]:
        config = FinetuneConfig(model="tiny-digits", queries=8, batch=8, updates=1, steps=2, eval_samples=2, out=out)
        found = json.loads((finetune(config, quiet=True) / "evaluations.json").read_text())
        return [{key: value for key, value in one.items() if key != "seconds"} for one in found]

    expected = made(tmp_path / "usual")
    with state():
        assert made(tmp_path / "unusual") == expected


@pytest.mark.parametrize(("model", "reward"), [("tiny-digits", "digit:8"), ("tiny-emoji", "emoji-clip")])
def test_a_run_of_images_leaves_torchs_generator_as_it_was(tmp_path: Path, model: str, reward: str) -> None:
    config = FinetuneConfig(
        model=model, reward=reward, queries=8, batch=8, updates=1, steps=2, eval_samples=2, out=tmp_path / "run"
    )
    before = torch.get_rng_state()
    finetune(config, quiet=True)
    assert torch.equal(torch.get_rng_state(), before)
