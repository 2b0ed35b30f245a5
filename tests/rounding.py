"""Tolerances in units of rounding: what two computations of one number may differ by on any processor.

Processors sum in other orders, fuse multiplications into sums and have exponentials of their own. Each operation rounds
a number to `eps` of its size. So a tolerance is a number of roundings times eps times the size of what is rounded: of
the terms, not of their sum, which may cancel. Operations in a row count one by one; a sum of n products counts sqrt(n),
since its roundings are independent.
"""

import torch
from torch import Tensor


def rounding(dtype: torch.dtype, count: float = 1, size: float = 1) -> float:
    """`count` roundings of numbers of `size`."""
    return torch.finfo(dtype).eps * count * size


def assert_equal_to_rounding(ours: Tensor, theirs: Tensor, count: float, size: float | None = None) -> None:
    """Nowhere do two tensors differ by more than `count` roundings, of the coarser of their types.

    size: of the largest number that is rounded on the way; if None, the largest of `theirs`.
    """
    dtype = max(ours.dtype, theirs.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    size = float(theirs.detach().abs().max()) if size is None else size
    atol = rounding(dtype, count, size)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol, check_dtype=False)
