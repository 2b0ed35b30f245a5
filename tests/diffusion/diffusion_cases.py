"""What the tests of the generative core have in common: the processes, the Gaussian of the reference, a network."""

import torch
from torch import Tensor

from diffrl.diffusion import VE, VP, Gaussian, Process, RectifiedFlow, TrigFlow

F64 = torch.float64
PROCESSES: list[Process] = [VP(), VE(), RectifiedFlow(), TrigFlow(), TrigFlow(data_std=0.5)]
KINDS = ["eps", "x0", "v", "score", "velocity", "edm"]


def gaussian(dtype: torch.dtype = F64) -> Gaussian:
    return Gaussian(torch.tensor([1.0, -1.0], dtype=dtype), torch.tensor([0.5, 2.0], dtype=dtype))


def network(x: Tensor, t: Tensor) -> Tensor:
    """A smooth function of x and of the label, mixing the coordinates."""
    t = t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t
    return torch.tanh(0.7 * x + 0.2 * x.roll(1, -1) + 0.1 * t) + 0.1


def close(a: Tensor, b: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=atol)
