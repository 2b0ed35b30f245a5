"""What the journeys count, on a package of five files; and the real journeys, whose runs are long."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from journeys import GOALS, OURS, REACHED, Call, Journey, Recorder, handed_over, last_step, missed

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "journeys.py"
FILES = {
    "commands": "from walked import run\ndef verb():\n    read()\n    return run.train()\ndef read():\n    pass",
    "run": """
import contextlib
from dataclasses import dataclass
from walked import nets

@dataclass
class Setup:
    n: int
    def __post_init__(self):
        nets.check(self.n)

def train():
    from walked import late
    setup = Setup(3)
    with opened():
        sum(nets.layer(i) for i in range(setup.n))
        list(map(back, range(2)))
        nets.apply(lambda x: late.double(x))
        nets.apply(back)
    advance()

@contextlib.contextmanager
def opened():
    yield

def back(i):
    return i

def advance():
    nets.layer(0)
""",
    "nets": "def check(n):\n    pass\ndef layer(i):\n    return i\ndef apply(f):\n    return f(2)",
    "late": "from walked import at_import\nat_import.decorate(1)\ndef double(x):\n    return 2 * x",
    "at_import": "def decorate(f):\n    return f",
}


@pytest.fixture
def walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journey:
    (tmp_path / "walked").mkdir()
    for name, text in FILES.items():
        (tmp_path / "walked" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    recorder = Recorder(tmp_path, ["walked"])
    commands = importlib.import_module("walked.commands")
    with recorder.recording():
        commands.verb()
    for name in [name for name in sys.modules if name.split(".")[0] == "walked"]:
        del sys.modules[name]
    return recorder.journey


def test_files_and_crossings_in_the_order_of_their_first_visits(walked: Journey) -> None:
    """at_import and the lambda (nets -> run is `back`) do not count; what the lambda calls does."""
    assert [(call.file, call.name) for call in walked.calls] == [
        ("walked/commands.py", "verb"),
        ("walked/commands.py", "read"),
        ("walked/run.py", "train"),
        ("walked/run.py", "__post_init__"),
        ("walked/nets.py", "check"),
        ("walked/run.py", "opened"),
        *[("walked/nets.py", "layer")] * 3,
        *[("walked/run.py", "back")] * 2,
        ("walked/nets.py", "apply"),
        ("walked/late.py", "double"),
        ("walked/nets.py", "apply"),
        ("walked/run.py", "back"),
        ("walked/run.py", "opened"),
        ("walked/run.py", "advance"),
        ("walked/nets.py", "layer"),
    ]
    assert walked.files == [f"walked/{name}.py" for name in ("commands", "run", "nets", "late")]
    assert {pair: call.name for pair, call in walked.crossings.items()} == {
        ("walked/commands.py", "walked/run.py"): "train",
        ("walked/run.py", "walked/nets.py"): "check",
        ("walked/run.py", "walked/late.py"): "double",
        ("walked/nets.py", "walked/run.py"): "back",
    }


def test_a_journey_begins_where_the_command_hands_over(walked: Journey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("journeys.COMMAND_LINE", ("walked/commands.py",))
    journey = handed_over(walked)
    assert [call.name for call in journey.calls] == [call.name for call in walked.calls[2:]]
    assert len(journey.crossings) == 3


def test_a_step_is_what_the_last_advance_makes() -> None:
    def call(name: str, inside: int, file: str = "a.py") -> Call:
        return Call(("a.py", "above"), file, name, inside)

    step = [call("step", 2), call("sample", 0, "b.py"), call("update", 0, "c.py")]
    small = [call("advance", 1, "maze.py"), call("cells", 0, "maze.py")]
    calls = [call("fit", 12), call("advance", 3), *step, call("advance", 4), call("stop", 0), *step, *small]
    assert [c.name for c in last_step(Journey(calls)).calls] == ["step", "sample", "update"]
    with pytest.raises(RuntimeError, match="INNER"):
        last_step(Journey(step))


def test_a_goal_that_is_missed_is_named() -> None:
    def journey(files: int, crossings: int) -> Journey:
        calls = [Call(None, "0", "f")] + [Call(("0", "f"), str(i), "f") for i in range(1, files)]
        back = [Call((str(i), "f"), "0", "f") for i in range(1, crossings - files + 2)]
        return Journey(calls + back)

    (files, crossings), ddpo = GOALS["train"], GOALS["ddpo"]
    assert missed({"train": journey(files, crossings), "ddpo": journey(*ddpo)}) == []
    more = {"train": journey(files, crossings + 1), "ddpo": journey(ddpo[0] + 1, ddpo[1])}
    assert missed(more) == [
        f"train: {crossings + 1} crossings; the goal is at most {crossings}",
        f"ddpo: {ddpo[0] + 1} files; the goal is at most {ddpo[0]}",
    ]
    assert missed(more, {"ddpo": (ddpo[0] + 1, ddpo[1])}) == []


@pytest.mark.slow
def test_the_real_journeys_are_recorded_and_told_and_do_not_grow(tmp_path: Path) -> None:
    """A new feature costs a run that has no use for it two files and two crossings at most: decide by one lookup."""
    out = tmp_path / "journeys.json"
    command = [sys.executable, str(SCRIPT), "--list", "step", "--json", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "update" in run.stdout
    found = json.loads(out.read_text())
    assert {"train", "ddpo", "step"} <= found.keys()
    assert set(found["step"]["files"]) < set(found["train"]["files"])
    assert all(Path(file).parts[0] in OURS for file in found["ddpo"]["files"])
    counts = {name: (found[name]["n_files"], found[name]["n_crossings"]) for name in REACHED}
    assert all(counts[name][i] <= REACHED[name][i] + 2 for name in REACHED for i in (0, 1)), (counts, REACHED)
