"""AdamW whose moments are kept in 8 bits (Dettmers et al. 2022, arXiv 2110.02861), by torchao: --optimiser adamw8bit.

A moment of n values in 8 bits is n codes of a byte, each a place in a table of 256 values in [-1, 1] (of squares in
[0, 1]), and a float32 scale for each block of 256: 1 + 4/256 bytes a value where float32 takes 4. As published, small
tensors stay in float32: those of less than 4,096 values; and those whose number 256 does not divide.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.images.model import unheard
from diffrl.support.errors import UserError, first_line

MISSING = "{what} needs {name}, which is not installed: pip install 'diffrl[adamw8bit]' brings it."
ASKED = "--optimiser adamw8bit"
"""What needs it in a new run."""


def require(what: str = ASKED) -> None:
    """Raise UserError where torchao is not installed; what: that which needs it, as the sentence begins."""
    _torchao(what)


def make(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimiser of these parameters; its learning rate is a tensor. Raises UserError as `require`."""
    optimiser: torch.optim.Optimizer = _torchao().AdamW8bit(list(parameters), lr, weight_decay=weight_decay)
    # torchao compiles a step for each shape, which takes a compiler and, on a CPU, longer than most runs' steps.
    optimiser.step = torch.compiler.set_stance("force_eager")(optimiser.step)  # type: ignore[method-assign]
    return optimiser


def tensors_of(moment: Tensor) -> tuple[Tensor, Tensor | None]:
    """What of a moment a file holds: its values, and None; in 8 bits its codes (uint8) and the scales of its blocks."""
    codes, scale = getattr(moment, "codes", None), getattr(moment, "scale", None)
    return (moment, None) if codes is None else (codes, scale)


def moment_from(codes: Tensor, scale: Tensor, parameter: nn.Parameter, *, signed: bool) -> Tensor:
    """The moment in 8 bits whose codes and scales `tensors_of` gave, beside its parameter.

    signed: whether it is the first moment. Raises ValueError for tensors of another shape, UserError as `require`.
    """
    require("Reading a checkpoint whose moments are in 8 bits, as adamw8bit left them,")
    from torchao.optim.subclass_8bit import OptimState8bit

    if codes.shape != parameter.shape or len(scale) == 0 or codes.numel() % len(scale):
        raise ValueError(f"codes of shape {tuple(codes.shape)} with {len(scale)} scales")
    made: Any = OptimState8bit.zeros(
        parameter.shape, signed, codes.numel() // len(scale), parameter.device, dtype=parameter.dtype
    )
    made.codes.copy_(codes)
    made.scale.copy_(scale)
    moment: Tensor = made
    return moment


def bytes_of(optimiser: torch.optim.Optimizer) -> int:
    """Bytes that the moments take, without the tables of 256 values that 8 bits stand for."""
    moments = [tensors_of(state[name]) for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return sum(part.numel() * part.element_size() for parts in moments for part in parts if part is not None)


def _torchao(what: str = ASKED) -> Any:
    with unheard():
        try:
            from torchao import optim
        except ModuleNotFoundError as error:
            raise UserError(MISSING.format(what=what, name=error.name)) from error
        except (ImportError, AttributeError) as error:  # whatever it misses of PyTorch
            raise UserError(
                f"{what} needs a torchao that is made for PyTorch {torch.__version__}; the one that is installed "
                f"cannot be imported beside it: {first_line(error)}"
            ) from error
    return optim
