"""The extra that fine-tuning images needs, named where a part of it is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffrl.errors import UserError


@contextmanager
def images_extra() -> Iterator[None]:
    """Around imports of diffusers, transformers, peft, scikit-learn and Pillow: a UserError says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"Fine-tuning image models needs an extra ({error.name} is missing): pip install 'diffrl[images]'"
        ) from error
