"""One thread a process: on two busy cores a second thread makes every step slower.

And no waiting for the disk, which the suite would do tens of thousands of times, several milliseconds each. That files
are on the disk before they are renamed is `tests/support/test_files.py`'s to test.
"""

import gc
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
os.fsync = lambda fd: None  # of this process: those that tests start wait


def pytest_collection_finish() -> None:
    """What the imports made stays: the garbage collector need not walk through it, again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the data sets that tests generate, shared by the session."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def own_data(monkeypatch: pytest.MonkeyPatch, data_directory: Path) -> Path:
    """`$DIFFRL_DATA` set to the session's folder, so that no test touches the user's."""
    monkeypatch.setenv("DIFFRL_DATA", str(data_directory))
    return data_directory
