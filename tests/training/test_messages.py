"""Messages between a run and its workers: what is sent is what arrives, and nothing else is taken for a message."""

import dataclasses
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import safetensors.torch
import torch

from diffrl.training.messages import (
    Advance,
    Channel,
    Done,
    Failed,
    HoldSeeds,
    LoadState,
    Message,
    Progressed,
    ReadState,
    ReadSums,
    Reply,
    Request,
    ResetSums,
    Said,
    ScoreSeed,
    ScoreSeeds,
    StartScoring,
    StartTraining,
)
from diffrl.training.workers import Crew

TENSORS = {
    "z": torch.tensor([[0.1, float("nan")], [-0.0, float("inf")]], dtype=torch.float64),
    "counter": torch.tensor(3),
    "a": torch.arange(6, dtype=torch.uint8)[::2],
    "none": torch.zeros(0, 4),
}
MESSAGES: list[Message] = [
    StartTraining("runs/ä b", '{"id": "Own-v0"}', (0, 7), 5, True),
    Advance(12),
    ReadSums(),
    ResetSums(),
    ReadState(),
    LoadState(3, TENSORS),
    HoldSeeds((1, 0), TENSORS),
    ScoreSeeds(50),
    StartScoring("runs/name", ""),
    ScoreSeed(50, 7),
    Done(),
    Done(TENSORS),
    Failed("two\nlines", 130),
    Progressed(2, 40),
    Said("[yellow]a word[/]"),
]


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """Both ends of a socket."""
    channels = [Channel.of(end.detach()) for end in socket.socketpair()]
    yield channels[0], channels[1]
    for channel in channels:
        channel.wire.close()


def test_every_message_arrives_as_it_was_sent(ends: tuple[Channel, Channel]) -> None:
    """Types, values and tensors to the bit, in the order of their names; one after another over the same socket."""
    assert {type(message) for message in MESSAGES} == {*get_args(Request), *get_args(Reply)}
    ours, theirs = ends
    for sent in MESSAGES:
        ours.send(sent)
        received = theirs.receive()
        assert type(received) is type(sent)
        before, after = ({f.name: getattr(m, f.name) for f in dataclasses.fields(m)} for m in (sent, received))
        tensors, arrived = before.pop("tensors", {}), after.pop("tensors", {})
        assert before == after
        assert list(tensors) == list(arrived)
        for name, tensor in tensors.items():
            assert arrived[name].dtype == tensor.dtype
            assert arrived[name].shape == tensor.shape
            assert arrived[name].numpy().tobytes() == tensor.contiguous().numpy().tobytes()


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({"message": "Advnace", "tensors": [], "steps": 3}, "Advnace"),
        ({"message": "Message", "tensors": [], "steps": 3}, "Message"),
        ({"tensors": [], "steps": 3}, "'message'"),
        ({"message": "Advance", "steps": 3}, "'tensors'"),
        ({"message": "Advance", "tensors": []}, "'steps'"),
        ({"message": "Advance", "tensors": [], "step": 3}, "did you mean 'steps'"),
        ({"message": "Advance", "tensors": [], "steps": "3"}, "expected a whole number"),
        ({"message": "Advance", "tensors": [], "steps": True}, "expected a whole number"),
        ({"message": "StartScoring", "tensors": [], "run": "runs/name", "environment": None}, "expected text"),
        ({"message": "LoadState", "tensors": [], "step": 3}, "'tensors'"),
        ({"message": "Advance", "tensors": ["a"], "steps": 3}, "'tensors'"),
        ({"message": "Done", "tensors": ["b"]}, "'b'"),
        (["Advance", 3], '["Advance", 3]'),
    ],
)
def test_what_is_no_message_is_an_error(ends: tuple[Channel, Channel], header: object, reason: str) -> None:
    ours, theirs = ends
    ours.wire.send_bytes(json.dumps(header).encode())
    ours.wire.send_bytes(safetensors.torch.save({"a": torch.zeros(2)}))
    with pytest.raises(ValueError, match="no known form") as caught:
        theirs.receive()
    assert reason in str(caught.value)


@pytest.mark.parametrize("parts", [[b"\x80\x04K\x01."], [b'{"message": "Done", "tensors": ["a"]}', b"\x80\x04K\x01."]])
def test_no_pickle_is_read(ends: tuple[Channel, Channel], parts: list[bytes]) -> None:
    for part in parts:
        ends[0].wire.send_bytes(part)
    with pytest.raises(ValueError, match="no known form"):
        ends[1].receive()


def test_a_closed_socket_is_no_message(ends: tuple[Channel, Channel]) -> None:
    ends[0].wire.close()
    with pytest.raises(EOFError):
        ends[1].receive()


def test_a_worker_that_sends_requests_is_an_error(tmp_path: Path) -> None:
    code = """
import sys
from diffrl.training.messages import Advance, Channel
channel = Channel.of(int(sys.argv[1]))
channel.receive()
channel.send(Advance(3))
channel.receive()
"""
    crew = Crew((sys.executable, "-c", code), ["an odd one"], tmp_path)
    try:
        with pytest.raises(ValueError, match=r"a request: Advance\(steps=3\)"):
            crew.ask({0: ReadSums()})
    finally:
        crew.kill()
        crew.close()


def test_a_worker_hears_signals_before_it_imports_what_takes_seconds() -> None:
    """Whoever stops a run a moment after its start signals its workers too: they are not to die of it."""
    code = "import sys, diffrl.runs.workers; print(*{'numpy', 'torch', 'gymnasium', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
