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


def exercise(bin_folder: Path, folder: Path, images: bool = False) -> None:
    """Help, the registry, and the jobs at toy size, away from the checkout. images: fine-tune an image model too."""

    def diffrl(*words: str) -> str:
        places = {"DIFFRL_DATA": str(folder / "data"), "DIFFRL_CACHE": str(folder / "cache")}
        environment = ENVIRONMENT | places | {"OMP_NUM_THREADS": "1"}
        command = [str(bin_folder / "diffrl"), *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "diffrl train" in diffrl("--help")
    assert "maze2d-umaze-v1" in diffrl("data", "list", "maze2d")
    files = """from diffrl.support.page import static; print(*static('diffrl.augment.label', 'page'))
from diffrl.images.models.emoji import WEIGHTS, verified
print(*(len(verified(WEIGHTS / name)) for name in ('tiny-emoji/unet/diffusion_pytorch_model.safetensors',
'classifier.safetensors')))"""
    page, sizes = run(str(bin_folder / "python"), "-c", files, cwd=folder).splitlines()
    assert "index.html" in page
    assert all(int(size) > 10_000 for size in sizes.split())
    assert "diffusion_ql/maze2d-umaze-v1" in diffrl("train", "list")
    lines = ["task,agent,seed,step,score", *(f"maze2d-umaze-v1,bc,{seed},5,{seed}" for seed in range(2))]
    (folder / "scores.csv").write_text("\n".join(lines))
    diffrl("report", "--csv=scores.csv", "--out=report")
    assert "CORL" in (folder / "report" / "index.html").read_text()
    diffrl("train", "bc/maze2d-umaze-v1", "--steps=5", "--rows=500", "--eval-episodes=1", "--out=run")
    assert (folder / "run" / "learning_curve.png").is_file()
    sizes = (
        "--width=8",
        "--blocks=1",
        "--steps=4",
        "--batch-size=8",
        "--sampling-steps=2",
        "--samples=50",
        "--rows=500",
    )
    diffrl("augment", "synther", "maze2d-umaze-v1", *sizes, "--no-report", "--out=more.hdf5")
    assert "50" in diffrl("data", "info", "more.hdf5", "--env=none")
    if images:
        sizes = ("--queries=16", "--batch=8", "--steps=2", "--eval-samples=8", "--warm-up=0")
        diffrl("finetune", *sizes, "--out=images")  # what it says goes to stderr
        assert (folder / "images" / "before_after.png").is_file()


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it, not from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT))
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (wheel,) = dist.glob("*.whl")
    return wheel


def test_an_index_would_take_them(dist: Path) -> None:
    pytest.importorskip("twine", reason="needs the extra: pip install 'diffrl[dev]'")
    packages = sorted(map(str, dist.iterdir()))
    assert [Path(package).suffix for package in packages] == [".whl", ".gz"]
    assert run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *packages).count("PASSED") == 2


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
    """With everything that the three jobs need, from the index, and nothing else."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = str(ROOT / "constraints.txt")
    run(str(python), "-m", "pip", "install", "--quiet", "--constraint", constraints, f"{wheel}[images]")
    exercise(python.parent, tmp_path, images=True)
