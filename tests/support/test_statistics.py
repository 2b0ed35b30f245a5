"""Means and their errors."""

import numpy as np
import pytest

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
