"""What a run and its worker processes say to each other: a type for each request and reply, and the wire they take.

A message is a dataclass. Its fields travel as a JSON object, its tensors beside them as safetensors; nothing is ever
pickled. What arrives is checked against these types: anything else is a mistake in this program, and a ValueError.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import get_args

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from diffrl.support.errors import UserError
from diffrl.support.schema import checked

# --- requests ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartTraining:
    """Build the `Trainer` of some of a run's seeds, one stack, on which the other training requests act.

    run: the run's folder. environment: as JSON, what registers its environment in another process; "" where that needs
    nothing. rows: the descriptor of the file that holds the transitions. speaks: whether to say what all the workers
    of a run would say in the same words.
    """

    run: str
    environment: str
    seeds: tuple[int, ...]
    rows: int
    speaks: bool


@dataclass(frozen=True)
class Advance:
    """Make so many training steps."""

    steps: int


@dataclass(frozen=True)
class ReadSums:
    """Reply with the sums of metrics (S,) by name."""


@dataclass(frozen=True)
class ResetSums:
    """Start the sums of metrics anew."""


@dataclass(frozen=True)
class ReadState:
    """Reply with the trainer's state: all that a checkpoint needs."""


@dataclass(frozen=True)
class LoadState:
    """Put the trainer back to the state `tensors` after `step` steps."""

    step: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class HoldSeeds:
    """Put the seeds at `positions` in this worker to their part of `tensors`, a learner's, and keep them there."""

    positions: tuple[int, ...]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class ScoreSeeds:
    """Evaluate all the worker's seeds after `step` steps: reply with their `returns` (S, E)."""

    step: int


@dataclass(frozen=True)
class StartScoring:
    """Be ready to evaluate the checkpoints of a run; the fields are those of `StartTraining`."""

    run: str
    environment: str


@dataclass(frozen=True)
class ScoreSeed:
    """Evaluate one seed of the checkpoint of `step`: reply with its `returns` (E,)."""

    step: int
    seed: int


TrainerRequest = Advance | ReadSums | ResetSums | ReadState | LoadState | HoldSeeds | ScoreSeeds
Request = StartTraining | TrainerRequest | StartScoring | ScoreSeed

# --- replies -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Done:
    """The request is carried out; `tensors` are what it asks for."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """The request met a UserError: its text and exit code."""

    text: str
    exit_code: int


@dataclass(frozen=True)
class Progressed:
    """Before the end of an evaluation: `done` episodes of `total` are finished, parts of one counted."""

    done: float
    total: int


@dataclass(frozen=True)
class Said:
    """Before the end of a request: a sentence for the user."""

    text: str


Reply = Done | Failed | Progressed | Said

# --- the wire ------------------------------------------------------------------------------------------------------

Message = Request | Reply
_KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in (*get_args(Request), *get_args(Reply))}


class Channel:
    """Messages over a socket, in both directions. Raises EOFError or OSError where the other end is gone."""

    def __init__(self, wire: "connection.Connection[bytes, bytes]") -> None:
        self.wire = wire

    @classmethod
    def of(cls, descriptor: int) -> "Channel":
        """The channel over an open socket, which is this channel's from now on."""
        return cls(connection.Connection(descriptor))

    def send(self, message: Message) -> None:
        """Send a message."""
        values = {f.name: getattr(message, f.name) for f in dataclasses.fields(message)}
        tensors: Mapping[str, Tensor] = values.get("tensors", {})
        header = {"message": type(message).__name__, **values, "tensors": list(tensors)}
        self.wire.send_bytes(json.dumps(header).encode())
        if tensors:
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            self.wire.send_bytes(safetensors.torch.save(plain))

    def receive(self) -> Message:
        """Wait for a message. Raises ValueError for one that this file does not know."""
        header = self.wire.recv_bytes()
        try:
            values = json.loads(header)
            kind, names = _KINDS[values.pop("message")], values.pop("tensors")
            values = checked(kind, values, kind.__name__)
            if names:
                tensors = safetensors.torch.load(self.wire.recv_bytes())
                values["tensors"] = {name: tensors[name] for name in names}
            return kind(**values)
        except (UserError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ValueError(f"a message of no known form, {header[:200]!r}: {error}") from error
