"""A worker to which something happens, for tests: `python -m tests.training.odd_worker WHAT SOCKET PARENT`."""

import sys

from diffrl import worker


def main() -> None:
    what, descriptor, parent = sys.argv[1:]
    from agents.diffusion_ql import DiffusionQLAgent
    from diffrl.errors import UserError

    update = DiffusionQLAgent.update

    def odd(self, batch, generator):  # type: ignore[no-untyped-def]
        if 1 in self.seeds and int(self.step) == 110:
            if what == "refuses":
                raise UserError("Seed 1 would rather not: try another.")
            if what == "crashes":
                raise RuntimeError("an accident in the engine room")
            batch.rewards[list(self.seeds).index(1)] = float("inf")
        return update(self, batch, generator)

    DiffusionQLAgent.update = odd  # type: ignore[method-assign]
    worker.main(int(descriptor), int(parent))


if __name__ == "__main__":
    main()
