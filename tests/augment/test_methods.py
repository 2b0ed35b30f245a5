"""A method of another package as a verb of `diffrl augment`: what it says, takes, writes, and refuses.

The package is the recipe of CONTRIBUTING.md.
"""

import contextlib
import hashlib
import os
import re
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffrl.augment import methods
from diffrl.cli import main
from diffrl.commands.augment import VERBS
from diffrl.data import d4rl
from diffrl.data.offline import OfflineDataset
from diffrl.support import plugins
from diffrl.support.errors import UserError
from tests.documents import ROOT, blocks
from tests.support.plugin_cases import install

SOURCES = {
    name.removeprefix("# ").removesuffix(".py"): block.text
    for block in blocks(ROOT / "CONTRIBUTING.md")
    for name in [block.text.partition("\n")[0]]
    if block.language == "python" and name in ("# mine_augment.py", "# mine_gaussian.py")
}
OPTIONS, ROWS = SOURCES["mine_augment"], SOURCES["mine_gaussian"]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on Python's path that packages are installed into."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("COLUMNS", "200")
    before = set(sys.modules)
    yield folder
    for module in set(sys.modules) - before:
        if module.startswith(("mine_", "odd_")):
            sys.modules.pop(module)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """s normal, a = s / 2: 600 rows, one an episode."""
    s = np.random.default_rng(0).normal(size=(600, 1)).astype(np.float32)
    none = np.zeros(len(s), bool)
    return d4rl.write(tmp_path / "source.hdf5", OfflineDataset(s, s / 4, s[:, 0].copy(), none, ~none, s))


def bring(site: Path, options: str = OPTIONS, rows: str = ROWS, verb: str = "gaussian", name: str = "Gaussian") -> None:
    """Install a package whose modules have names used once."""
    digest = hashlib.sha256((options + rows).encode()).hexdigest()[:8]
    one, other = f"odd_augment_{digest}", f"odd_gaussian_{digest}"
    modules = {one: options.replace("mine_gaussian", other), other: rows}
    install(site, "toy-package", {"diffrl.augmenters": {verb: f"{one}:{name}"}}, **modules)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with contextlib.suppress(SystemExit):  # as --help ends
        main([*words])
    return " ".join("".join(capsys.readouterr()).replace("│", " ").split())


def test_it_is_a_verb_like_any_other(site: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Listed, explained and tried; cut in its training it goes on, and the file is that of the uncut command."""
    bring(site)
    assert "Of other packages: gaussian (toy-package)." in said(capsys, "augment", "--help")
    explained = said(capsys, "augment", "gaussian", "--help")
    for part in (
        "usage: diffrl augment gaussian [-h] [OPTIONS] DATASET",
        "--steps INT",
        "Training steps, a batch of 64",
    ):
        assert part in explained
    assert "gaussian of toy-package" in said(capsys, "doctor")
    words = ["augment", "gaussian", str(source), "--samples", "1200", "--seed", "3", "--no-report"]
    whole, cut = source.parent / "whole.hdf5", source.parent / "cut.hdf5"
    assert main([*words, "--out", str(whole)]) == 0
    text = said(capsys, *words, "--out", str(whole))
    assert "exists; what wrote it is finished" in text
    module: Any = sys.modules[next(name for name in sys.modules if name.startswith("odd_gaussian"))]
    update, calls = module.Moments.update, []

    def until_100(self: Any, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 100:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, *given)

    module.Moments.update = until_100
    assert main([*words, "--out", str(cut)]) == 130
    assert "saved. The same command goes on." in "".join(capsys.readouterr())
    module.Moments.update = update
    assert main([*words, "--out", str(cut)]) == 0
    first, second = (d4rl.read(path) for path in (whole, cut))
    for column, values in first.columns().items():
        np.testing.assert_array_equal(values, second.columns()[column])
    assert first.metadata["algorithm"] == "A Gaussian (Gauss 1809), toy-package 1.0"


def test_in_python_it_needs_no_entry_point(source: Path) -> None:
    """It is of the package that its class is in."""
    names: dict[str, Any] = {}
    exec(ROWS, names)
    rows = names["GaussianRows"]

    @dataclass(frozen=True)
    class Here(methods.Method):
        def augmenter(self) -> Any:
            return rows(20)

    out = Here(str(source), str(source.parent / "here.hdf5"), samples=500, report=False).write(quiet=True)
    assert len(made := d4rl.read(out)) == 500
    assert made.metadata["algorithm"] == f"A Gaussian (Gauss 1809), {__name__.partition('.')[0]}"


@pytest.mark.parametrize(
    ("options", "rows", "name", "why"),
    [
        ("raise ImportError('of no use')", ROWS, "Gaussian", "its import fails with ImportError: of no use"),
        ("Gaussian = 3", ROWS, "Gaussian", "it is 3; expected a subclass of diffrl.augment.methods.Method"),
        (OPTIONS, ROWS, "Method", "the class has no method `augmenter`"),
        (OPTIONS.replace("@dataclass(frozen=True)\n", ""), ROWS, "Gaussian", r"not a @dataclass\(frozen=True\)"),
        (OPTIONS.replace("def augmenter", "def other"), ROWS, "Gaussian", "no method `augmenter`"),
        (
            OPTIONS.replace("return GaussianRows(self.steps)", "return 5"),
            ROWS,
            "Gaussian",
            "gives 5; expected a",
        ),
        (OPTIONS.replace("self.steps)", "self.stops)"), ROWS, "Gaussian", "AttributeError: .*'stops'"),
        (OPTIONS, ROWS.replace('"gaussian"', '"gauss"'), "Gaussian", "verb is 'gauss'; expected 'gaussian'"),
        (OPTIONS, ROWS.replace("def held_out_loss", "def loss"), "Gaussian", "abstract .*held_out_loss"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(
    site: Path, source: Path, capsys: pytest.CaptureFixture[str], options: str, rows: str, name: str, why: str
) -> None:
    """In one line, before anything is made, by the verb and by `diffrl doctor`."""
    bring(site, options, rows, name=name)
    out = source.parent / "new.hdf5"
    assert main(["augment", "gaussian", str(source), "--out", str(out)]) == 2
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1
    with pytest.raises(UserError, match=f"The augmenter 'gaussian' of toy-package .* cannot be used: .*{why}"):
        raise UserError(text)
    assert sorted(path.name for path in source.parent.iterdir()) == ["site", "source.hdf5"]
    (plugin,) = plugins.found("diffrl.augmenters")
    with pytest.raises(UserError, match=why):
        methods.tried_out(plugin, VERBS)


@pytest.mark.parametrize(
    ("was", "gives", "why"),
    [
        ("return rows", "return rows[:, :3]", "GaussianRows.sample {at} gives ndarray float32 (500, 3); expected"),
        ("return rows", "return rows.astype(float)", "gives ndarray float64 (500, 5); expected ndarray float32"),
        ("return rows", "return torch.tensor(rows)", "gives Tensor torch.float32 torch.Size([500, 5]); expected"),
        ("return rows", "return rows.tolist()", "gives list; expected ndarray float32 (500, 5), its `chunk` and"),
        ("return rows", "return rows * float('nan')", "not finite: 500 of 500 of GaussianRows.sample {at}."),
        ("return rows", "rows[7:9, -2] = 1e39; return rows", "not finite: 2 of 500 of GaussianRows.sample {at}."),
        ("noise = ", "noise = 1 / 0; ", "GaussianRows.sample fails with ZeroDivisionError: division by zero {at}"),
        ("rows = rows_of(batch)\n", "raise KeyError('x')\n", "Moments.update fails with KeyError: 'x' {at}"),
        ('{"step": self.step, ', "1 / 0, {", "Moments, asked for its state, fails with ZeroDivisionError"),
        (
            "self.moments = Mom",
            "1 / 0, Mom",
            "GaussianRows.trainer fails with ZeroDivisionError: division by zero {at}",
        ),
        ("self.seed, self.action_bounds = ", "held_out = {}[seed] = ", "GaussianRows.open fails with "),
        ("return [float(", "return [batch(", "GaussianRows.held_out_loss fails with NameError: name 'batch' is not "),
        (
            "    def load(",
            "    def table(self, rows):\n        return {'rewards': rows[:, 0] / 0}\n\n    def load(",
            "not finite: 500 of 500 of GaussianRows.table {at}.",
        ),
    ],
)
def test_what_breaks_an_augmenters_contract_is_named(
    site: Path, source: Path, capsys: pytest.CaptureFixture[str], was: str, gives: str, why: str
) -> None:
    """In one line: its method, its package, where that is; nothing is written, and what was there before stays."""
    assert was in ROWS
    bring(site, rows=ROWS.replace(was, gives))
    out = source.parent / "new.hdf5"
    out.write_bytes(b"before")
    words = ["augment", "gaussian", str(source), "--steps", "20", "--samples", "500", "--no-report", "--force"]
    with np.errstate(all="ignore"):
        assert main([*words, "--out", str(out)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "The augmenter " in line]
    assert "The augmenter 'gaussian' of toy-package" in line
    before, _, after = why.partition("{at}")
    assert before in line
    if "{at}" in why:
        rest = line.split(before, 1)[1]
        assert re.match(rf"\({site}/odd_gaussian_[0-9a-f]+\.py, line \d+\){re.escape(after)}", rest)
    assert out.read_bytes() == b"before"
    assert not [path for path in source.parent.iterdir() if path.name.startswith(".")]


def test_names(site: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name of ours stays ours, and that is said; a slip of the keys is told the nearest, of whichever package."""
    bring(site)
    text = said(capsys, "augment", "gausian", str(source))
    assert f"did you mean `diffrl augment gaussian {source}`?" in text
    install(site, "other-package", {"diffrl.augmenters": {"synther": "nowhere:Toy"}})
    text = said(capsys, "augment", "synther", str(source), "--out", str(source))
    assert "The augmenter 'synther' of other-package (nowhere:Toy) cannot be used: the name is that of one of" in text
    assert "exists; what wrote it is finished" in text
    install(site, "third-package", {"diffrl.augmenters": {"gaussian": "nowhere:Toy"}})
    assert "brings one of the same name" in said(capsys, "augment", "gaussian", str(source), "--out", "new.hdf5")
