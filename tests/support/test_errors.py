"""Errors of other people's code, and memory that runs out, in a sentence."""

import pytest
import torch

from diffrl.support.errors import UserError, closest, nearest, said_by, shown
from diffrl.support.machine import explaining_memory

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.10 GiB. Of the allocated memory 1 GiB is used"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("a\nb"), "ValueError: a"),
        (ValueError(" \n b "), "ValueError: b"),
        (ValueError(), "ValueError"),
        (SystemExit(3), "SystemExit: 3"),
        (SystemExit(), "SystemExit"),
    ],
)
def test_an_error_is_said_in_one_line(error: BaseException, said: str) -> None:
    assert said_by(error) == said


def test_a_value_is_shown_in_one_short_line() -> None:
    """As Python writes it, where that is short; what breaks its lines is another package's `repr`."""
    for value in (3, "a  b", "a\nb", ["x", 2.5], None):
        assert shown(value) == repr(value)
    assert shown(torch.zeros(2, 1)) == "tensor([[0.], [0.]])"
    assert len(shown("x" * 1000)) == len(shown(torch.zeros(1000))) == 60


def test_memory_that_runs_out_is_told_with_what_to_lower() -> None:
    """As PyTorch says it of this machine, as CUDA does, and as NumPy, whose error may say nothing."""
    with (
        pytest.raises(UserError, match=r"memory.*\. It needs less with less data"),
        explaining_memory("x", "less data"),
    ):
        torch.empty(2**52, dtype=torch.float64)
    with pytest.raises(UserError) as caught, explaining_memory("training", "less data", lambda: "Nothing is lost"):
        raise torch.OutOfMemoryError(FULL)
    assert str(caught.value) == (
        "Memory ran out in training: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79.10 GiB. "
        "It needs less with less data. Nothing is lost."
    )
    with pytest.raises(UserError, match=r"^Memory ran out in training\. It needs"), explaining_memory("training", "x"):
        raise MemoryError


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), UserError("no such file"), KeyboardInterrupt()])
def test_other_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, explaining_memory("training", "less data"):
        raise error
    assert caught.value is error


def test_a_long_text_keeps_its_beginning_and_its_end() -> None:
    """What a file made of it is cut; what was wrong, and what to do, is still said."""
    said = str(UserError(f"my.yaml: agent.name is {'x' * 50_000}; expected one of these. Mend that."))
    assert said.startswith("my.yaml: agent.name is xxx")
    assert said.endswith("x; expected one of these. Mend that.")
    assert len(said) < 1_300
    assert str(UserError("x" * 1_200)) == "x" * 1_200


@pytest.mark.parametrize(
    ("typed", "known", "meant"),
    [
        ("diffql", ["diffuser", "diffusion_ql", "fql", "ifql"], "diffusion_ql"),
        ("ifq", ["diffusion_ql", "fql", "ifql"], "ifql"),
        ("hopper-medum-v2", ["hopper-medium-replay-v2", "hopper-medium-v2"], "hopper-medium-v2"),
        ("ql", ["fql", "quantile"], "fql"),
        ("diffqa", ["diffusion_ql", "ifql"], "ifql"),
        ("umase-v1", ["umaze-dense-v1", "umaze-v1"], "umaze-v1"),
        ("zzz", ["diffusion_ql", "ifql"], None),
    ],
)
def test_a_name_that_is_abbreviated_comes_before_one_of_like_letters(
    typed: str, known: list[str], meant: str | None
) -> None:
    """By three letters or more, in order, the first among them; else, and where a letter is wrong, the nearest."""
    assert closest(typed, known) == meant


def test_known_entries_are_named_as_they_are_written() -> None:
    """With what stands before them, however they are named."""
    many = [f"option{i:02d}" for i in range(30)]
    assert nearest("optoin07", many, group="agent.") == "did you mean 'agent.option07'?"
    assert nearest("zzz", many, "x", group="agent.") == "30 are known, 'agent.option00' among them. `x` lists all."
    assert nearest("zzz", ["a", "b"], group="agent.") == "known: agent.a, agent.b."
