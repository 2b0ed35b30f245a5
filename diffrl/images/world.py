"""Several processes that share a run's images: who has which, and how results come together. By accelerate."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.support.errors import UserError


class World:
    """The processes of a run, each with its share of every round's units; one process by default.

    All random numbers belong to a sample and not to a process, and gradients are sums over samples: so the number of
    processes changes a run by rounding alone.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.device = torch.device(device)
        self._accelerator: Any = None
        if self.size > 1:
            try:
                from accelerate import Accelerator
            except ImportError as error:
                raise UserError("Several processes need accelerate: pip install 'diffrl[images]'.") from error
            self._accelerator = Accelerator(cpu=self.device.type == "cpu")
            self.device = self._accelerator.device

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def share(self, n: int) -> Tensor:
        """The units, of n, that are this process's: every size-th."""
        return torch.arange(self.rank, n, self.size)

    def merge(self, values: Tensor, index: Tensor, n: int) -> Tensor:
        """The values (n, ...) of all units, from each process's own at `index`; the same on all processes."""
        whole = values.new_zeros(n, *values.shape[1:])
        whole[index.to(values.device)] = values
        return whole if self.size == 1 else self._sum(whole)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, all of them in one exchange."""
        tensors = list(tensors)
        if self.size == 1 or not tensors:
            return
        flat = self._sum(torch.cat([tensor.flatten() for tensor in tensors]))
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over the processes; a parameter that had none here takes part as zero."""
        parameters = list(parameters)
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.sum_([parameter.grad for parameter in parameters if parameter.grad is not None])

    def union(self, names: Iterable[str]) -> list[str]:
        """The names that any of the processes has, in order."""
        if self.size == 1:
            return sorted(names)
        from accelerate.utils import gather_object

        with _together():
            return sorted(set(gather_object(list(names))))

    def any(self, flag: bool) -> bool:
        """Whether it holds on any of the processes."""
        count = torch.tensor([float(flag)], device=self.device)
        self.sum_([count])
        return bool(count > 0)

    def told(self, text: str) -> str:
        """The main process's text, on all of them."""
        if self.size == 1:
            return text
        from accelerate.utils import broadcast_object_list

        with _together():
            result: str = broadcast_object_list([text])[0]
        return result

    def barrier(self) -> None:
        """Wait for the others."""
        if self._accelerator is not None:
            with _together():
                self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the others in order."""
        if self._accelerator is not None:
            self._accelerator.end_training()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    def _sum(self, tensor: Tensor) -> Tensor:
        with _together():
            result: Tensor = self._accelerator.reduce(tensor, reduction="sum")
        return result


class LostProcess(UserError):
    """Another process of the run has ended: what went wrong is said there."""

    exit_code = 1


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """An exchange, which fails as soon as another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcess("Another process of this run has ended, and so this one does; see above for why.") from error
