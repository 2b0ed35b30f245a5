"""A data set that holds generated rows is enlarged once more: other noise, and a verdict that says so."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffrl.augment import chunks, streams
from diffrl.augment.fidelity.job import fidelity_of
from diffrl.augment.fidelity.verdicts import of_rows, with_source
from diffrl.augment.source import UNTOLD, noise_of, said_of_generated
from diffrl.augment.synther.augmenter import synther
from diffrl.augment.synther.config import Sampling, SynthERConfig
from diffrl.data import d4rl
from diffrl.data.fidelity import LOOK_FIRST, NO_FAULT, NOT_MEASURED, USELESS, Verdict
from diffrl.data.offline import OfflineDataset
from diffrl.support.errors import beginning
from diffrl.support.seeds import generator_at
from tests.data.pendulum import pendulum

TINY: dict[str, Any] = {
    "model": SynthERConfig(width=32, steps=30, batch_size=64),
    "sampling": Sampling(solver="dpmpp2m", sampling_steps=8),
    "samples": 1000,
    "quiet": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real rows, those that a poor model makes of them, and those that one makes of these."""
    path = tmp_path_factory.mktemp("again")
    d4rl.write(path / "real.hdf5", OfflineDataset(**pendulum(5), metadata={"env_id": "Pendulum-v1"}))
    synther(str(path / "real.hdf5"), path / "first.hdf5", **TINY)
    synther(str(path / "first.hdf5"), path / "second.hdf5", **TINY)
    return path


@pytest.mark.long
def test_a_second_augmentation_makes_no_copies_of_the_first_ones_rows(folder: Path) -> None:
    """Both models are nearly as they began, of one seed: by the same noise they would make nearly the same rows."""
    found = json.loads((folder / "second-synther" / "fidelity.json").read_text())
    assert found["nearest_neighbour"]["share_closer_than_1_percent_of_real"] < 0.1
    first, second = (d4rl.read(folder / f"{name}.hdf5", action_limit=None) for name in ("first", "second"))
    together = [np.corrcoef(first.observations[:, i], second.observations[:, i])[0, 1] for i in range(3)]
    assert np.abs(together).max() < 0.2  # of 1,000 rows each


def test_learned_rewards_stay_learned_ones(folder: Path) -> None:
    """What is made from rewards that a model gave says so, as its source does."""
    source = "learned from preferences (diffrl, 3 networks)"
    about = {"env_id": "Pendulum-v1", "reward_source": source}
    d4rl.write(folder / "relabelled.hdf5", OfflineDataset(**pendulum(5), metadata=about))
    synther(str(folder / "relabelled.hdf5"), folder / "made.hdf5", **TINY, report=False)
    assert d4rl.read(folder / "made.hdf5", action_limit=None).metadata["reward_source"] == source
    assert "reward_source" not in d4rl.read(folder / "first.hdf5", action_limit=None).metadata


def test_only_a_source_with_generated_rows_gives_other_noise(tmp_path: Path) -> None:
    """Rows of plain data are those of the seed and the chunk's number, as ever."""

    def rows(name: str, **more: Any) -> NDArray[np.float32]:
        def sample(generator: torch.Generator) -> NDArray[np.float32]:
            return torch.rand(4, 2, generator=generator).numpy()

        about = {"seed": 3, "chunk": 4, "columns": 2, "rows_version": 1, **more}
        (tmp_path / name).mkdir(exist_ok=True)
        return np.array(
            chunks.generate(
                tmp_path / name, 8, sample, about, on_progress=lambda done, total: None, stopped=lambda: False
            )
        )

    plain = np.concatenate([torch.rand(4, 2, generator=generator_at(3, i, streams.CHUNK)).numpy() for i in (0, 1)])
    assert np.array_equal(rows("one"), plain)
    assert not np.isin(rows("one", source=7), plain).any()  # in place of those that are there
    assert not np.array_equal(rows("two", source=8), rows("one", source=7))
    digest = "f" * 64
    assert noise_of({}, digest) is noise_of({"synthetic_rows": 0, "real_rows": 5}, digest) is None
    assert noise_of({"synthetic_rows": 1, "real_rows": 5}, digest) == 2**60 - 1


def test_the_report_says_source_rows_and_what_was_said_of_them(folder: Path, tmp_path: Path) -> None:
    first, second = (d4rl.read(folder / f"{name}.hdf5", action_limit=None).metadata for name in ("first", "second"))
    assert first["fidelity"] == USELESS == second["fidelity"]
    assert "real rows" in first["fidelity_says"]
    said = "Its source was itself generated, of which was said: Do not train on these rows. "
    assert said in second["fidelity_says"]
    own = second["fidelity_says"].replace(first["fidelity_says"], "")
    assert "real" not in own
    page = (folder / "second-synther" / "fidelity.html").read_text()
    assert "The source holds generated rows itself" in page
    assert "source rows" in page
    about = json.loads((folder / "second-synther" / "fidelity.json").read_text())
    assert about["source"] == {"word": USELESS, "sentence": first["fidelity_says"]}
    assert "real" not in " ".join(sentence for name, sentence in about["verdicts"].items() if name != "overall")
    assert "source" in json.loads((folder / "first-synther" / "fidelity.json").read_text())
    # The same of two files that are given: these say of their rows what they are.
    report = fidelity_of(
        str(folder / "first.hdf5"), str(folder / "second.hdf5"), tmp_path / "report", held_out=0.2, quiet=True
    )
    assert report.source == Verdict.of(first)
    assert "Its source was itself generated" in report.verdicts["overall"]


def test_rows_that_are_not_compared_say_what_their_source_is(folder: Path, tmp_path: Path) -> None:
    synther(str(folder / "first.hdf5"), tmp_path / "new.hdf5", report=False, **TINY)
    found = Verdict.of(d4rl.read(tmp_path / "new.hdf5", action_limit=None).metadata)
    assert found is not None
    assert found.word == NOT_MEASURED.word
    assert found.sentence.startswith(f"{NOT_MEASURED.sentence} Its source was itself generated, of which was said: Do")


@pytest.mark.parametrize(
    ("own", "source", "word", "said"),
    [
        (NO_FAULT, USELESS, USELESS, "Its source was itself generated, of which was said: B. Beside its source: A."),
        (NO_FAULT, LOOK_FIRST, LOOK_FIRST, "Its source was itself generated, of which was said: B. Beside its source"),
        (USELESS, LOOK_FIRST, USELESS, "A. Its source was itself generated, of which was said: B."),
        (LOOK_FIRST, LOOK_FIRST, LOOK_FIRST, "A. Its source was itself generated, of which was said: B."),
        (NO_FAULT, NO_FAULT, NO_FAULT, "A. Its source was itself generated, of which was said: B."),
        (NO_FAULT, NOT_MEASURED.word, NO_FAULT, "A. Its source was itself generated, of which was said: B."),
        (NOT_MEASURED.word, USELESS, NOT_MEASURED.word, "A. Its source was itself generated, of which was said: B."),
    ],
)
def test_the_worse_of_two_verdicts_counts(own: str, source: str, word: str, said: str) -> None:
    found = with_source(Verdict(own, "A."), Verdict(source, "B."))
    assert found.word == word
    assert found.sentence.startswith(said)
    assert with_source(Verdict(own, "A."), UNTOLD) == Verdict(own, "A. Its source was itself generated.")


def test_what_rows_are_called() -> None:
    real = "Real rows miss it; of unseen real ones 2, 3x the real-against-real floor, really."
    assert of_rows(None, real) == real
    assert of_rows(UNTOLD, real) == (
        "Source rows miss it; of unseen source rows 2, 3x the source-against-source floor, really."
    )
    assert said_of_generated({"synthetic_rows": 5}) == UNTOLD
    assert said_of_generated({"fidelity": USELESS, "fidelity_says": "No."}) is None


@pytest.mark.parametrize("most", range(2, 60))
def test_a_text_is_cut_behind_a_sentence_or_a_word(most: int) -> None:
    text = "A few words. Some more of them (in brackets), and an end."
    found = beginning(text, most)
    if most >= len(text):
        assert found == text
        return
    assert len(found) <= most
    assert found.endswith("…")
    kept = found.removesuffix("…").rstrip()
    assert text.startswith(kept)
    assert most < 4 or not text[len(kept)].isalnum()  # no word is cut
    assert beginning("x" * 99, most) == "x" * (most - 1) + "…"
