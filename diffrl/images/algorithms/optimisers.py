"""The optimisers of fine-tuning: AdamW, and AdamW whose moments are kept in 8 bits (arXiv 2110.02861), by torchao.

A moment of n values in 8 bits is n codes of a byte, each a place in a table of 256 values in [-1, 1] (of squares in
[0, 1]), and a float32 scale for each block of 256: 1 + 4/256 bytes a value where float32 takes 4. As published, small
tensors stay in float32: those of less than 4,096 values; and those whose number 256 does not divide.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from diffrl.images.model import unheard
from diffrl.support.errors import UserError

EXTRA = "--optimiser adamw8bit needs {name}, which is not installed: pip install 'diffrl[adamw8bit]' brings it."


def require(kind: str) -> None:
    """Raise UserError where the library of an optimiser is not installed."""
    if kind == "adamw8bit":
        _torchao()


def make(kind: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimiser `kind`, adamw or adamw8bit, of these parameters. Raises UserError as `require`."""
    parameters = list(parameters)
    if kind == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay)
    optimiser: torch.optim.Optimizer = _torchao().AdamW8bit(parameters, lr, weight_decay=weight_decay)
    # torchao compiles a step for each shape, which takes a compiler and, on a CPU, longer than most runs' steps.
    optimiser.step = torch.compiler.set_stance("force_eager")(optimiser.step)  # type: ignore[method-assign]
    return optimiser


def set_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all parameters."""
    for group in optimiser.param_groups:
        if isinstance(group["lr"], Tensor):  # torchao's
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def tensors_of(moment: Tensor) -> tuple[Tensor, Tensor | None]:
    """What of a moment a file holds: its values, and None; in 8 bits its codes (uint8) and the scales of its blocks."""
    codes, scale = getattr(moment, "codes", None), getattr(moment, "scale", None)
    return (moment, None) if codes is None else (codes, scale)


def moment_from(kind: str, values: Tensor, scale: Tensor | None, parameter: nn.Parameter, *, signed: bool) -> Tensor:
    """The inverse of `tensors_of`, for the optimiser `kind`, beside its parameter. signed: whether of the first moment.

    adamw takes what adamw8bit left as the numbers that its codes stand for; the other way float32 stays what it is.
    Raises ValueError for tensors of another shape.
    """
    if scale is None:
        return values.to(parameter)
    _torchao()
    from torchao.optim.subclass_8bit import OptimState8bit

    if values.shape != parameter.shape or len(scale) == 0 or values.numel() % len(scale):
        raise ValueError(f"codes of shape {tuple(values.shape)} with {len(scale)} scales")
    made: Any = OptimState8bit.zeros(
        parameter.shape, signed, values.numel() // len(scale), parameter.device, dtype=parameter.dtype
    )
    made.codes.copy_(values)
    made.scale.copy_(scale)
    moment: Tensor = made if kind == "adamw8bit" else made.dequantize().to(parameter)
    return moment


def bytes_of(optimiser: torch.optim.Optimizer) -> int:
    """Bytes that the moments take, without the tables of 256 values that 8 bits stand for."""
    moments = [tensors_of(state[name]) for state in optimiser.state.values() for name in ("exp_avg", "exp_avg_sq")]
    return sum(part.numel() * part.element_size() for parts in moments for part in parts if part is not None)


def _torchao() -> Any:
    with unheard():
        try:
            from torchao import optim
        except ModuleNotFoundError as error:
            raise UserError(EXTRA.format(name=error.name)) from error
    return optim
