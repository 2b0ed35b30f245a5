"""Tiny pipelines, built once a session; tests only read them."""

from pathlib import Path

import pytest

from tests.images import tiny


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("pipelines")
    return {
        "sd": tiny.save_sd(base / "sd"),
        "sdxl": tiny.save_sdxl(base / "sdxl"),
        "sd3": tiny.save_sd3(base / "sd3"),
        "ddpm": tiny.save_ddpm(base / "ddpm"),
        "classes": tiny.save_ddpm(base / "classes", classes=10, clip_sample=False),
    }
