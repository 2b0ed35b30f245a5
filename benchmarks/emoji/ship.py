"""Put what `train.py` and `classifiers.py` made where the package has it, with checksums.

python benchmarks/emoji/ship.py PIPELINE|- [CLASSIFIERS ...]    what these and `towers.py` wrote; -: no new pipeline
"""

import shutil
import sys
from pathlib import Path

from diffrl.images.models.emoji import WEIGHTS
from diffrl.support.folder import seal

NETWORK = ("config.json", "diffusion_pytorch_model.safetensors")


def main(pipeline: Path, *classifiers: Path) -> None:
    """Copy, make readable, seal."""
    target = WEIGHTS / "tiny-emoji"
    if str(pipeline) != "-":
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(pipeline, target)
    for folder in classifiers:
        for file in folder.glob("*.safetensors"):
            shutil.copy(file, WEIGHTS / file.name)
    for file in WEIGHTS.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    seal(target / "unet", NETWORK)
    seal(WEIGHTS, sorted(file.name for file in WEIGHTS.glob("*.safetensors")))
    print(f"{sum(file.stat().st_size for file in WEIGHTS.rglob('*') if file.is_file()) / 1e6:.2f} MB in {WEIGHTS}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
