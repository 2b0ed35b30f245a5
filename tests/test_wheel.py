"""A built wheel carries everything: the command, the registry, the configurations."""

import json
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


CALLS = """
import json, sys
from diffrl.cli import main
for words in json.load(sys.stdin):
    print("> ", end="", flush=True)
    if code := main(words):
        sys.exit(code)
"""
"""One command after another in one process: each imports PyTorch else."""


def exercise(bin_folder: Path, folder: Path, images: bool = False) -> None:
    """Help, the registry, and the jobs at toy size, away from the checkout. images: fine-tune an image model too."""
    places = {"DIFFRL_DATA": str(folder / "data"), "DIFFRL_CACHE": str(folder / "cache")}
    environment = ENVIRONMENT | places | {"OMP_NUM_THREADS": "1"}

    def output(command: list[str], given: str | None = None) -> str:
        done = subprocess.run(command, input=given, capture_output=True, text=True, cwd=folder, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "diffrl train" in output([str(bin_folder / "diffrl"), "--help"])
    files = """from diffrl.support.page import static; print(*static('diffrl.augment.label', 'page'))
from diffrl.images.models.emoji import WEIGHTS, verified
print(*(len(verified(WEIGHTS / name)) for name in ('tiny-emoji/unet/diffusion_pytorch_model.safetensors',
'classifier.safetensors')))"""
    page, sizes = run(str(bin_folder / "python"), "-c", files, cwd=folder).splitlines()
    assert "index.html" in page
    assert all(int(size) > 10_000 for size in sizes.split())
    lines = ["task,agent,seed,step,score", *(f"maze2d-umaze-v1,bc,{seed},5,{seed}" for seed in range(2))]
    (folder / "scores.csv").write_text("\n".join(lines))
    synthetic = ("--width=8", "--blocks=1", "--steps=4", "--batch-size=8", "--sampling-steps=2", "--samples=50")
    commands: list[tuple[str, ...]] = [
        ("data", "list", "maze2d"),
        ("train", "list"),
        ("report", "--csv=scores.csv", "--out=report"),
        ("train", "bc/maze2d-umaze-v1", "--steps=5", "--rows=500", "--eval-episodes=1", "--out=run"),
        ("augment", "synther", "maze2d-umaze-v1", *synthetic, "--rows=500", "--no-report", "--out=more.hdf5"),
        ("data", "info", "more.hdf5", "--env=none"),
    ]
    if images:  # what it says goes to stderr
        few = ("--queries=16", "--batch=8", "--steps=2", "--eval-samples=8", "--warm-up=0")
        commands.append(("finetune", *few, "--out=images"))
    said = output([str(bin_folder / "python"), "-c", CALLS], json.dumps(commands)).split("> ")[1:]
    data, trainings, *_ = said
    assert "maze2d-umaze-v1" in data
    assert "diffusion_ql/maze2d-umaze-v1" in trainings
    assert "CORL" in (folder / "report" / "index.html").read_text()
    assert (folder / "run" / "learning_curve.png").is_file()
    assert "50" in said[5]
    if images:
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


@pytest.mark.long
def test_an_index_would_take_them(dist: Path) -> None:
    pytest.importorskip("twine", reason="needs the extra: pip install 'diffrl[dev]'")
    packages = sorted(map(str, dist.iterdir()))
    assert [Path(package).suffix for package in packages] == [".whl", ".gz"]
    assert run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *packages).count("PASSED") == 2


@pytest.mark.long
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
