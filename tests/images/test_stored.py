"""What a run keeps of its settings: it goes on from any directory, under the names it began with."""

import json
from pathlib import Path

import pytest

from diffrl.cli import main
from diffrl.images import FinetuneConfig
from diffrl.images.rewards import parse, serve
from diffrl.images.rewards.registry import check
from diffrl.images.run import FinetuneRun, plain
from diffrl.images.stored import written
from diffrl.support.files import read_yaml, to_yaml
from diffrl.support.folder import write_json
from tests.images.rewards.test_remote import running
from tests.images.test_command import SMALL

FUNCTION = """
def bright(images, prompts, metadata):
    return images.mean((1, 2, 3))
"""


@pytest.mark.parametrize("variant", ["", "control:", "reference:", "video:"])
def test_folders_of_models_are_absolute(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p/sd").mkdir(parents=True)
    Path("p/sd/model_index.json").write_text("{}")
    prompts = tmp_path / "prompts.txt"
    config = FinetuneConfig(algo="nft", model=f"{variant}p/sd", prompts=prompts, reward="jpeg")
    assert plain(config, Path("run"))["model"] == f"{variant}{tmp_path}/p/sd"
    elsewhere = FinetuneConfig(algo="nft", model=f"{variant}owner/name", prompts=prompts, reward="jpeg")
    assert plain(elsewhere, Path("run"))["model"] == f"{variant}owner/name"


@pytest.mark.parametrize("folder", ["c#1", "a + b", "plain"])
def test_a_reward_is_read_back_whatever_its_directory_is_called(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the directory's name has what divides rewards and arguments, the reward stays as it was typed."""
    (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / folder)
    Path("mine.py").write_text(FUNCTION)
    config = FinetuneConfig(algo="nft", model="tiny-emoji", reward="jpeg + python:mine.py#bright")
    kept = plain(config, Path("run"))["reward"]
    assert [argument for _, _, argument in check(kept)] == ["", kept.partition("python:")[2]]
    assert kept.endswith(f"{tmp_path}/plain/mine.py#bright" if folder == "plain" else "+ python:mine.py#bright")


@pytest.mark.long
def test_rewards_of_ones_own_go_on_from_another_directory_under_their_names(
    quick: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parts of sums and what is held out, too; the spreads of --scale-rewards are by the names."""
    Path("mine.py").write_text(FUNCTION)
    Path("other").mkdir()
    words = ["--reward", "jpeg + 2*python:mine.py#bright", "--held-out", "python:mine.py#bright", "--scale-rewards"]
    assert main(["finetune", *SMALL, *words, "--out", "run"]) == 0
    monkeypatch.chdir("other")
    assert main(["resume", "../run", "--queries", "48"]) == 0
    run = FinetuneRun.read(quick / "run")
    assert [entry["round"] for entry in run.history][-1] == 3
    for entry in run.history:
        parts = {"reward: jpeg", "reward: python:mine.py#bright"}
        assert {name for name in entry if name.startswith("reward: ")} == parts
        assert entry["held_out"] == pytest.approx(entry["reward: python:mine.py#bright"])
    saved = read_yaml(quick / "run" / "finetune.yaml")
    assert saved["reward"] == f"jpeg + 2*python:{quick}/mine.py#bright"
    assert saved["held_out"] == f"python:{quick}/mine.py#bright"
    assert "mine.py has changed" not in capsys.readouterr().err
    newest = sorted((quick / "run" / "checkpoints").iterdir())[-1]
    spreads = json.loads((newest / "state.json").read_text())["spreads"]
    assert set(spreads["rounds"]) == {"jpeg", "python:mine.py#bright"}

    # Of a run of before, which has no digests that its evaluations are measured by, it is said once.
    about = json.loads((quick / "run/run.json").read_text())
    del about["measured_by"]["files"]
    write_json(quick / "run/run.json", about)
    (quick / "mine.py").write_text(FUNCTION.replace("images.mean", "-images.mean"))
    for queries, times in (("64", 1), ("80", 0)):
        assert main(["resume", "../run", "--queries", queries]) == 0
        assert " ".join(capsys.readouterr().err.split()).count("mine.py has changed since the run was last") == times


@pytest.mark.slow
def test_what_has_moved_keeps_its_names(quick: Path) -> None:
    """Of a file and of a server: parts of evaluations, and the spreads of --scale-rewards, are by the names."""
    Path("mine.py").write_text(FUNCTION)
    mean = parse("python:mine.py#bright", device="cpu")
    with running(serve.server(mean)) as one, running(serve.server(mean)) as two:
        words = ["--reward", f"jpeg + 2*python:mine.py#bright + remote:{one}/a", "--scale-rewards"]
        assert main(["finetune", *SMALL, *words, "--out", "run"]) == 0
        Path("other").mkdir()
        for place, address, queries in (("other/its.py", two, "48"), ("third.py", one, "64"), ("4.py", two, "80")):
            Path(place).write_text(FUNCTION)  # and the file of before is there still
            file = Path("run/finetune.yaml")
            reward = f"jpeg + 2*python:{quick / place}#bright + remote:{address}/a"
            file.write_text(to_yaml({**read_yaml(file), "reward": reward}))
            assert main(["resume", "run", "--queries", queries, "--accept-changes"]) == 0
    run = FinetuneRun.read("run")
    names = {"jpeg", "python:mine.py#bright", f"remote:{one}/a"}
    assert [entry["round"] for entry in run.history][-1] == 5
    for entry in run.history:
        assert {name for name in entry if name.startswith("reward: ")} == {f"reward: {name}" for name in names}
    newest = sorted(Path("run/checkpoints").iterdir())[-1]
    spreads = json.loads((newest / "state.json").read_text())["spreads"]
    assert set(spreads["rounds"]) == names
    assert set(spreads["rounds"].values()) == {5}, "begun once"
    assert run.reward_written("reward") == f"jpeg + 2*python:mine.py#bright + remote:{one}/a"


def test_names_are_written_once_however_places_are_exchanged() -> None:
    """And a path, or an address, that another begins with is not taken for that one."""
    files = {"/a.py": "/b.py", "/b.py": "/a.py", "http://x/a": "http://y/a"}
    files = {place: {"written": was} for place, was in files.items()}
    assert written("python:/a.py#f + 2*python:/b.py#f", files) == "python:/b.py#f + 2*python:/a.py#f"
    assert written("remote:http://x/ab + remote:http://x/a", files) == "remote:http://x/ab + remote:http://y/a"
