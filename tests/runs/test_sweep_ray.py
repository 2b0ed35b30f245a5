"""A sweep on a Ray cluster of two nodes: one is killed in the middle of its run, and nothing is lost."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import diffrl
from diffrl.runs.sweep.state import state_of
from diffrl.support.folder import steps
from tests.runs.sweep_cases import GRID, runs, start, wait_for
from tests.training.conftest import assert_same_run

pytestmark = [pytest.mark.usefixtures("own_data"), pytest.mark.slow]


@pytest.fixture
def order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the environment of the runs asks; nodes that are started now know it."""
    file = tmp_path / "order"
    file.write_text("hold")
    monkeypatch.setenv("DIFFRL_TEST_ORDER", str(file))
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    return file


@pytest.fixture
def cluster(order: Path, data_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without processors, on which nothing runs."""
    monkeypatch.setenv("DIFFRL_DATA", str(data_directory))
    utilities = pytest.importorskip("ray.cluster_utils")
    nodes = utilities.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        yield nodes
    finally:
        nodes.shutdown()


def test_a_node_that_is_killed_in_mid_run_loses_nothing(cluster: Any, order: Path, tmp_path: Path) -> None:
    """Each node has room for one run, and both are in their first evaluation when the second node is killed."""
    import dataclasses

    folder = tmp_path / "s"
    cluster.add_node(num_cpus=1)
    lost = cluster.add_node(num_cpus=1)
    process = start(*GRID, "--ray", cluster.address, "--out", str(folder))
    both = [folder / run.name for run in runs()]
    wait_for(lambda: all(50 in steps(path) for path in both), process, 240)
    assert process.poll() is None
    cluster.remove_node(lost, allow_graceful=False)
    order.write_text("")
    out, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert "2/2 done" in said
    assert out.count(" done") == 2
    logs = [(path / "log.txt").read_text() for path in both]
    assert sum("Resuming after" in log for log in logs) == 1
    for run in runs():
        whole = diffrl.train(dataclasses.replace(run.config, out=tmp_path / run.name), quiet=True)
        assert state_of(folder, run).kind == "done"
        assert_same_run(folder / run.name, whole)


def test_what_no_node_has_is_refused(cluster: Any, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=1)
    process = start(*GRID, "--ray", cluster.address, "--gpus-per-run", "1", "--out", str(tmp_path / "s"))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "No node of the cluster has 1 CPUs and 1 GPUs" in said.splitlines()[-1]
