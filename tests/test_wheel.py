"""A built wheel carries everything: the command, the registry, the configurations."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def build_wheel(folder: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)], check=True, capture_output=True
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def exercise(bin_folder: Path, folder: Path) -> None:
    """Help, the registry, and five steps of training, away from the checkout."""

    def diffrl(*words: str) -> str:
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment |= {"DIFFRL_DATA": str(folder / "data"), "OMP_NUM_THREADS": "1"}
        command = [str(bin_folder / "diffrl"), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "diffrl train" in diffrl("--help")
    assert "maze2d-umaze-v1" in diffrl("data", "list", "maze2d")
    assert "diffusion_ql/maze2d-umaze-v1" in diffrl("train", "list")
    diffrl("train", "bc/maze2d-umaze-v1", "--steps=5", "--rows=500", "--eval-episodes=1", "--out=run")
    assert (folder / "run" / "learning_curve.png").is_file()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_works_beside_installed_dependencies(wheel: Path, tmp_path: Path) -> None:
    """A new environment with the wheel; its dependencies are those of this one, by path."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--quiet", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = tmp_path / "venv" / "lib" / version / "site-packages"
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    where = subprocess.run(
        [str(python), "-c", "import diffrl; print(diffrl.__file__)"], capture_output=True, text=True, cwd=tmp_path
    )
    assert where.stdout.startswith(str(tmp_path))
    exercise(python.parent, tmp_path)


@pytest.mark.slow
def test_the_wheel_installs_into_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """With everything it needs, from the index, and nothing else."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        str(ROOT / "constraints.txt"),
        str(wheel),
    ]
    subprocess.run(command, check=True, capture_output=True)
    exercise(python.parent, tmp_path)
