"""Means and their errors."""

import numpy as np
import pytest

from diffrl.runs.export.card import _metric
from diffrl.runs.report import print_evaluation
from diffrl.support.statistics import estimate


def test_one_seed_has_its_error_over_episodes() -> None:
    found = estimate([[1.0, 2.0, 3.0, 6.0]])
    assert found.mean == 3.0
    assert found.error == pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2)
    assert found.over == "episodes"


def test_several_seeds_have_theirs_over_seeds() -> None:
    found = estimate([[1.0, 3.0], [5.0, 7.0]])
    assert found.mean == 4.0
    assert found.error == pytest.approx(2.0)  # of 2 and 6
    assert found.over == "seeds"


def test_what_rounds_to_zero_is_written_without_a_sign() -> None:
    for values, said in (
        ([[-0.01]], "0.0 (one episode: no ±)"),
        ([[-0.01, -0.03]], "0.0 ± 0.0"),
        ([[-0.06]], "-0.1 (one episode: no ±)"),
    ):
        assert estimate(values).explained == said
    assert str(estimate([[-0.01]])) == "0.0"


def test_the_tables_and_the_card_write_no_negative_zero(capsys: pytest.CaptureFixture[str]) -> None:
    returns = np.array([[-0.01, -0.03]])
    for reference in (None, "hopper-medium-v2"):
        entry = {"seeds": [0], "step": [4], "returns": returns, "scores": returns}
        print_evaluation({"last": entry}, reference, True, 2)
        said = capsys.readouterr().out
        assert "0.0 ± 0.0" in said
        assert "-0.0" not in said
    assert _metric("mean_return", "Mean return", returns / 10)["value"].startswith("0.00 +/-")
