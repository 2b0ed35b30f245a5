"""A worker to which something happens, for tests: `python -m tests.training.odd_worker WHAT SOCKET PARENT`."""

import sys
from typing import Any

from diffrl.runs import workers


def diverges() -> None:
    """Seed 2 meets an infinite reward after 110 steps."""
    from agents.diffusion_ql import DiffusionQLAgent

    update = DiffusionQLAgent.update

    def poisoned(self, batch, generator, phase=0):  # type: ignore[no-untyped-def]
        if 2 in self.seeds and int(self.step) == 110:
            batch.rewards[list(self.seeds).index(2)] = float("inf")
        return update(self, batch, generator, phase)

    DiffusionQLAgent.update = poisoned  # type: ignore[method-assign]


def refuses() -> None:
    """Seed 2 cannot be trained, for a reason that the user can mend."""
    from diffrl.support.errors import UserError

    fails(UserError("Seed 2 would rather not: try another."))


def crashes() -> None:
    """Seed 2 meets an error of ours."""
    fails(RuntimeError("an accident in the engine room"))


def fails(error: Exception) -> None:
    def start(self: Any, request: Any) -> None:
        if 2 in request.seeds:
            raise error

    workers._Worker._start_training = start  # type: ignore[method-assign]


if __name__ == "__main__":
    what, descriptor, parent = sys.argv[1:]
    {"diverges": diverges, "refuses": refuses, "crashes": crashes}[what]()
    workers.main(int(descriptor), int(parent))
