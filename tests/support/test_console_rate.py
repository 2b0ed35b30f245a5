"""What is said of the speed of slow work."""

from types import SimpleNamespace

import pytest
from rich.markup import escape

from diffrl.support import console


@pytest.mark.parametrize(("speed", "said"), [(0.206, "0.21"), (3.44, "3.4"), (12.4, "12"), (1234.5, "1,234")])
def test_a_rate_below_one_is_not_said_to_be_none(speed, said):
    assert console._rate(speed) == said


def test_an_evaluation_that_training_waits_for_says_how_far_its_episodes_are(monkeypatch, capsys):
    """Every 20 s, parts of episodes counted; not beside steps that go on, nor once all are finished, nor if quiet."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock.now))
    for quiet in (False, True):
        with console.steps_bar(10, 0, "Trying", ("loss",), quiet) as bar:
            for when, done in ((100, 0.0), (115, 0.1), (130, 0.25), (140, 0.5), (160, 1.5), (190, 2)):
                clock.now = when
                if when == 100:
                    bar.progress(5)
                bar.episodes(done, 2)
            for when, done in ((250, 0.0), (260, 0.5), (300, 0.75), (330, 2)):
                clock.now = when
                bar.progress(6)
                bar.episodes(done, 2)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("evaluating")]
        expected = [
            "evaluating: 0/2 episodes, 12% in all  3.5 min left",
            "evaluating: 1/2 episodes, 75% in all  0.3 min left",
        ]
        assert lines == [] if quiet else lines == expected


def test_the_first_line_of_a_long_loop_comes_soon_and_says_how_long_it_takes(monkeypatch, capsys):
    """After 5 s, and then every 20 s with numbers; none of a short loop, of a finished one, nor if quiet."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock.now))
    for quiet, end, expected in (
        (False, 40, ["step 12/100  2 steps/s  0.7 min left", "step 60/100  2 steps/s  0.3 min left  loss 1"]),
        (False, 5, []),
        (True, 40, []),
    ):
        clock.now = 0.0
        with console.steps_bar(100, 0, "Trying", ("loss",), quiet) as bar:
            while clock.now < end:
                step = round(2 * clock.now)
                if step and not step % 20:
                    bar.metrics(step, {"loss": [1.0]})
                bar.progress(step)
                clock.now += 1
            clock.now = 1000.0
            bar.progress(100)
        assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")] == expected


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


@pytest.mark.parametrize(
    "name",
    [
        "runs/iql[lr=3e-4]/b.png",
        "runs/a[/b]",
        "[x]",
        "a[/]b",
        "runs/:smile:",
        "[[a]]",
        "a[0]",
        "[bold]x[green",
        "C:[/red]",
    ],
)
def test_brackets_in_a_name_are_shown(name, capsys):
    """What the terminal shows of a name is the name, also within our own style, and escaped or not."""
    terminal = console.Terminal(width=200, highlight=False)
    if "[bold]" not in name:  # which is a tag of ours
        terminal.print(f"picture: {name}")
        assert capsys.readouterr().out == f"picture: {name}\n"
    terminal.print(f"picture: {escape(name)}")
    assert capsys.readouterr().out == f"picture: {name}\n"
    console.console.print(f"[yellow]{(bare := name.replace('[bold]', ''))}: look[/]")
    assert capsys.readouterr().err == f"{bare}: look\n"


def test_our_own_styles_are_styles(capsys):
    terminal = console.Terminal(width=200, highlight=False, force_terminal=True)
    terminal.print("[yellow]look[/] here[x]")
    assert capsys.readouterr().out == "\x1b[33mlook\x1b[0m here[x]\n"
