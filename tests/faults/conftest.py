"""benchmarks/ is a folder of scripts, not a package: its modules are found by putting it on the path."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
if BENCHMARKS not in sys.path:
    sys.path.insert(0, BENCHMARKS)


@pytest.fixture(autouse=True, scope="session")
def _own_environment() -> Iterator[None]:
    """The sound inputs set caches and stores, which tests elsewhere are not to meet."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
