"""What stages find ready.

made.py digits STEPS        tiny-digits, trained for so many steps, and its classifiers
made.py recording FILE      a toy's recording of hopper
"""

import sys
from pathlib import Path

import numpy as np


def digits(steps: int) -> int:
    """Train tiny-digits for so many steps, and by a round of fine-tuning the classifiers that measure and reward it."""
    import tempfile

    from diffrl import cli
    from diffrl.images.models import digits
    from diffrl.support.files import cache_directory

    folder = cache_directory() / "models" / f"tiny-digits-{digits.STEPS}"
    if not (folder / "model_index.json").exists():
        digits.train_digits(folder, steps=steps)
    with tempfile.TemporaryDirectory() as temporary:
        words = ["--reward", "digit:8", "--queries", "64", "--eval-samples", "8", "--out", f"{temporary}/run"]
        return cli.main(["finetune", *words])


def recording(path: Path, rows: int = 2_000) -> int:
    """Write a hopper recording of random actions, in the format of D4RL."""
    import gymnasium

    from diffrl.data import d4rl

    env = gymnasium.make("Hopper-v4")
    env.action_space.seed(0)
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    columns: dict[str, list[object]] = {name: [] for name in names}
    observation, _ = env.reset(seed=0)
    for _ in range(rows):
        action = env.action_space.sample()
        following, reward, terminated, truncated, _ = env.step(action)
        row = (observation, action, reward, following, terminated, truncated)
        for name, value in zip(names, row, strict=True):
            columns[name].append(value)
        observation = env.reset()[0] if terminated or truncated else following
    kinds = {"terminals": bool, "timeouts": bool}
    arrays = {name: np.array(values, kinds.get(name, np.float32)) for name, values in columns.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    d4rl.write_blocks(path, [arrays], {})
    return 0


if __name__ == "__main__":
    what, value = sys.argv[1:]
    sys.exit(digits(int(value)) if what == "digits" else recording(Path(value)))
