"""What a user is told where the packages of the extra `images` are missing."""

from collections.abc import Iterator
from contextlib import contextmanager

from diffrl.support.errors import UserError


@contextmanager
def images_extra(what: str = "Fine-tuning image models") -> Iterator[None]:
    """A block of imports of diffusers, transformers, peft, accelerate, scikit-learn or Pillow, which `what` needs.

    Raises UserError, naming the package and the extra, where one is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"{what} needs {error.name}, which is not installed: pip install 'diffrl[images]' brings it."
        ) from error
