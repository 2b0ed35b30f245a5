"""Several processes: they hold the same, and the same as one process does."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch

from diffrl.images.config import FinetuneConfig
from diffrl.images.job import _Session
from diffrl.images.launch import together
from diffrl.images.world import LostProcess
from diffrl.support.errors import UserError
from diffrl.support.stopping import Stopped, ended_by_stop, stop_signals
from tests.images import newer
from tests.images.two_processes import record

ROOT = Path(__file__).parents[2]


def launch(processes: int, words: list[str], cache: Path, code: int = 0) -> str:
    """Run `words` of Python in some processes, by gloo on the CPU; what they say. They are to end with `code`."""
    command = [sys.executable, *(["-m", "diffrl.images.launch", str(processes)] if processes > 1 else [])]
    environment = {**os.environ, "DIFFRL_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


@pytest.mark.long
@pytest.mark.parametrize("algo", ["ddpo-is", pytest.param("d3po", marks=pytest.mark.slow)])
def test_two_processes_are_one(algo: str, cache: Path, quick: Path) -> None:
    """After three updates by gloo both have equal gradients and parameters, to the bit, and one process's to rounding.

    Saving does not hang; the run's evaluations, of images that both sampled, are one process's too.
    """
    record(algo, quick)
    launch(2, [str(ROOT / "tests/images/two_processes.py"), algo, str(quick)], cache)
    alone, first, second = (safetensors.torch.load_file(quick / f"{n}.st") for n in ("1-0", "2-0", "2-1"))
    assert any(name.startswith("3.gradient") for name in first)
    assert set(alone) == set(first) == set(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        scale = float(alone[name].abs().max())
        if ".gradient." in name:
            torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-3 * scale + 1e-9)
    one, two = (json.loads((quick / f"run-of-{n}/evaluations.json").read_text()) for n in (1, 2))
    for measure in ("reward", "diversity", "reference_error", "class_accuracy"):
        assert two[0][measure] == pytest.approx(one[0][measure], rel=1e-5)
    assert (quick / "run-of-2/model/model_index.json").exists()
    assert [p.name for p in sorted((quick / "run-of-2/checkpoints").iterdir())] == ["000000000", "000000001"]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch": 4, "eval_samples": 4}, None),
        ({"batch": 5, "eval_samples": 4}, "--shard has 2 processes"),
        ({"batch": 4, "eval_samples": 5}, "--shard has 2 processes"),
        ({"algo": "d3po", "batch": 12, "group": 4, "eval_samples": 4}, "--shard has 2 processes"),
        ({"algo": "dpo", "batch": 4, "group": 4, "queries": 20, "eval_samples": 4}, "--shard has 2 processes"),
        ({"algo": "dpo", "batch": 4, "group": 4, "queries": 16, "eval_samples": 4}, None),
    ],
)
def test_shards_need_equal_shares(settings: dict[str, Any], said: str | None) -> None:
    """Where one process called the network more often than the other, both would wait for ever."""
    config = FinetuneConfig(model="some/pipeline", lora=2, shard=True, updates=1, **settings)
    session: Any = SimpleNamespace(config=config, world=SimpleNamespace(size=2))
    with nullcontext() if said is None else pytest.raises(UserError, match=said):
        _Session._check_shares(session)


@pytest.mark.slow
@pytest.mark.parametrize(("algo", "shard"), [("nft", False), ("grpo", True), ("nft", True)])
def test_two_processes_of_a_transformer_are_one(algo: str, shard: bool, cache: Path, tmp_path: Path) -> None:
    """A tiny FLUX with adapters and two scaled rewards: as above; shard: its frozen weights by FSDP, a half each."""
    folder = newer.save_flux(tmp_path / "flux")
    (folder / "prompts.txt").write_text("a cat\nthe dog\n")
    record(algo, tmp_path, str(folder))
    words = [str(ROOT / "tests/images/two_processes.py"), algo, str(tmp_path), str(folder)]
    said = launch(2, [*words, "--shard"] if shard else words, cache)
    assert "view tensor" not in said  # FSDP's warning, of what no network here does
    alone, first, second = (safetensors.torch.load_file(tmp_path / f"{n}.st") for n in ("1-0", "2-0", "2-1"))
    assert any(name.startswith("3.parameter") for name in first)
    assert set(alone) == set(first) == set(second)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        if ".gradient." in name:
            scale = float(alone[name].abs().max())
            torch.testing.assert_close(value, alone[name], rtol=1e-3, atol=1e-3 * scale + 1e-9)
    assert max(float(value.abs().max()) for name, value in first.items() if name.startswith("3.gradient")) > 0
    saved = safetensors.torch.load_file(tmp_path / "run-of-2/model/pytorch_lora_weights.safetensors")
    for name, value in saved.items():
        layer = name.removeprefix("transformer.").replace(".weight", ".default.weight")
        assert torch.equal(value, first[f"3.parameter.{layer}"]), name


@pytest.mark.slow
def test_processes_from_the_command_line(cache: Path, tmp_path: Path) -> None:
    """`--processes 2` starts them itself, and a mistake in them is a line, with its exit code."""
    words = ["-m", "diffrl.cli", "finetune", "--model", "tiny-digits", "--queries", "16", "--batch", "8"]
    words += ["--steps", "2", "--eval-samples", "4"]
    launch(1, [*words, "--processes", "2", "--out", str(tmp_path / "run")], cache)
    assert json.loads((tmp_path / "run/evaluations.json").read_text())[-1]["queries"] == 16
    said = launch(1, [*words, "--processes", "2", "--reward", "jpg", "--out", str(tmp_path / "none")], cache, code=2)
    assert "did you mean 'jpeg'?" in said
    assert "Traceback" not in said
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_process_that_alone_makes_bad_images_ends_them_all(cache: Path, tmp_path: Path) -> None:
    """The other waits for its share of the rewards: it is ended, and what went wrong is said."""
    said = launch(2, [str(ROOT / "tests/images/bad_process.py"), str(tmp_path / "run")], cache, code=1)
    assert "Round 1: 4 of 4 images sampled together have pixels that are no finite numbers" in said
    assert [p.name for p in sorted((tmp_path / "run/checkpoints").iterdir())] == ["000000000"]
    assert not (tmp_path / "run/model").exists()


WORKER = """
import os, sys, time
from pathlib import Path
from diffrl.support.stopping import stop_signals

here, rank = Path(sys.argv[1]), int(os.environ["RANK"])
with stop_signals(deadly=True) as stopped:
    (here / f"ready-{rank}").touch()
    while not stopped():
        time.sleep(0.01)
    time.sleep(0.5 if rank == 0 else 0)
    (here / f"saved-{rank}").touch()
sys.exit(130)
"""
"""A process that ends by 130 once it is told to, the first half a second after the other; told twice, it dies."""


def to_both(pid: int) -> None:
    """SIGTERM to a process and to its group, as `timeout` sends it."""
    os.kill(pid, signal.SIGTERM)
    os.killpg(pid, signal.SIGTERM)


SENT: dict[str, Callable[[int], None]] = {
    "SIGINT to the launcher": lambda pid: os.kill(pid, signal.SIGINT),
    "SIGTERM to the launcher": lambda pid: os.kill(pid, signal.SIGTERM),
    "SIGINT to its group": lambda pid: os.killpg(pid, signal.SIGINT),
    "SIGTERM to both": to_both,
}


def begun(words: list[str], **environment: str) -> "subprocess.Popen[str]":
    """Python in a session of its own, with the signals as a terminal's shell leaves them."""
    return subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(*paths: Path) -> None:
    """Wait until there is something at each path."""
    for _ in range(3000):
        if all(path.exists() for path in paths):
            return
        time.sleep(0.05)
    raise AssertionError(f"{paths} never came")


ONE = ("SIGINT to the launcher", "SIGTERM to both")
"""Of the fast tier: the plainest and the hardest."""


@pytest.mark.long
@pytest.mark.parametrize("sent", [s if s in ONE else pytest.param(s, marks=pytest.mark.slow) for s in SENT])
def test_a_signal_ends_every_process_once_and_none_before_it_has_saved(sent: str, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    launcher = begun(["-m", "diffrl.images.launch", "2", str(tmp_path / "worker.py"), str(tmp_path)])
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    SENT[sent](launcher.pid)
    assert (launcher.communicate(timeout=60)[1], launcher.returncode) == ("", 130)
    assert (tmp_path / "saved-0").exists()
    assert (tmp_path / "saved-1").exists()


def test_a_signal_to_a_process_and_to_its_group_is_one(tmp_path: Path) -> None:
    """A second one would kill it before it has saved."""
    (tmp_path / "worker.py").write_text(WORKER)
    alone = begun([str(tmp_path / "worker.py"), str(tmp_path)], RANK="0")
    wait_for(tmp_path / "ready-0")
    os.kill(alone.pid, signal.SIGTERM)
    os.killpg(alone.pid, signal.SIGTERM)
    assert (alone.communicate(timeout=60)[1], alone.returncode) == ("", 130)
    assert (tmp_path / "saved-0").exists()


def test_a_second_signal_ends_them_at_once(tmp_path: Path) -> None:
    source = WORKER.replace("0.5 if rank == 0 else 0", "100")
    (tmp_path / "worker.py").write_text(
        source.replace("time.sleep(100)", "(here / f'told-{rank}').touch(); time.sleep(100)")
    )
    launcher = begun(["-m", "diffrl.images.launch", "2", str(tmp_path / "worker.py"), str(tmp_path)])
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    launcher.send_signal(signal.SIGINT)
    wait_for(tmp_path / "told-0", tmp_path / "told-1")
    launcher.send_signal(signal.SIGINT)
    assert (launcher.communicate(timeout=60)[1], launcher.returncode) == ("", -signal.SIGINT)
    assert not (tmp_path / "saved-0").exists()


@pytest.mark.long
def test_a_second_signal_ends_what_hears_none(tmp_path: Path) -> None:
    """As a process within a call of C."""
    deaf = "import os, signal, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    (tmp_path / "worker.py").write_text(
        f"{deaf}open(sys.argv[1] + '/ready-' + os.environ['RANK'], 'w')\ntime.sleep(99)"
    )
    launcher = begun(["-m", "diffrl.images.launch", "2", str(tmp_path / "worker.py"), str(tmp_path)])
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    for _ in range(2):
        launcher.send_signal(signal.SIGINT)
        time.sleep(1)
    assert (launcher.communicate(timeout=60)[1], launcher.returncode) == ("", -signal.SIGINT)


@pytest.mark.slow
def test_a_process_without_a_share_steps_in_half_precision_too(cache: Path, tmp_path: Path) -> None:
    """An update of one image leaves the other process without a loss, and with the gradients of the first."""
    words = ["finetune", "--model", "tiny-digits", "--algo", "rwr", "--reward", "symmetry", "--precision", "fp16"]
    words += ["--batch", "4", "--updates", "4", "--queries", "8", "--steps", "2", "--eval-samples", "4"]
    launch(2, ["-m", "diffrl", *words, "--out", str(tmp_path / "run")], cache)
    assert (tmp_path / "run/model/model_index.json").exists()


@pytest.mark.long
@pytest.mark.parametrize("deaf", [1, 0])
def test_one_that_waits_for_one_that_a_signal_has_ended_is_ended(deaf: int, tmp_path: Path) -> None:
    """As within a call of C, which hears no signal; the first has longer, as it may still be closing its logs."""
    source = f"""
import os, signal, sys, time
if os.environ["RANK"] == "{deaf}":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
open(os.path.join({str(tmp_path)!r}, "ready-" + os.environ["RANK"]), "w").close()
time.sleep(99)
"""
    (tmp_path / "worker.py").write_text(source)
    short = "import sys; from diffrl.images import launch; launch.GRACE, launch.CLOSING = 1.0, 3.0; "
    launcher = begun(["-c", f"{short}launch.together(2, sys.argv[1:])", str(tmp_path / "worker.py")])
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    sent = time.monotonic()
    launcher.send_signal(signal.SIGINT)
    heard = launcher.communicate(timeout=60)[1]
    assert heard.splitlines()[-1].startswith(f"diffrl.support.stopping.{'Interrupted' if deaf else 'Stopped'}")
    assert deaf or time.monotonic() - sent > 3


@pytest.mark.long
def test_none_waits_for_one_that_is_stopped_before_they_have_met(tmp_path: Path) -> None:
    """PyTorch would wait for it half an hour, within a call of C."""
    source = f"""
import os, sys, time
from diffrl.images.launch import meet
from diffrl.support.stopping import Stopped, stop_signals
def mark(name):
    open(os.path.join({str(tmp_path)!r}, name), "w").close()
if os.environ["RANK"] == "0":
    with stop_signals() as stopped:
        mark("ready-0")
        try:
            meet(stopped)
        except Stopped:
            mark("stopped")
            sys.exit(130)
else:
    mark("ready-1")
    time.sleep(99)
"""
    (tmp_path / "worker.py").write_text(source)
    launcher = begun(["-m", "diffrl.images.launch", "2", str(tmp_path / "worker.py")])
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    time.sleep(0.5)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(timeout=60) == 130
    launcher.communicate()
    assert (tmp_path / "stopped").exists()


@pytest.mark.long
def test_processes_whose_launcher_is_killed_end_saved(tmp_path: Path) -> None:
    follow = "from diffrl.images.launch import end_with_launcher\nend_with_launcher()\n"
    (tmp_path / "worker.py").write_text(follow + WORKER)
    launcher = begun(["-m", "diffrl.images.launch", "2", str(tmp_path / "worker.py"), str(tmp_path)])
    wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
    launcher.kill()
    launcher.communicate(timeout=60)
    wait_for(tmp_path / "saved-0", tmp_path / "saved-1")


def test_a_lost_process_is_a_stop_where_one_was_told() -> None:
    for told, raised in ((True, Stopped), (False, LostProcess)):
        with pytest.raises(raised), ended_by_stop(lambda told=told: told, LostProcess):  # type: ignore[misc]
            raise LostProcess("gone")


def test_a_signal_of_before_starts_none_of_them(tmp_path: Path) -> None:
    """Though what it raised was swallowed, as by an import."""
    with stop_signals(at_once=True):
        with suppress(Stopped):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            together(2, ["-c", f"open({str(tmp_path / 'begun')!r}, 'w')"])
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.parametrize(
    ("first", "second", "code", "said"),
    [
        ("sys.exit(2)", "sys.exit(0)", 2, "ended with code 2; what went wrong is said above"),
        pytest.param(
            "sys.exit(0)",
            "sys.exit(3)",
            1,
            "ended with code 3; what went wrong is said above",
            marks=pytest.mark.slow,
        ),
        ("sys.exit(0)", "os.kill(os.getpid(), 9)", 1, "ended by SIGKILL, as it is by the system where memory runs out"),
        pytest.param(
            "time.sleep(0.5); sys.exit(1)",
            "os.kill(os.getpid(), 9)",
            1,
            "One of the processes was ended by SIGKILL",
            marks=pytest.mark.slow,
        ),
        pytest.param("sys.exit(0)", "sys.exit(0)", 0, "", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_fails_is_told(first: str, second: str, code: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(f"import os, sys, time\nif os.environ['RANK'] == '0': {first}\nelse: {second}")
    launcher = begun(["-m", "diffrl.images.launch", "2", str(tmp_path / "worker.py")])
    heard = launcher.communicate(timeout=60)[1]
    assert launcher.returncode == code, heard
    assert said in heard


@pytest.mark.slow
@pytest.mark.parametrize("sent", SENT)
def test_a_run_of_two_processes_that_is_stopped_says_one_true_line(sent: str, cache: Path, tmp_path: Path) -> None:
    """Before it has a folder, to begin again; after a round, to go on, which it does."""
    words = ["finetune", "--model", "tiny-digits", "--reward", "jpeg", "--processes", "2", "--queries", "6400"]
    words += ["--batch", "8", "--steps", "2", "--eval-samples", "4"]
    run = tmp_path / "run"
    for there, line in (
        (tmp_path, f"Begin again with `diffrl {' '.join(words)} --out {run}`."),
        (run / "images", "Go on"),
    ):
        process = begun(["-m", "diffrl", *words, "--out", str(run)], DIFFRL_CACHE=str(cache))
        wait_for(there)
        time.sleep(3)
        SENT[sent](process.pid)
        heard = process.communicate(timeout=120)[1]
        assert process.returncode == 130, heard
        (said,) = [text for text in heard.splitlines() if text.startswith("diffrl: ")]
        assert "Traceback" not in heard
        assert line in said
    assert f"saved. Go on with `diffrl resume {run}`." in said
    assert (run / "run.json").exists()
    done = int(said.split("after ")[1].split()[0])
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == f"{done:09d}"
