"""Samples of the campaign, whose whole is `make campaign`: no traceback, no hang, nothing silent, nothing outside."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import disks, forked, kills
from tests.faults.campaign import Campaign, numbers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children are watched by Linux's /proc and inotify")

WRONG = (forked.UNCLEAR, forked.TRACEBACK, forked.HANG, forked.BLOWUP, forked.OUTSIDE)
QUICK = {
    "HDF5 of ours, bytes": (0, 1),
    "HDF5, structure": (0, 4),
    "HDF5, links": (4, 14, 15),
    "npz, members": (3, 35),
    "run, train": (2, 17),
    "labels": (0, 1, 2, 7),
}
"""Of some kinds the numbers of cases; all but the first kind's went wrong on the commit before."""


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    return Campaign(tmp_path_factory.mktemp("campaign"), tuple(QUICK))


@pytest.mark.long
@pytest.mark.parametrize("kind", QUICK)
def test_a_few_damages(kind: str, campaign: Campaign) -> None:
    """Huge sizes, links to elsewhere, odd archives, a damaged best checkpoint; the rest are slow."""
    for number in QUICK[kind]:
        made = campaign.make(kind, number)
        assert made.became not in WRONG, made
        assert not made.silent, made


@pytest.mark.slow
def test_many_damages(tmp_path: Path) -> None:
    """Of every kind."""
    campaign = Campaign(tmp_path)
    made = [campaign.make(*case) for case in numbers(500, 0, 1)]
    assert [one for one in made if one.became in WRONG or one.silent] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", kills.CHAINS)
def test_kill_9(name: str, tmp_path: Path) -> None:
    """Every chain of kills ends equal to an uncut run."""
    killer = kills.Killer(tmp_path, (name,))
    ended = [killer.chain(name, number) for number in range(2)]
    assert [one for one in ended if one.became != "equal"] == []
    assert sum(one.kills for one in ended)


@pytest.mark.slow
@pytest.mark.parametrize("name", disks.WORDS)
def test_full_disks(name: str, tmp_path: Path) -> None:
    """A clear error where the disk is full, and equal bytes once it is not."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "tests.faults.disks",
        str(tmp_path),
        str(tmp_path / "to"),
        "6",
        name,
    ]
    root = Path(__file__).parents[2]
    paths = os.environ | {"PYTHONPATH": os.pathsep.join((str(root), str(root / "benchmarks")))}
    made = subprocess.run(command, cwd=root, env=paths, capture_output=True, text=True, check=False)
    if made.returncode == disks.NOT_POSSIBLE:
        pytest.skip("no file system can be mounted here")
    assert made.returncode == 0, made.stderr
    lines = [json.loads(line) for line in (tmp_path / "to").read_text().splitlines()]
    assert len(lines) == 6
    assert [one for one in lines if one["became"] not in (forked.ERROR, forked.EQUAL) or one["then"] != "equal"] == []
