"""The processes of a run: what each has a share of, and what they tell each other."""

import contextlib
import inspect
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.images.launch import meet
from diffrl.images.model import Tuned
from diffrl.support.errors import UserError, first_line, out_of_memory
from diffrl.support.stopping import Stopped, stop_signals


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
            with stop_signals() as stopped:
                with _together():
                    meet(stopped)
                self._accelerator = Accelerator(cpu=self.device.type == "cpu")
                if stopped():
                    raise Stopped
            self.device = self._accelerator.device

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def share(self, n: int) -> Tensor:
        """The numbers, of n units, of those that are this process's: every size-th."""
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

    def shard(self, tuned: Tuned) -> None:
        """Share the network's frozen weights out: each process keeps a part, and a block's are together while it runs.

        FSDP2 (`torch.distributed.fsdp.fully_shard`) of all that is not trained; what is, the adapters, every process
        has whole, and its gradients are summed as ever. So it has the little that diffusers keeps in another precision,
        which FSDP2 of older versions of PyTorch does not mix. From then on all processes must call the network equally
        often.

        Raises UserError for a model of two networks, each of which is called for some of the rows only; and where
        PyTorch is too old.
        """
        if hasattr(tuned.network, "transformer_2"):
            raise UserError(
                "--shard is for models of one network: Wan 2.2's A14B has two, which processes call unequally often."
            )
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise UserError(f"--shard needs PyTorch 2.7 or newer; this is {torch.__version__}.")
        mesh = init_device_mesh(self.device.type, (self.size,))
        network, whole = tuned.network, set(tuned.parameters().values())
        whole |= {parameter for parameter in network.parameters() if parameter.dtype != network.dtype}
        blocks = [block for part in network.children() if isinstance(part, nn.ModuleList) for block in part]
        for module in (*blocks, network):
            fully_shard(module, mesh=mesh, ignored_params=whole)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over the processes; one that only others have is 0 here, and one that nobody has stays None.

        Of a gradient of zeros Adam would make a step all the same, by its momentum and its weight decay.
        """
        parameters = list(parameters)
        if self.size == 1 or not parameters:
            return
        have = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=self.device)
        self.sum_([have])
        gradients = []
        for parameter, n in zip(parameters, have.tolist(), strict=True):
            if n:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                gradients.append(parameter.grad)
        self.sum_(gradients)

    def union(self, names: Iterable[str]) -> list[str]:
        """The names that any of the processes has, sorted."""
        if self.size == 1:
            return sorted(names)
        from accelerate.utils import gather_object

        with _together():
            return sorted(set(gather_object(list(names))))

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any of the processes."""
        count = torch.tensor([float(flag)], device=self.device)
        self.sum_([count])
        return bool(count > 0)

    def told(self, text: str) -> str:
        """The text that the main process passes, in all processes."""
        if self.size == 1:
            return text
        from accelerate.utils import broadcast_object_list

        with _together():
            result: str = broadcast_object_list([text])[0]
        return result

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        if self._accelerator is not None:
            with _together():
                self._accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the group of processes in order."""
        if self._accelerator is not None:
            self._accelerator.end_training()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()

    def _sum(self, tensor: Tensor) -> Tensor:
        with _together():
            result: Tensor = self._accelerator.reduce(tensor, reduction="sum")
        return result


class LostProcess(UserError):
    """An exchange with the run's other processes has failed: mostly as one has ended, which says why."""

    exit_code = 1


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Around an exchange between processes. Raises LostProcess, with the cause, where it fails."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise LostProcess(
            "An exchange with the other processes of this run has failed, and so this one ends; mostly one of them has "
            f"ended before, and says why. The cause: {first_line(error)}"
        ) from error
