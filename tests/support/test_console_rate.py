"""What is said of the speed of slow work."""

from types import SimpleNamespace

import pytest

from diffrl.support import console


@pytest.mark.parametrize(("speed", "said"), [(0.206, "0.21"), (3.44, "3.4"), (12.4, "12"), (1234.5, "1,234")])
def test_a_rate_below_one_is_not_said_to_be_none(speed, said):
    assert console._rate(speed) == said


def test_the_rate_leaves_out_what_came_before_the_first_piece(monkeypatch, capsys):
    """100 s of preparation, then 8 pieces in 40 s: 0.2 a second, so that the 16 that are left take 1.3 minutes."""
    now = 0.0
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now))
    with console.work("Trying", "images") as update:
        now = 100.0
        update(8, 32)
        now = 140.0
        update(16, 32)
    assert "Trying 16/32  0.2 images/s  1.3 min left" in capsys.readouterr().err
