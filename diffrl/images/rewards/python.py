"""Rewards of one's own: a function or an object of a Python file, by `python:FILE.py#NAME`."""

import importlib.util
import inspect
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffrl.images.rewards.arguments import file_and_function
from diffrl.images.rewards.base import Metadata, RewardError
from diffrl.support.errors import UserError, nearest, out_of_memory, said_by, shown


class Function:
    """A function (images, prompts, metadata) -> one value an image, as a tensor, an array or a list, as a reward.

    It has a gradient where the function says so, by an attribute `differentiable` that is true; by `grouped` it says
    that it compares the images of a prompt, and by `videos` that it takes whole videos (B, F, 3, H, W). Its method
    `check_prompts`, if it has one, is asked about the prompts of a run.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function, self.name = function, name
        self.differentiable = bool(getattr(function, "differentiable", False))
        self.grouped = bool(getattr(function, "grouped", False))
        self.videos = bool(getattr(function, "videos", False))

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image."""
        with self._blamed("raised"):
            values = self.function(images, prompts, metadata)
        if isinstance(values, Tensor):
            return values
        try:
            listed = values.ravel() if isinstance(values, np.ndarray) else values
            if isinstance(listed, np.ndarray | list | tuple) and any(map(_is_complex, listed)):
                return torch.as_tensor(values)  # which `ask` refuses
            return torch.as_tensor(values, dtype=torch.float32, device=images.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"The reward {self.name} gave {shown(values)}, which is no tensor, array or list of numbers; expected "
                "one number an image."
            ) from error

    def check_prompts(self, prompts: Sequence[str], metadata: Metadata) -> None:
        """Raise UserError where the function says that it cannot take one of the prompts of a run."""
        check = getattr(self.function, "check_prompts", None)
        if check is not None:
            with self._blamed("raised, asked about the prompts,"):
                check(prompts, metadata)

    @contextmanager
    def _blamed(self, raised: str) -> Iterator[None]:
        """What the function raises in the block, as a RewardError that names it and the line; memory excepted."""
        try:
            yield
        except UserError:
            raise
        except (Exception, SystemExit) as error:  # whatever a user's function may raise
            if out_of_memory(error):
                raise
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename}, line {last.lineno}"
            raise RewardError(f"The reward {self.name} {raised} {said_by(error)} ({where}).") from error


def _is_complex(value: Any) -> bool:
    return isinstance(value, complex | np.complexfloating) or (isinstance(value, Tensor) and value.is_complex())


def from_file(argument: str) -> Function:
    """The reward of "FILE.py#NAME", which takes (images, prompts, metadata). Raises UserError as `loaded`, and for
    what cannot be called so."""
    function = loaded(argument)
    where = f"python:{argument}"
    if isinstance(function, type):
        raise UserError(f"{where} is a class, which must take (images, prompts, metadata): name an object of it.")
    called = function if inspect.isroutine(function) else type(function).__call__
    if inspect.iscoroutinefunction(called):
        raise UserError(f"{where} is an `async def`, and rewards are called without await: write a plain `def`.")
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a function in C nothing is known
        return Function(function, where)
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise UserError(f"{where} must take (images, prompts, metadata), and it takes {signature}.") from error
    return Function(function, where)


def loaded(argument: str, reward: str = "python") -> Callable[..., Any]:
    """What "FILE.py#NAME" names: the file is run, as `python FILE.py` would.

    reward: the name of the one whose argument it is, for errors. Raises UserError where there is no such file or name,
    or the file fails when it is run.
    """
    try:
        path, attribute = file_and_function(argument)
    except UserError as error:
        raise UserError(f"{reward}:{argument}: {error}") from error
    specification = importlib.util.spec_from_file_location(f"diffrl_reward_{path.stem}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever a user's file may raise
        raise UserError(f"{reward}:{argument}: running {path} failed: {said_by(error)}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UserError(f"{reward}:{argument}: {path} has no function {attribute!r}; {nearest(attribute, names)}")
    named: Callable[..., Any] = function
    return named
