"""`diffrl` without a word: what one can do next, on one screen."""

import contextlib
import json
from pathlib import Path

from diffrl.support.files import read_bytes

GREETING = """diffrl: offline reinforcement learning on one diffusion core

  diffrl train diffusion_ql/maze2d-umaze-v1-small    train an agent: minutes on a CPU, then a score
  diffrl augment synther maze2d-umaze-v1 --out synthetic.hdf5 --width 256 --steps 20000
                                                     enlarge a data set by synthetic transitions
  diffrl finetune                                    an image model on a reward: 2 minutes on a CPU

  diffrl doctor                                      what works on this machine, and what to install
  diffrl --help                                      all commands; of one: diffrl VERB --help"""


def greeting(runs: Path = Path("runs")) -> str:
    """The greeting, and what to do with the newest run in a folder of runs, where there is one."""
    with contextlib.suppress(OSError):
        found = [about for about in runs.glob("*/run.json") if about.is_file()]
        if found:
            newest = max(found, key=lambda about: about.stat().st_mtime)
            return f"{GREETING}\n\nYour newest run:\n{_next(newest)}"
    return GREETING


def _next(about: Path) -> str:
    """The commands for the run whose run.json this is."""
    run, kind = about.parent.as_posix(), ""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a damaged file is for the verbs to tell
        kind = str(json.loads(read_bytes(about)).get("kind"))
    look = ("compare", "what it gained, and at what price") if kind == "images" else ("evaluate", "its score")
    lines = [look, ("resume", "go on with it, or make it longer by --steps N")]
    width = max(49, len(run) + 18)
    return "\n".join(f"  {f'diffrl {verb} {run}':{width}}  {words}" for verb, words in lines)
