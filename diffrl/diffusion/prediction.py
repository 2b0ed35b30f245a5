"""What a network predicts, and the denoiser that follows from it.

A network predicts m = p x_0 + q e, with (p, q) known at every time. Beside x_t = a x_0 + s e this is one 2x2 system:

    x_0 = (q x - s m) / det,    e = (a m - p x) / det,    det = a q - s p.

| kind     | p         | q          | the network receives    |
|----------|-----------|------------|-------------------------|
| eps      | 0         | 1          | x, label t              |
| x0       | 1         | 0          | x, label t              |
| v        | -s        | a          | x, label t              |
| score    | 0         | -1/s       | x, label t              |
| velocity | a'        | s'         | x, label t              |
| edm      | s/(c_d c) | -a c_d / c | x / c, label log(k) / 4 |

with c_d the data's standard deviation, c^2 = a^2 c_d^2 + s^2 and k = s/a. The last row is EDM's preconditioning
(Karras et al. 2022, arXiv 2206.00364, table 1) for every process: on VE it is the published table, on VP with c_d = 1
it is -v, on TrigFlow it is sCM's -F.

det = 0, where m says nothing of x_0: eps, score where a = 0 (`RectifiedFlow` at t = 1); velocity where k' = 0.
Score and, on VP, velocity are infinite at t = 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffrl.diffusion.process import Process, expand, unknown

Kind = Literal["eps", "x0", "v", "score", "velocity", "edm"]
Network = Callable[[Tensor, Tensor], Tensor]
"""A raw network: (its input (..., d), the time label as t is shaped) -> m, of the input's shape."""
Denoise = Callable[[Tensor, Tensor], Tensor]
"""A denoiser: (x, t) -> E[x_0 | x_t = x], of x's shape; t a scalar or one value a row."""
Clip = tuple[float, float]


def of_shape(answer: Tensor, x: Tensor, what: str = "denoiser") -> Tensor:
    """The `answer` to x, as it is. Raises ValueError where it has another shape than x: it might broadcast, wrongly."""
    if answer.shape != x.shape:
        raise ValueError(f"the {what} maps x of shape {tuple(x.shape)} to {tuple(answer.shape)}; shapes must agree")
    return answer


@dataclass(frozen=True)
class Prediction:
    """The prediction `kind` of a network on a `process`; `data_std` is c_d (used by the kind edm alone).

    Shapes: x, x0, noise, m any (..., d) or (B, *image*) alike; t a scalar () or one value a row, expanded on the right.
    Raises ValueError for an unknown kind, a `data_std` that is not positive, or a kind whose det is 0 on the process.
    """

    kind: Kind
    process: Process
    data_std: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise unknown("prediction", self.kind, get_args(Kind))
        if not 0 < self.data_std < math.inf:
            raise ValueError(f"data_std must be positive, got {self.data_std}")
        # Checked here, on a few ordinary times, so that no step of training or sampling has to look at a tensor.
        t = self.process.time(torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64, device="cpu"))
        p, q = self.coefficients(t)
        if not bool(((self.process.alpha(t) * q - self.process.sigma(t) * p).abs() > 1e-12).all()):
            raise ValueError(
                f"{self.kind!r} does not determine x_0 on {self.process} (a q - s p = 0): predict 'x0' or 'edm' instead"
            )

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(p, q) of m = p x_0 + q e, each of t's shape."""
        a, s = self.process.alpha(t), self.process.sigma(t)
        match self.kind:
            case "eps":
                return torch.zeros_like(t), torch.ones_like(t)
            case "x0":
                return torch.ones_like(t), torch.zeros_like(t)
            case "v":
                return -s, a
            case "score":
                return torch.zeros_like(t), -1 / s
            case "velocity":
                return self.process.rate(t)
            case "edm":
                c, c_d = self.scale(t), self.data_std
                return s / (c_d * c), -a * c_d / c

    def preconditioning(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(c_skip, c_out) of D(x, t) = c_skip x + c_out m, each of t's shape: q/det and -s/det."""
        a, s = self.process.alpha(t), self.process.sigma(t)
        p, q = self.coefficients(t)
        det = a * q - s * p
        return q / det, -s / det

    def inputs(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """What the network receives: (c_in x, the time label, shaped as t). See the table at the top.

        EDM's label log(k)/4 stays finite: k is clamped to [1e-8, 1e8], so that D(x, 0) = x holds to the letter.
        """
        if self.kind != "edm":
            return x, t
        c_noise = torch.log(self.process.ratio(t).clamp(1e-8, 1e8)) / 4
        return x / expand(self.scale(t), x), c_noise

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should say at x_t = a x_0 + s e: m = p x_0 + q e."""
        p, q = self.coefficients(expand(t, x0))
        return p * x0 + q * noise

    def to_x0(self, m: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x_0 = (q x - s m) / det."""
        c_skip, c_out = self.preconditioning(expand(t, x))
        return c_skip * x + c_out * m

    def to_eps(self, m: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """e = (a m - p x) / det."""
        t = expand(t, x)
        a, s = self.process.alpha(t), self.process.sigma(t)
        p, q = self.coefficients(t)
        det = a * q - s * p
        return (a / det) * m - (p / det) * x

    def from_x0(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The m that a denoised x_0 = D(x, t) amounts to, at t > 0: its score, its velocity, whatever `kind` says."""
        t = expand(t, x)
        e = (x - self.process.alpha(t) * x0) / self.process.sigma(t)
        return self.target(x0, e, t)

    def denoiser(self, network: Network, clip: Clip | None = None) -> Denoise:
        """The denoiser D(x, t) = E[x_0 | x_t = x] of a raw `network`, clamped to `clip` where given.

        The network's answer is cast to x's dtype before it is used, so that a network in half precision (under
        autocast, or casting its own input) costs the sampler's state no digits.
        """

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            m = of_shape(network(*self.inputs(x, t)), x, "network")
            x0 = self.to_x0(m.to(x.dtype), x, t)
            return x0 if clip is None else x0.clamp(*clip)

        return denoise

    def scale(self, t: Tensor) -> Tensor:
        """c = sqrt(a^2 c_d^2 + s^2), the standard deviation of x_t."""
        a, s = self.process.alpha(t) * self.data_std, self.process.sigma(t)
        return _hypot_of_graphs(a, s) if _exporting() else torch.hypot(a, s)


_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
"""Whether a graph is being made by `torch.export`; before PyTorch 2.7 also whether one is compiled."""


def _hypot_of_graphs(a: Tensor, b: Tensor) -> Tensor:
    """`torch.hypot` to rounding, in operations that ONNX has; in six of them, so slower.

    As there, no square overflows. a, b: finite.
    """
    large, small = torch.maximum(a.abs(), b.abs()), torch.minimum(a.abs(), b.abs())
    return large * torch.sqrt(1 + (small / (large + (large == 0))) ** 2)
