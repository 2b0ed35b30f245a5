"""Sound inputs of every kind, made once by the code under test, and how what was loaded of one is told from another.

All is written into one folder, and commands run in copies of it.
"""

import contextlib
import importlib
import json
import os
import pkgutil
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import unchanged_digests
from unchanged_inputs import write_digits_model, write_pendulum

from tests.faults import forked

DATA, SEALED, NPZ, WIDE = "unit.hdf5", "sealed.hdf5", "unit.npz", "wide.hdf5"
"""Data sets: without and with our checksum, as npz; one of the pendulum's own actions, which runs learn from."""
LABELS = "labels.json"
"""Labelled pairs of WIDE's segments, as `diffrl augment label` writes them; `other/labels.json` has other labels."""
MINARI = {"hdf5": "small/rows-v0", "arrow": "small/arrow-v0"}
"""The ids of Minari's sets, which lie below `minari/`, by format."""
SECRET, PIPE = "secret.h5", "pipe"
"""What lies outside of the named file: see `write_outside`."""
CANARY = 6789.125
"""The number that every array outside holds."""
ROWS = 200

_RUN = (
    f"--dataset {WIDE} --env Pendulum-v1 --workers 1 --eval-workers 0 --no-compile --eval-episodes 1 --log-every 2 "
    "--steps 4 --eval-every 2 --agent.width 4 --agent.layers 1 --agent.batch-size 8"
)
_POLICY = "--eval-episodes 1 --warm-up 1"
AUGMENT = (
    f"augment synther {WIDE} --env Pendulum-v1 --width 8 --blocks 1 --steps 4 --batch-size 16 --sampling-steps 2 "
    "--no-report --out new.hdf5"
)
RUNS: dict[str, str] = {
    "train": f"train --agent td3_bc {_RUN} --seeds 3 --out train",
    "diffusion": f"train --agent diffusion_bc {_RUN} --seeds 3 --agent.denoising-steps 2 --out diffusion",
    "online": "online train --steps 8 --warm-up 4 --eval-every 4 --eval-episodes 1 --capacity 64 --log-every 2 "
    "--out online",
    "dppo": f"finetune policy diffusion --algo dppo {_POLICY} --environments 2 --rollout-steps 5 --steps 20 "
    "--eval-every 10 --epochs 1 --batch-size 10 --critic-width 4 --critic-layers 1 --tuned-steps 1 --out dppo",
    "dpo": f"finetune policy diffusion --algo dpo {_POLICY} --steps 4 --eval-every 2 --pairs 16 --batch-size 8 "
    "--out dpo",
    "nft": f"finetune policy diffusion --algo nft {_POLICY} --environments 2 --rollout-steps 5 --steps 20 "
    "--eval-every 10 --epochs 1 --batch-size 10 --critic-width 4 --critic-layers 1 "
    "--max-episode-steps 5 --out nft",
    "distil": "distil diffusion --eval-episodes 1 --steps 4 --eval-every 2 --batch-size 8 --out distil",
    "images": "finetune --model tiny-digits --algo ddpo-is --lora 1 --queries 8 --batch 4 --updates 1 --steps 2 "
    "--eval-samples 2 --warm-up 0 --out images",
    "augment": f"{AUGMENT} --samples 20",
}
"""The runs by kind: the words after `diffrl`. The folder has the kind's name, but augment's, which is `new-synther`.

Episodes of nft end where its checkpoints are: an environment begins a new one where a run goes on.
"""
OTHER: dict[str, str] = {
    kind: words.replace("--seeds 3", "--seeds 4").replace(f"--out {kind}", f"--out other/{kind}")
    for kind, words in RUNS.items()
}
"""As `RUNS`, with another seed or other steps: what files are swapped with lies below `other/`."""
OTHER["online"] = OTHER["online"].replace("--warm-up 4", "--warm-up 5")
OTHER["dppo"] = OTHER["dppo"].replace("--epochs 1", "--epochs 2")
OTHER["dpo"] = OTHER["dpo"].replace("--pairs 16", "--pairs 18")
OTHER["nft"] = OTHER["nft"].replace("--epochs 1", "--epochs 2")
OTHER["distil"] = OTHER["distil"].replace("--batch-size 8", "--batch-size 9")
OTHER["images"] = OTHER["images"].replace("--out", "--seed 5 --out")
OTHER["augment"] = OTHER["augment"].replace("--out new", "--seed 5 --out other/new")


def folder_of(kind: str) -> str:
    """The name of a run's folder."""
    return "new-synther" if kind == "augment" else kind


def preload(images: bool = True) -> None:
    """Import what commands import, so that forked children need not. images: also what image models need."""
    import torch

    torch.set_num_threads(1)
    others = [
        "tensorboard.summary.writer.event_file_writer",
        "torch.utils.tensorboard",
        "torch._dynamo",  # what PyTorch's optimisers import
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "minari.dataset._storages.hdf5_storage",
        "minari.dataset._storages.arrow_storage",
        "gymnasium.envs.classic_control.pendulum",
        "rich.progress",
        "rich.markup",
        "rich.table",
        "rich._emoji_codes",
        "yaml",
        "tyro.extras",
        "tyro.constructors",
        "configs",
        "torch.profiler",
        "PIL.PngImagePlugin",
        "PIL.JpegImagePlugin",
        "PIL.BmpImagePlugin",
        "PIL.GifImagePlugin",
        "PIL.PpmImagePlugin",
    ]
    if images:
        others += [
            "diffusers.pipelines.ddim.pipeline_ddim",
            "diffusers.models.unets.unet_2d",
            "peft.tuners.lora",
        ]
    ours = [
        module.name
        for package in ("diffrl", "agents", "envs")
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}.")
        if not module.name.endswith("__main__") and (images or not module.name.startswith("diffrl.images"))
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (*ours, *others):
            with contextlib.suppress(ImportError):  # extras that are not installed
                importlib.import_module(name)


def settle(folder: Path) -> None:
    """Caches and stores below `folder`, for this process and its children."""
    os.environ |= {
        "DIFFRL_DATA": str(folder / "data"),
        "DIFFRL_CACHE": str(folder / "cache"),
        "MINARI_DATASETS_PATH": str(folder / "minari"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def build(folder: Path, kinds: tuple[str, ...] = tuple(RUNS), minari: bool = True) -> Path:
    """Write the sound inputs below `folder`, those of these kinds of runs; give the folder. minari: its sets too."""
    folder = folder.resolve()
    settle(folder)
    whole = folder / "whole"
    if whole.exists():  # from a campaign before
        return folder
    folder.mkdir(parents=True)
    write_pendulum(folder / DATA, ROWS, 1.0)
    write_pendulum(folder / WIDE, ROWS)
    with h5py.File(folder / DATA) as file:
        np.savez(folder / NPZ, **{name: file[name][()] for name in file})
    write_labels(folder)
    if {"images"} & set(kinds):
        write_digits_model(folder / "cache", (4, 4))
    to_minari = (f"data convert {DATA} minari:{name} --format {form}" for form, name in MINARI.items())
    for words in (
        f"data convert {DATA} {SEALED}",
        *(to_minari if minari else ()),
        *(RUNS[kind] for kind in kinds),
        *(OTHER[kind] for kind in kinds),
    ):
        made = forked.run(words.split(), folder, seconds=300)
        if made.ended != "0":
            raise RuntimeError(f"diffrl {words}: {made.ended}\n{made.output[-3000:]}")
    for drawn in ("tensorboard", "learning_curve.png", "before_after.png"):  # what is copied for each case is small
        for path in folder.rglob(drawn):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    whole.touch()
    return folder


def write_labels(folder: Path) -> None:
    """Write `LABELS` and the other ones, ten pairs each of segments of four rows."""
    from diffrl.data.preferences import teach
    from envs.datasets import load_dataset

    for name, seed in ((LABELS, 0), (f"other/{LABELS}", 1)):
        teach(load_dataset(str(folder / WIDE), progress=False, action_limit=None), 10, 4, seed).write(folder / name)


def write_outside(folder: Path) -> Path:
    """What no command may read, as no command names it: arrays of `CANARY` in HDF5 and raw, and a pipe."""
    if folder.exists():
        return folder
    folder.mkdir(parents=True)
    values = np.full((ROWS, 3), CANARY, np.float32)
    with h5py.File(folder / SECRET, "w") as file:
        file["values"], file["column"], file["text"] = values, values[:, 0], "CANARY"
        file["flags"] = np.zeros(ROWS, bool)
    (folder / "secret.bin").write_bytes(values.tobytes())
    os.mkfifo(folder / PIPE)
    return folder


# --- What was loaded: run in the child, after the command, in the folder of the case --------------------------------


def dataset(name: str, rows: int | None = None) -> Callable[[], Any]:
    """A data set, or its first rows, as `train` would get it: digests of its columns; and its environment."""

    def look() -> Any:
        from envs.datasets import load_dataset

        found = load_dataset(name, rows, False, action_limit=None)
        return [
            {key: unchanged_digests.of_array(values) for key, values in found.columns().items()},
            str(found.metadata.get("env_id")),
        ]

    return look


def file(name: str) -> Callable[[], Any]:
    """The digests of a file that the command wrote, without wall times."""
    return lambda: unchanged_digests.of_file(Path(name))


def newest(run: str) -> Callable[[], Any]:
    """The digests of the tensors of a run's newest checkpoint, and its step."""

    def look() -> Any:
        last = max(Path(run, "checkpoints").glob("[0-9]*"))
        return [last.name, unchanged_digests.of_file(last / "state.safetensors")]

    return look


def labels(data: str) -> Callable[[], Any]:
    """The labels as commands read them: ids and labels of a data set's segments."""

    def look() -> Any:
        from diffrl.data.preferences import LabelledPairs
        from envs.datasets import load_dataset

        found = LabelledPairs.read(Path(LABELS), load_dataset(data, None, False, action_limit=None))
        return [found.segment, found.pairs.tolist(), found.labels.tolist()]

    return look


def config(run: str) -> Callable[[], Any]:
    """The configuration that a new run was made with."""

    def look() -> Any:
        from diffrl.runs import config as configuration

        return json.loads(json.dumps(str(configuration.load(Path(run, "config.yaml"), of_run=True))))

    return look
