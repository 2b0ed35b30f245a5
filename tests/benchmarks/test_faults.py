"""`benchmarks/faults.py` counts each case once and tells each goal that is missed; `soak.py`, growth from noise."""

from typing import Any

import faults
import numpy as np
import pytest
import soak


def case(became: str, number: int = 0, silent: bool = False, where: str = "") -> dict[str, Any]:
    made = {"kind": "npz", "number": number, "damage": "cut: to 3", "command": "data info x.npz", "where": where}
    return {**made, "became": became, "silent": silent, "grown": 0}


def figures(*cases: dict[str, Any], kills: str = "equal", disks: str = "clear error", then: str = "equal") -> Any:
    killed = [{"name": "train", "kills": 5, "became": kills, "left": [".x"]}]
    filled = [{"name": "train", "became": disks, "then": then}]
    about = {"git": "abc", "seconds": 60, "cpu": "a processor"}
    return faults.summary({"campaign": list(cases), "kills": killed, "disks": filled}) | {"about": about}


def test_the_page_has_the_counts_of_both_trees() -> None:
    now = figures(case("clear error"), case("equal load"), case("changed load"))
    before = figures(case("traceback", where="X @ a.py:1"), case("traceback", 1, where="Y @ a.py:1"), case("hang"))
    lines = faults.table({"now": now, "before": before})
    by_class = dict(zip(lines[0], lines[-1], strict=True))
    assert (by_class["cases"], by_class["traceback"], by_class["clear error"]) == ("3", "0 (2)", "1 (0)")
    page = faults.page({"now": now, "before": before})
    assert page.count("a.py:1") == 1  # a fault a place
    assert "5 kills in 1 chains; 1 ended equal" in page
    assert faults.missed(now) == []


def test_every_goal_can_be_missed() -> None:
    """A silent change counts as that alone, not as a changed load besides."""
    for became in ("traceback", "hang", "memory", "read outside", "unclear error"):
        assert len(faults.missed(figures(case(became)))) == 1
    silent = figures(case("changed load", silent=True))
    assert [faults.total(silent, name) for name in ("silent change", "changed load")] == [1, 0]
    assert len(faults.missed(silent)) == 1
    for wrong in ({"kills": "unequal"}, {"kills": "stuck"}, {"disks": "traceback"}, {"then": "stuck"}):
        assert len(faults.missed(figures(**wrong))) == 1


def test_tame_generators_are_told() -> None:
    """Those that find too little in the commit before."""
    found = [case("traceback", i) for i in range(99)] + [case(name) for name in ("hang", "memory", "read outside")]
    silent = case("changed load", silent=True)
    assert len(faults.tame(figures(*found, silent))) == 1
    assert faults.tame(figures(*found, case("traceback", 99), silent)) == []


def test_growth_is_told_from_noise() -> None:
    """The slope is that of NumPy's fit; a leak of 1 MB a minute is seen in an hour, noise of 5 MB is not."""
    rng = np.random.default_rng(0)
    times = np.arange(0, 3600, 5.0)
    noise = rng.normal(0, 5, len(times))
    for leak in (0.0, 1 / 60):
        resident = 400 + leak * times + noise
        samples = [(float(t), float(r), 30, 1) for t, r in zip(times, resident, strict=True)]
        assert soak.stated(samples, 1_000)[1] is (leak == 0)
    (expected, _), covariance = np.polyfit(times, resident, 1, cov=True)
    found, error = soak.slope(list(times), list(resident))
    assert found == pytest.approx(expected, rel=1e-9)
    assert error == pytest.approx(covariance[0, 0] ** 0.5, rel=1e-9)


def test_open_files_that_grow_are_told() -> None:
    """One more in ten minutes."""
    samples = [(float(t), 400.0, 30 + t // 600, 1) for t in range(0, 7200, 5)]
    assert not soak.stated(samples, 1_000)[1]
    assert soak.stated([(t, r, 30, n) for t, r, _, n in samples], 1_000)[1]
