"""Built-in models and classifiers, hardly trained, in a cache of the session's own: what they are is what counts."""

from pathlib import Path

import pytest

from diffrl.images.models import digits
from diffrl.images.rewards import digits as classifiers


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `$DIFFRL_CACHE`."""
    models: Path = tmp_path_factory.mktemp("cache") / "models"
    digits.train_digits(models / f"tiny-digits-{digits.STEPS}", steps=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_CACHE", str(models.parent))
        patch.setattr(classifiers, "STEPS", {False: 30, True: 30})
        for held_out in (False, True):
            classifiers.classifier(held_out)
    return models.parent


@pytest.fixture
def quick(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The built-in models as `cache` has them, and a folder to work in, which is the current one."""
    monkeypatch.setenv("DIFFRL_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path
