"""A stack of seeds that fine-tunes, with tensors of its own beside the agent's in a checkpoint."""

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from diffrl.data.transitions import Source
from diffrl.nets import copy_state_
from diffrl.support.errors import UserError
from diffrl.training.checkpoint import part
from diffrl.training.stack import Evaluate, Learner, StackTrainer
from diffrl.tuning.acting import OWN

BatchT = TypeVar("BatchT")
BatchT_contra = TypeVar("BatchT_contra", contravariant=True)


class OwningLearner(Learner[BatchT_contra], Protocol[BatchT_contra]):
    """A `Learner` whose `state_dict` is the agent's alone, so that a checkpoint of it is one of the agent."""

    def own_state(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides: the optimiser's tensors, and those of frozen networks."""


class OwningTrainer(StackTrainer[BatchT]):
    """A `StackTrainer` whose checkpoints hold the learner's own tensors too; its steps are updates.

    learner, source, batch_size: what learns, what from, how much at once. say: hears a sentence for the user, where
    updates tell by a metric `no_signal` that nothing was learned from. The rest are arguments of `StackTrainer`.
    """

    def __init__(
        self,
        learner: OwningLearner[BatchT],
        source: Source[BatchT],
        batch_size: int,
        generator: torch.Generator,
        evaluate: Evaluate | None = None,
        *,
        capture: bool = True,
        on_close: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        super().__init__(learner, source, batch_size, generator, evaluate, capture=capture, on_close=on_close)
        self._own_state = learner.own_state
        self._say, self._said = say, False

    @override
    def advance(self, steps: int, stop: Callable[[], bool]) -> int:
        before = self._silent()
        made = super().advance(steps, stop)
        after = self._silent()
        if not self._said and after is not None:
            since = after if before is None else after - before
            silent = [seed for seed, n in zip(self.seeds, since.tolist(), strict=True) if n >= made]
            if silent:
                self._said = True
                self._say(
                    f"[yellow]The critics tell no actions of a state apart (seed {', '.join(map(str, silent))}), so "
                    "there is nothing to learn: until they do, the policy stays as it is (said once; `no_signal` in "
                    "metrics.csv).[/]"
                )
        return made

    def _silent(self) -> Tensor | None:
        """How many updates had no signal, since the sums were reset: (S,); None: not known, or of no more interest."""
        if self._said or "no_signal" not in self.sums():
            return None
        return self.sums()["no_signal"].clone()

    @override
    def state(self) -> dict[str, Tensor]:
        return super().state() | {f"{OWN}{name}": tensor for name, tensor in self._own_state().items()}

    @override
    def load(self, state: Mapping[str, Tensor], step: int) -> None:
        try:
            copy_state_(self._own_state(), part(state, OWN))
        except ValueError as error:
            raise UserError(str(error)) from error
        super().load({name: tensor for name, tensor in state.items() if not name.startswith(OWN)}, step)
