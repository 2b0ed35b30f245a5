"""Flow-to-Better's page: how much more trajectories earn than their own sources."""

import flow_to_better
import pytest


def test_each_trajectory_is_held_against_its_own_source() -> None:
    """Differences 3, -1 and 4 of two cells: their mean is 2, with the standard error sqrt(7 / 3)."""
    cells = [
        {"executed": [4.0, 1.0], "source_executed": [1.0, 2.0]},
        {"executed": [9.0], "source_executed": [5.0]},
    ]
    found = flow_to_better.in_pairs(cells)
    assert found.mean == pytest.approx(2.0)
    assert found.error == pytest.approx((7 / 3) ** 0.5)
