"""Folders of runs from somebody else: pipes and devices for files, numbers out of range, parts that are lost.

And places that take nothing: folders that may not be read or written, disks that are full.
"""

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import diffrl
from agents import BC
from diffrl.cli import main
from diffrl.runs.config import TrainConfig
from diffrl.support import folder as folders
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path
from diffrl.support.folder import SUMS

pytestmark = pytest.mark.usefixtures("own_data")
CALLS = """
import resource, shlex, sys
from diffrl.cli import main

resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
for line in sys.stdin:
    print(">", line.strip(), file=sys.stderr, flush=True)
    try:
        print("=", main(shlex.split(line)), file=sys.stderr, flush=True)
    except SystemExit as end:
        print("=", end.code, file=sys.stderr, flush=True)
"""


def config(out: Path) -> TrainConfig:
    short = {"rows": 400, "steps": 20, "eval_every": 10, "eval_episodes": 1, "log_every": 5}
    env = "tests.training.held_env:Held-v0"
    agent = BC(width=8, layers=1)
    return TrainConfig("maze2d-umaze-v1", agent, env=env, workers=1, eval_workers=0, out=out, **short)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data_directory: Path) -> Path:
    """A run of 20 steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_DATA", str(data_directory))
        return diffrl.train(config(tmp_path_factory.mktemp("runs") / "whole"), quiet=True)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What has been written to stderr since, in one line."""
    return " ".join(capsys.readouterr().err.split())


def edit(run: Path, **changes: object) -> None:
    """Change entries of run.json, with its checksum made anew."""
    about = json.loads((run / "run.json").read_text())
    folders.write_json(run / "run.json", about | changes)


def environment(**variables: str) -> dict[str, str]:
    """This process's, of a wide terminal and without a cache of compiled code, which this process may have set."""
    known = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    return known | {"COLUMNS": "300"} | variables


def call(lines: list[str], *first: str) -> list[tuple[int, str]]:
    """Run commands in one process that has 16 GiB and two minutes; the exit code of each and what it wrote.

    first: arguments of Python by which it becomes another kind of process first.
    """
    done = subprocess.run(
        [sys.executable, *first, "-c", CALLS],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    parts = done.stderr.split("> ")[1:]
    assert len(parts) == len(lines), done.stderr[-3000:]
    return [(int(part.rpartition("= ")[2]), part) for part in parts]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["pipe", pytest.param("device", marks=pytest.mark.slow)])
def test_pipes_and_devices_in_a_run_hang_nothing(whole: Path, tmp_path: Path, kind: str) -> None:
    """In place of each file that a run has, for each verb that reads it."""
    files = [str(file.relative_to(whole)) for file in whole.rglob("*") if file.is_file() and file.suffix != ".png"]
    files = [file for file in files if "000010" not in file and not file.endswith(".html")]
    assert {SUMS, "scores.json", "metrics.csv", "checkpoints/000000020/state.safetensors"} <= {*files}
    lines = []
    for number, name in enumerate(files):
        for verb in ("evaluate --episodes 1 --max-episode-steps 2 --which last", "resume --steps 21", "report"):
            run = Path(shutil.copytree(whole, tmp_path / f"{number}-{verb.split()[0]}"))
            (run / name).unlink()
            if kind == "pipe":
                os.mkfifo(run / name)
            else:
                (run / name).symlink_to("/dev/zero")
            out = f" --out {tmp_path / f'{number}-out'}" if verb == "report" else ""
            lines.append(f"{verb.split()[0]} {run} {verb.partition(' ')[2]}{out}")
    found = call(lines)
    assert [(line, text) for line, (code, text) in zip(lines, found, strict=True) if code not in (0, 2)] == []
    assert [text for _, text in found if "Traceback" in text] == []
    refused = [text for code, text in found if code == 2]
    assert len(refused) > len(lines) / 3
    assert all(("named pipe" if kind == "pipe" else "device") in text or "damaged" in text for text in refused)


def test_prompts_and_lists_end(tmp_path: Path) -> None:
    for path in ("/dev/zero", str(tmp_path / "pipe")):
        if path != "/dev/zero":
            os.mkfifo(path)
        for code, text in call([f"finetune --prompts {path} --out {tmp_path / 'out'}"]):
            assert (code, "Traceback" in text) == (2, False)
            assert f"The prompts {path} cannot be read" in text


READERS = """
import sys
from pathlib import Path

from diffrl.images.config.pipelines import adapter_rank
from diffrl.images.models.adapters import _read_file
from diffrl.images.run import read_grid
from diffrl.images.saved import has_weights
from diffrl.runs.study.reading import minutes_of
from diffrl.support.files import beginning
from diffrl.training.logs import silent_share

folder, pipe = Path(sys.argv[1]), Path(sys.argv[1]) / "a.safetensors"
for read in (
    lambda: read_grid(pipe),
    lambda: adapter_rank(folder, "tiny-digits"),
    lambda: _read_file(pipe),
    lambda: has_weights(folder),
    lambda: minutes_of(folder),
    lambda: beginning(pipe),
    lambda: silent_share(folder),
):
    try:
        print(read())
    except Exception as error:
        print(type(error).__name__)
"""


@pytest.mark.long
def test_readers_of_images_and_logs_hang_on_no_pipe(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").mkdir()
    for name in ("a.safetensors", "metrics.csv", "tensorboard/events.out.tfevents.1"):
        os.mkfifo(tmp_path / name)
    done = subprocess.run([sys.executable, "-c", READERS, tmp_path], capture_output=True, text=True, timeout=120)
    said = "('a.safetensors is gone, or damaged', [])"
    assert done.stdout.splitlines() == [said, "None", "UserError", "NotAFile", "{}", "NotAFile", "0.0"], done.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"observation_size": 10**12},
        {"observation_size": 5},
        {"observation_size": True},
        {"action_size": -1},
        {"action_size": "2"},
        {"limit": "x"},
        {"limit": 0},
        {"counted": [3]},
        {"data_limit": -5},
        {"data_limit": 10**30},
        {"value_limit": "nan"},
        {"value_limit": -1},
        {"fingerprint": 3},
        {"fingerprint": None},
        {"task": None},
        {
            "task": {
                "env_id": "x",
                "env_kwargs": {},
                "reference": None,
                "comparable": False,
                "max_episode_steps": 10**30,
            }
        },
        {"task": {"env_id": "x"}},
    ],
)
def test_numbers_of_run_json_that_make_no_sense_are_a_sentence(
    run: Path, changes: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    edit(run, **changes)
    for words in (["evaluate", str(run), "--episodes", "1"], ["resume", str(run), "--steps", "21"]):
        assert main(words) == 2
        text = said(capsys)
        assert text.startswith(f"diffrl: {run}"), text
        assert "damaged" in text
        assert len(text) < 400, text


def test_lost_checkpoints_are_said_to_be_lost(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(run, run.with_name("other"))
    shutil.rmtree(run / "checkpoints")
    for words in (["evaluate", str(run)], ["resume", str(run), "--steps", "30"], ["compare", str(run), str(other)]):
        assert main(words) == 2
        text = said(capsys)
        assert "has lost its checkpoints: restore them from a copy; or begin again in another folder" in text
        assert f"`diffrl report {run}` shows its scores" in text
    assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 0
    with pytest.raises(UserError, match=r"holds a run that has lost its checkpoints: .* remove the folder"):
        diffrl.train(config(run), quiet=True)


@pytest.mark.parametrize("name", ["config.yaml", "preprocessing.safetensors", "run.json"])
def test_a_run_without_one_of_its_files_is_damaged(run: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """And is not its own alternative, beside which there are others."""
    shutil.copytree(run, run.with_name("other"))
    (run / name).unlink()
    for words in (["evaluate", str(run)], ["resume", str(run), "--steps", "30"], ["report", str(run)]):
        assert main(words) == 2
        assert said(capsys).endswith(f" {run} is damaged: {name} is missing. Restore it from a copy.")
    os.mkfifo(run / name)
    assert main(["evaluate", str(run)]) == 2
    assert f"{run} is damaged: {name} cannot be read: it is a named pipe, and is to be a file. Restore it" in said(
        capsys
    )
    (run / name).unlink()
    assert main(["evaluate", str(run.parent / "none")]) == 2
    assert f"Runs beside it: {run.with_name('other')}" in said(capsys)


@pytest.mark.long
def test_an_ascii_terminal_gets_the_score(run: Path) -> None:
    """Which has a plus-minus, for which such a terminal has no character."""
    words = [sys.executable, "-m", "diffrl", "evaluate", str(run), "--episodes", "2", "--max-episode-steps", "3"]
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "COLUMNS": "200"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env={**os.environ, **ascii_only})
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr
    assert "?" in done.stdout


def test_lost_and_damaged_scores_are_made_again_by_resume(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each verb that needs them says so, and it is true."""
    sound = json.loads((run / "scores.json").read_text())
    for damage in (None, b'{"evaluations": ['):
        if damage is None:
            (run / "scores.json").unlink()
        else:
            (run / "scores.json").write_bytes(damage)
        for words in (["report", str(run), "--out", str(tmp_path / "out")], ["evaluate", str(run), "--episodes", "1"]):
            assert main(words) == 2
            assert f"`diffrl resume {run}` makes the evaluations of the checkpoints that are there again" in said(
                capsys
            )
        assert main(["resume", str(run)]) == 0
        assert json.loads((run / "scores.json").read_text()) == sound


MORTAL = """
import ctypes, os, sys

ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def mortal(*words: str, cwd: Path | None = None, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a command as a process that may write only where its user may: root's is not above the modes of files."""
    command = [sys.executable, "-c", MORTAL, "-m", "diffrl", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(**variables), cwd=cwd)


@pytest.mark.long
def test_where_no_run_may_be_written_the_option_for_another_place_is_named(tmp_path: Path) -> None:
    """In one line; and in a place where `runs` is a file."""
    words = ["train", "--agent", "bc", "--dataset", "maze2d-umaze-v1", "--rows", "300", "--steps", "2", "--env", "none"]
    shut, taken = tmp_path / "shut", tmp_path / "taken"
    shut.mkdir(mode=0o555)
    taken.mkdir()
    (taken / "runs").touch()
    for place, why in ((shut, "Permission denied"), (taken, "Not a directory")):
        done = mortal(*words, cwd=place, PYTHONPATH=str(Path(diffrl.__file__).parents[1]))
        assert done.returncode == 2
        last = done.stderr.splitlines()[-1]
        assert last.startswith("diffrl: runs/bc-")
        assert last.endswith(f" cannot be written: {why}. Choose another place for it: --out FOLDER.")


@pytest.mark.long
def test_a_run_that_may_not_be_written_is_evaluated_all_the_same(run: Path, tmp_path: Path) -> None:
    words = ("evaluate", str(run), "--episodes", "2", "--max-episode-steps", "3", "--which", "last")
    run.chmod(0o555)
    done = mortal(*words)
    run.chmod(0o755)
    assert done.returncode == 0, done.stderr
    said = done.stderr.index("The scores are printed and not kept; --out FILE keeps them elsewhere")
    assert said < done.stderr.index("In tests.training.held_env")  # before the first episode
    assert "last" in done.stdout
    assert not (run / "evaluation.json").exists()
    (tmp_path / "shut").mkdir(mode=0o555)
    done = mortal(*words, "--out", str(tmp_path / "shut" / "a.json"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"diffrl: --out {tmp_path / 'shut' / 'a.json'} cannot be written: Permission denied. Choose another place for "
        "it.\n"
    )


@pytest.mark.long
def test_reports_and_comparisons_that_cannot_be_written_name_the_place(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, run.with_name("other"))
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o555)
    files = {
        f"report {run} --out {shut / 'new'}": shut / "new",
        f"report {run} --out {shut}": shut / "index.html",
        f"compare {run} {other} --episodes 2 --out {shut / 'a.html'}": shut / "a.csv",
    }
    for (code, text), file in zip(call([*files], "-c", MORTAL), files.values(), strict=True):
        assert code == 2
        last = text.splitlines()[-2]  # below it is the code
        assert last.startswith(f"diffrl: {file} cannot be written: Permission denied. Choose another place for it")
        assert [*shut.iterdir()] == []


def test_a_file_on_a_full_disk_is_named_as_the_user_names_it(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_path(tmp_path / "a.json") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("x")

    with pytest.raises(OSError, match="No space left") as caught:
        write()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.json"))
    assert [*tmp_path.iterdir()] == []


def test_output_onto_a_full_disk_is_a_sentence() -> None:
    for words in (["data", "list"], ["--version"], ["--help"]):
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "diffrl", *words], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120
            )
        assert (done.returncode, done.stderr) == (
            2,
            "diffrl: What is printed cannot be written: No space left on device.\n",
        )


@pytest.mark.long
@pytest.mark.parametrize("place", ["home", pytest.param("/proc/1", marks=pytest.mark.slow)])
def test_a_home_that_takes_nothing_names_the_variable(place: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("torch._dynamo.package") is None:
        pytest.skip("This PyTorch makes no folder at its import, and a run of the built-in model needs none.")
    (tmp_path / "home").mkdir(mode=0o555)
    own = {"XDG_CACHE_HOME": "", "DIFFRL_CACHE": "", "HOME": str(tmp_path / place)}
    done = mortal("finetune", "--reward", "jpeg", "--out", str(tmp_path / "out"), **own)
    assert done.returncode == 2
    assert "$DIFFRL_CACHE names another folder" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
