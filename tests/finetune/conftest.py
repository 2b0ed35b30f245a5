"""Built-in models and classifiers, hardly trained, in a cache of the session's own: what they are is what counts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch

from diffrl.finetune.models import digits
from diffrl.finetune.rewards import digits as classifiers


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `$DIFFRL_CACHE`."""
    models: Path = tmp_path_factory.mktemp("cache") / "models"
    digits.train_digits(models / f"tiny-digits-{digits.STEPS}", steps=3)
    for held_out, name in ((False, "digit-1"), (True, "digit-held-out-1")):
        network = classifiers.train(held_out, steps=30)
        safetensors.torch.save_file(network.state_dict(), models / f"{name}.safetensors")
    return models.parent


@pytest.fixture
def quick(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The built-in models as `cache` has them, and a folder to work in, which is the current one."""
    monkeypatch.setenv("DIFFRL_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
