"""What --force replaces, and what it does not."""

from pathlib import Path

import pytest

from diffrl.support.errors import UserError
from diffrl.support.folder import seal, spare


def test_a_part_of_a_run_is_never_replaced(tmp_path: Path) -> None:
    """Not what its checksums name, nor what only it has, at whatever depth; a picture that is drawn again is."""
    for name in ("run.json", "config.yaml", "metrics.csv", "checkpoints/000000001/state.json", "learning_curve.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    seal(tmp_path, ("run.json", "config.yaml"))
    for name in ("run.json", "config.yaml", "SHA256SUMS", "metrics.csv", "checkpoints/000000001/state.json"):
        with pytest.raises(UserError, match=f"{name} is part of {tmp_path}, which would lose it"):
            spare(tmp_path / name, force=True)
    spare(tmp_path / "learning_curve.png", force=True)
    spare(tmp_path / "new.json", force=False)


def test_other_peoples_checksums_say_nothing(tmp_path: Path) -> None:
    """Those of a download, say, in any form, in a folder above."""
    (tmp_path / "SHA256SUMS").write_text("# of a mirror\nabc *picture.png\n")
    (tmp_path / "picture.png").write_text("mine")
    spare(tmp_path / "picture.png", force=True)
    with pytest.raises(UserError, match=r"picture\.png exists\. Use --force to replace it"):
        spare(tmp_path / "picture.png", force=False)
