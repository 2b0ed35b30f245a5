"""Devices by name, and what is said of those that cannot be used."""

import pytest
import torch

from diffrl.support.errors import UserError
from diffrl.support.machine import products, resolve_device


def test_a_device_that_can_be_used_is_itself() -> None:
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "CPU", "cuda:x", "cuda:-1", "cuda0", ""])
def test_a_mistyped_device_is_told_what_is_expected(name: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve_device(name)
    assert str(caught.value) == f"There is no device {name!r}: expected cpu, cuda, cuda:N or auto (--device)."


def test_a_very_long_name_is_cut() -> None:
    with pytest.raises(UserError, match="There is no device 'xxx") as caught:
        resolve_device("x" * 100_000)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize("name", ["cuda:99", "mps", "meta"])
def test_a_device_that_is_not_there_is_told_in_one_line(name: str) -> None:
    """Also where PyTorch's own reason is long; "meta" is a device that holds no numbers."""
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(
        UserError, match=rf"^The device '{name}' cannot be used: [^\n]+\. Try the CPU \(--device cpu\)\.$"
    ) as caught:
        resolve_device(name)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("tf32", [False, True])
def test_products_and_convolutions_are_rounded_as_asked_and_afterwards_as_before(tf32: bool) -> None:
    def found() -> tuple[str, bool]:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    before = found()
    with products("cuda", tf32):
        assert found() == ("high" if tf32 else "highest", tf32)
    with products("cpu", tf32):
        assert found() == before
    assert found() == before
