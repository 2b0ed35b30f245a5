"""A fine-tuning run that is told to stop in the middle of something: it ends there, and goes on as if it had not."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diffrl.cli import main
from diffrl.diffusion.chain import DenoisingChain
from diffrl.images import evaluation
from diffrl.images.algorithms import Finetuner
from diffrl.images.models import digits, latents
from diffrl.images.run import FinetuneRun
from diffrl.images.samples import Setup
from diffrl.support.errors import UserError
from tests.images.test_command import UNSCORED, final

ROUNDS = ["finetune", *UNSCORED, "--queries", "64", "--eval-every", "4", "--updates", "2", "--train-steps", "1"]
PLACES: dict[str, tuple[Any, str]] = {
    "round": (Finetuner, "advance"),
    "sampling": (DenoisingChain, "_mean"),
    "scoring": (Setup, "scored"),
    "learning": (Finetuner, "_update"),
    "evaluating": (evaluation, "reference_error"),
}


def _last(words: list[str], word: str) -> int:
    """Where a word stands last; 0 where it does not."""
    return max((i for i, found in enumerate(words) if found == word), default=0)


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four rounds that were never cut, with an evaluation before them and one after."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_CACHE", str(cache))
        assert main([*ROUNDS, "--out", str(run)]) == 0
    return run


@pytest.mark.long
@pytest.mark.parametrize(
    ("place", "rounds", "call", "kept"),
    [
        pytest.param("sampling", 3, 2, 2, marks=pytest.mark.slow),
        pytest.param("scoring", 3, 1, 2, marks=pytest.mark.slow),
        ("learning", 3, 2, 2),
        pytest.param("evaluating", 0, 1, 0, marks=pytest.mark.slow),
        ("evaluating", 4, 1, 4),
    ],
)
def test_a_stop_anywhere_in_a_round_or_an_evaluation_is_at_once_and_loses_nothing_before(
    place: str,
    rounds: int,
    call: int,
    kept: int,
    whole: Path,
    quick: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The call in which the signal comes, counted from the beginning of a round, is the last one of all.

    The checkpoint is that of the rounds before.
    """
    heard: list[str] = []

    def due() -> bool:
        return heard.count("round") == rounds and heard[_last(heard, "round") :].count(place) == call

    def watch(name: str) -> None:
        owner, method = PLACES[name]
        original = getattr(owner, method)

        def watched(*arguments: Any, **named: Any) -> Any:
            heard.append(name)
            if name == place and due():
                signal.raise_signal(signal.SIGTERM)
            return original(*arguments, **named)

        monkeypatch.setattr(owner, method, watched)

    with monkeypatch.context() as monkeypatch:
        for name in PLACES:
            watch(name)
        assert main([*ROUNDS, "--out", "cut"]) == 130
    assert heard[-1] == place
    assert due()
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert f"Stopped after {kept} rounds; saved. Go on with `diffrl resume cut`." in said.splitlines()[-1]
    assert sorted(path.name for path in Path("cut/checkpoints").iterdir())[-1] == f"{kept:09d}"
    assert main(["resume", "cut"]) == 0
    tensors = final(whole), final(quick / "cut")
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    for name in ("metrics.csv", "checkpoints/000000004/state.json"):
        assert (whole / name).read_bytes() == (quick / "cut" / name).read_bytes()
    history = [json.loads((run / "evaluations.json").read_text()) for run in (whole, quick / "cut")]
    assert [[entry | {"seconds": 0} for entry in entries] for entries in history[:1]] == [
        [entry | {"seconds": 0} for entry in entries] for entries in history[1:]
    ]
    assert [entry["round"] for entry in history[1]] == [0, 4]


@pytest.mark.parametrize("folder_of", [digits.tiny_digits_folder, latents.tiny_latents])
def test_a_model_that_cannot_be_kept_is_not_trained_first(
    folder_of: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cache is below a file: minutes of training would be lost at their end."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFRL_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(digits, "train_digits", None)
    monkeypatch.setattr(latents, "train_latents", None)
    with pytest.raises(UserError, match=r"cannot be written: Not a directory\. \$DIFFRL_CACHE names another folder"):
        folder_of(quiet=True)


def test_a_run_of_images_without_its_settings_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"kind": "images"}')
    with pytest.raises(UserError, match=r"is damaged: finetune\.yaml is missing\. Restore it from a copy\.$"):
        FinetuneRun.read(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(UserError, match="is not the folder of a fine-tuning run of images"):
        FinetuneRun.read(tmp_path)
