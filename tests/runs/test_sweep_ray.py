"""A sweep on a Ray cluster of two nodes: one is killed in the middle of its run, and nothing is lost."""

import os
import signal
import socket
import subprocess
import sys
import time
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
    psutil = pytest.importorskip("psutil")
    below = psutil.Process(lost.all_processes["raylet"][0].process.pid).children(recursive=True)
    cluster.remove_node(lost, allow_graceful=False)
    # What ran on the node outlives it by a moment, in which it could still do what is ordered.
    assert not psutil.wait_procs(below, timeout=60)[1]
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


def test_an_address_at_which_nothing_listens_is_told_at_once(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    began = time.monotonic()
    process = start(*GRID, "--ray", f"127.0.0.1:{port}", "--out", str(tmp_path / "s"))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"No Ray cluster answers at 127.0.0.1:{port}: " in said.splitlines()[-1]
    assert time.monotonic() - began < 40


def test_a_stop_ends_the_wait_for_an_address_that_is_silent(tmp_path: Path) -> None:
    """Somebody listens there, and says nothing: Ray's own code would try on for minutes."""
    folder = tmp_path / "s"
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = start(*GRID, "--ray", f"127.0.0.1:{server.getsockname()[1]}", "--out", str(folder))
        server.settimeout(60)
        connection, _ = server.accept()
        time.sleep(3)  # until Ray itself tries
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
        connection.close()
    assert process.returncode == 130
    assert time.monotonic() - began < 10
    assert "gcs" not in said


def test_a_cluster_that_wants_its_token_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    """Refused without it, and with another; the line names what to set. A head of its own asks for tokens."""
    code = """if True:
        import ray, sys
        context = ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=10**8)
        print(context.address_info["address"], flush=True)
        sys.stdin.read()
    """
    env = {**os.environ, "HOME": str(tmp_path), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    head = subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert head.stdout is not None
        address = head.stdout.readline().strip()
        for given in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "1" * 64}):
            process = start(*GRID, "--ray", address, "--out", str(tmp_path / "s"), HOME=str(tmp_path), **given)
            _, said = process.communicate(timeout=120)
            assert process.returncode == 2
            assert f"The Ray cluster at {address} asks for its token" in said.splitlines()[-1]
            assert "RAY_AUTH_MODE=token" in said.splitlines()[-1]
            assert "InvalidAuthToken" not in said
    finally:
        head.communicate(timeout=60)
