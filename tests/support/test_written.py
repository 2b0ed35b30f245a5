"""Values as names and tables show them: names lose nothing, and tables keep apart what differs."""

import math

import pytest

from diffrl.support.written import exact, short


@pytest.mark.parametrize("value", [0.1, 1e9, 3.0652762117628294, -2.5e-7, 12345.0, 1 / 3, 1e-300, 123456.75])
def test_an_exact_number_reads_back_as_itself(value: float) -> None:
    assert float(exact(value)) == value


@pytest.mark.parametrize("value", [0.7, 1e9, 3.0652762117628294, -2.5123456789e-7, 12345.0, 2 / 3, 123456.75])
def test_a_short_number_is_within_half_a_unit_of_its_fourth_digit(value: float) -> None:
    (text,) = short([value])
    assert math.isclose(float(text), value, rel_tol=5e-4)
    assert len(text) <= len(exact(value))
    assert len(text.lstrip("-").partition("e")[0].replace(".", "").lstrip("0")) <= 6


def test_what_differs_is_written_differently() -> None:
    close = [0.30000000000000004, 0.3000001234, 0.3, 0.31234567]
    assert len(set(short(close))) == 4
    assert short(close)[2] == "0.3"
    assert short([0.30000001234, 0.51234567]) == ["0.3", "0.5123"]
    assert short([0.123456789, 0.123456789]) == ["0.1235", "0.1235"]


def test_what_is_no_float_stays_whole() -> None:
    values = [None, True, 1_000_000, "mean", (1, 2.5), 1e9]
    assert (
        short(values) == [exact(value) for value in values] == ["none", "true", "1000000", "mean", "[1,2.5]", "1e+09"]
    )
