"""Conditions of which a part is on the host while the rest is on a GPU, by torch's own rule and without one."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffrl.images.models.transformers import padded
from diffrl.images.samples import rows

GPU = torch.device("cpu")
"""Stands for a GPU: this very object."""


class OnGpu(TorchFunctionMode):
    """Tensors that were moved to `GPU` are there; one on the host that is indexed by such a one is an error."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        there = [getattr(a, "there", False) for a in arguments if isinstance(a, Tensor)]
        if function == Tensor.device.__get__:  # type: ignore[attr-defined]
            return GPU if there[0] else torch.device("cpu")
        result = function(*arguments, **(named or {}))
        if function is Tensor.to:
            result = result.detach()
            result.there = arguments[1] is GPU
        if function is Tensor.__getitem__:
            if there == [False, True]:
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
            result.there = there[0]
        return result


@pytest.mark.parametrize("on_gpu", [False, True])
def test_rows_of_a_condition_that_is_partly_on_the_host(on_gpu: bool) -> None:
    """The lengths of Z-Image's and Qwen-Image's prompts are on the host, the states on the GPU."""
    condition = {name: torch.cat([value, value + 1]) for name, value in padded(torch.ones(3, 4), 5).items()}
    with OnGpu():
        condition["states"] = condition["states"].to(GPU)
        index = torch.tensor([1, 1, 0])
        index = index.to(GPU) if on_gpu else index
        chosen = rows(condition, index)
        assert chosen["states"].device is GPU
        assert chosen["length"].device is not GPU
    assert chosen["length"].tolist() == [4, 4, 3]
    assert chosen["states"][:, 0, 0].tolist() == [2, 2, 1]
