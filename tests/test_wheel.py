"""A built wheel carries everything: the command, the registry, the configurations."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
"""Without what would let a checkout be imported in the place of the wheel."""


def run(*words: str, cwd: Path | None = None) -> str:
    """What a command that must succeed prints."""
    return subprocess.run(words, check=True, capture_output=True, text=True, cwd=cwd, env=ENVIRONMENT).stdout


def build_wheel(folder: Path) -> Path:
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    return wheel


def exercise(bin_folder: Path, folder: Path) -> None:
    """Help, the registry, and five steps of training, away from the checkout."""

    def diffrl(*words: str) -> str:
        environment = ENVIRONMENT | {"DIFFRL_DATA": str(folder / "data"), "OMP_NUM_THREADS": "1"}
        command = [str(bin_folder / "diffrl"), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "diffrl train" in diffrl("--help")
    assert "maze2d-umaze-v1" in diffrl("data", "list", "maze2d")
    page = "from diffrl.support.page import static; print(*static('diffrl.augment.label', 'page'))"
    assert "index.html" in run(str(bin_folder / "python"), "-c", page, cwd=folder)
    weights = "from diffrl.images.models.emoji import WEIGHTS, verified; print(len(verified(WEIGHTS / 'tiny-emoji/unet/"
    weights += "diffusion_pytorch_model.safetensors')), len(verified(WEIGHTS / 'judge.safetensors')))"
    assert all(int(size) > 10_000 for size in run(str(bin_folder / "python"), "-c", weights, cwd=folder).split())
    assert "diffusion_ql/maze2d-umaze-v1" in diffrl("train", "list")
    lines = ["task,agent,seed,step,score", *(f"maze2d-umaze-v1,bc,{seed},5,{seed}" for seed in range(2))]
    (folder / "scores.csv").write_text("\n".join(lines))
    diffrl("report", "--csv=scores.csv", "--out=report")
    assert "CORL" in (folder / "report" / "index.html").read_text()
    diffrl("train", "bc/maze2d-umaze-v1", "--steps=5", "--rows=500", "--eval-episodes=1", "--out=run")
    assert (folder / "run" / "learning_curve.png").is_file()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_works_beside_installed_dependencies(wheel: Path, tmp_path: Path) -> None:
    """A new environment with the wheel; its dependencies are those of this one, by path."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = tmp_path / "venv" / "lib" / version / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    assert run(str(python), "-c", "import diffrl; print(diffrl.__file__)", cwd=tmp_path).startswith(str(tmp_path))
    exercise(python.parent, tmp_path)


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """With everything it needs, from the index, and nothing else."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = str(ROOT / "constraints.txt")
    run(str(python), "-m", "pip", "install", "--quiet", "--constraint", constraints, str(wheel))
    exercise(python.parent, tmp_path)
