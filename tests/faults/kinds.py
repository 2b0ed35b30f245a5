"""The kinds of damaged inputs: each places a copy of a sound one, names a command, and damages it.

A case is numbered: kind and number give all random choices, so that one can be made again alone.
"""

import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import damages, hdf5, npz, sound

Rng = np.random.Generator


@dataclass(frozen=True)
class Case:
    """A command on an input, and how what it loaded is looked at."""

    words: str
    """What stands after `diffrl`."""
    look: Callable[[], Any]
    sealed: bool
    """Whether a changed load that nothing tells of is a fault: what is damaged has a checksum of ours."""


@dataclass(frozen=True)
class Kind:
    """A kind of damaged input."""

    name: str
    share: int
    """Cases of 5,000."""
    place: Callable[[Path, Path, Rng], Case]
    """Copies what the command needs from the sound inputs into a folder."""
    damage: Callable[[Path, Rng, Path, Path], str]
    """Damages the copy in a folder; also given: the folder outside, and the sound inputs. Says what it did."""

    def rng(self, number: int, use: int) -> Rng:
        """The random choices of a case: use 0, which command; 1, which damage."""
        return np.random.default_rng([zlib.crc32(self.name.encode()), number, use])


# --- Data files -----------------------------------------------------------------------------------------------------

_TRAIN = (
    "--agent bc --env none --workers 1 --eval-workers 0 --no-compile --log-every 2 --steps 2 --eval-every 2 "
    "--agent.width 4 --agent.layers 1 --agent.batch-size 8 --out out"
)


def _of_data(name: str, sealed: bool) -> Callable[[Path, Path, Rng], Case]:
    def place(source: Path, folder: Path, rng: Rng) -> Case:
        shutil.copyfile(source / name, folder / name)
        return _data_case(name, rng, sealed)

    return place


def _data_case(name: str, rng: Rng, sealed: bool = False) -> Case:
    words = (
        f"data info {name}",
        f"data info {name} --rows 50",
        f"data convert {name} out.h5",
        f"train --dataset {name} {_TRAIN}",
    )
    chosen = words[int(rng.choice(4, p=[0.5, 0.1, 0.2, 0.2]))]
    return Case(chosen, sound.dataset(name, 50 if "--rows" in chosen else None), sealed)


def _bytes_of(name: str) -> Callable[[Path, Rng, Path, Path], str]:
    def damage(folder: Path, rng: Rng, outside: Path, source: Path) -> str:
        chosen = damages.BYTES[int(rng.integers(len(damages.BYTES)))]
        if name == sound.SEALED and rng.random() < 0.1:
            return hdf5.unknown_filter(folder / name, rng)
        return chosen(folder / name, rng)

    return damage


def _structure(folder: Path, rng: Rng, outside: Path, source: Path) -> str:
    return hdf5.change(folder / sound.DATA, rng, outside, hdf5.STRUCTURE)


def _links(folder: Path, rng: Rng, outside: Path, source: Path) -> str:
    return hdf5.change(folder / sound.DATA, rng, outside, hdf5.LINKS)


def _npz(folder: Path, rng: Rng, outside: Path, source: Path) -> str:
    return npz.change(folder / sound.NPZ, rng)


# --- Minari ---------------------------------------------------------------------------------------------------------


def _of_minari(form: str) -> Callable[[Path, Path, Rng], Case]:
    def place(source: Path, folder: Path, rng: Rng) -> Case:
        shutil.copytree(source / "minari" / sound.MINARI[form], folder / "set-v0")
        return _data_case(str(folder / "set-v0"), rng)  # a name with a slash may be an id, but for whole paths

    return place


def _minari(folder: Path, rng: Rng, outside: Path, source: Path) -> str:
    data = folder / "set-v0" / "data"
    odd = rng.random()
    metadata = sorted(data.rglob("metadata.json"))
    if odd < 0.3:
        return "metadata.json: " + damages.change_json(metadata[0], rng)
    if odd < 0.4:
        return "metadata.json: " + _minari_metadata(metadata[0], rng)
    if odd < 0.65 and (data / "main_data.hdf5").exists():
        return "main_data.hdf5: " + _minari_hdf5(data / "main_data.hdf5", rng, outside)
    files = sorted(path for path in data.rglob("*") if path.is_file())
    chosen = files[int(rng.integers(len(files)))] if rng.random() < 0.7 else max(files, key=lambda p: p.stat().st_size)
    return f"{chosen.relative_to(data)}: {_damage_any(chosen, rng)}"


def _minari_metadata(path: Path, rng: Rng) -> str:
    about = json.loads(path.read_text())
    keys = ("env_spec", "eval_env_spec", "observation_space", "action_space", "data_format", "total_steps", "diffrl")
    key = keys[int(rng.integers(len(keys)))]
    values = (
        "{}",
        "[",
        "[" * 20_000,
        '{"type": "Discrete", "dtype": "int64", "start": 0, "n": 3}',
        '{"type": "Box", "dtype": "float32", "shape": [1000000000000], "low": [0], "high": [1]}',
        '{"type": "Nothing"}',
        '{"type": "Dict", "subspaces": {}}',
        '{"id": "os:system", "entry_point": "os:system", "kwargs": {}}',
        '{"id": "no-such-env-v0", "entry_point": null}',
        "arrow",
        "hdf5",
        "pickle",
        10**12,
        -1,
        None,
    )
    value = values[int(rng.integers(len(values)))]
    about[key] = value
    path.write_text(json.dumps(about))
    return f"{key}: {str(value)[:60]}"


def _minari_hdf5(path: Path, rng: Rng, outside: Path) -> str:
    import h5py

    with h5py.File(path, "r+") as file:
        episodes = sorted(name for name in file if name.startswith("episode_"))
        episode = file[episodes[int(rng.integers(len(episodes)))]]
        names = ("observations", "actions", "rewards", "terminations", "truncations")
        name = names[int(rng.integers(len(names)))]
        action = int(rng.integers(10))
        if action == 0:
            del episode[name]
            return f"{episode.name}/{name} missing"
        if action == 1:
            del file[episode.name]
            return f"{episode.name} missing"
        values = episode[name][()]
        del episode[name]
        if action == 2:
            episode[name] = h5py.ExternalLink(str(outside / sound.SECRET), "column")
        elif action == 3:
            size = int(values.nbytes)
            episode.create_dataset(name, values.shape, values.dtype, external=[(str(outside / "secret.bin"), 0, size)])
        elif action == 4:
            layout = h5py.VirtualLayout((len(values),), "f4")
            layout[:] = h5py.VirtualSource(str(outside / sound.SECRET), "column", (sound.ROWS,))[: len(values)]
            episode.create_virtual_dataset(name, layout)
        elif action == 5:
            episode[name] = values[:-1]
        elif action == 6:
            episode[name] = values.astype("S5") if values.dtype.kind != "f" else np.full(values.shape, np.nan, "f4")
        elif action == 7:
            episode.create_dataset(name, (2**40,), "f4", chunks=(64,))
        elif action == 8:
            episode.create_group(name)
        else:
            episode[name] = h5py.SoftLink("/nowhere" if rng.random() < 0.5 else episode.name)
    actions = (
        "",
        "",
        "an external link",
        "stored outside",
        "virtual",
        "a row less",
        "of odd values",
        "huge",
        "a group",
        "a soft link",
    )
    return f"{name} of an episode: {actions[action]}"


def _damage_any(path: Path, rng: Rng, other: Path | None = None) -> str:
    """A damage that fits the file."""
    odd = rng.random()
    if odd < 0.1:
        return damages.GONE[int(rng.integers(len(damages.GONE)))](path, rng)
    if odd < 0.2 and other is not None and other.is_file():
        return damages.swap(path, other)
    if odd < 0.7 and path.suffix == ".json":
        return damages.change_json(path, rng)
    if odd < 0.7 and path.suffix == ".yaml":
        return damages.change_yaml(path, rng)
    if odd < 0.35 and path.suffix == ".safetensors":
        return _tensors(path, rng)
    return damages.BYTES[int(rng.integers(len(damages.BYTES)))](path, rng)


def _tensors(path: Path, rng: Rng) -> str:
    """A header of safetensors that says something else of its tensors."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, said = damages.change_value(json.loads(data[8 : 8 + length]), rng)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return f"header: {said}"


# --- Runs -----------------------------------------------------------------------------------------------------------

_GO_ON: dict[str, tuple[str, ...]] = {
    "train": (
        "evaluate train --episodes 1",
        "resume train --steps 6",
        "online train --steps 4 --warm-up 2 --eval-every 4 --eval-episodes 1 --capacity 64 --out out",
    ),
    "online": ("evaluate online --episodes 1", "resume online --steps 12"),
    "dppo": ("evaluate dppo --episodes 1", "resume dppo --steps 30"),
    "dpo": ("evaluate dpo --episodes 1", "resume dpo --steps 6"),
    "nft": ("evaluate nft --episodes 1", "resume nft --steps 30"),
    "distil": ("evaluate distil --episodes 1", "resume distil --steps 6"),
    "images": ("resume images --queries 12",),
    "augment": (f"{sound.AUGMENT} --samples 30",),
}
_STARTED_FROM = {"online": "train", **dict.fromkeys(("dppo", "dpo", "nft", "distil"), "diffusion")}


def _of_run(kind: str) -> Callable[[Path, Path, Rng], Case]:
    name = sound.folder_of(kind)

    def place(source: Path, folder: Path, rng: Rng) -> Case:
        for part in (name, _STARTED_FROM.get(kind)):
            if part is not None:
                shutil.copytree(source / part, folder / part)
        shutil.copyfile(source / sound.WIDE, folder / sound.WIDE)
        words = _GO_ON[kind][int(rng.integers(len(_GO_ON[kind])))]
        look = sound.newest("out" if words.startswith("online") else name)
        if words.startswith("evaluate"):
            look = sound.file(f"{name}/evaluation.json")
        elif kind == "augment":
            look = sound.file("new.hdf5")
        return Case(words, look, True)

    return place


def _run(kind: str) -> Callable[[Path, Rng, Path, Path], str]:
    name = sound.folder_of(kind)

    def damage(folder: Path, rng: Rng, outside: Path, source: Path) -> str:
        run = folder / name
        files = sorted(path for path in run.rglob("*") if path.is_file() and path.suffix != ".png")
        chosen = files[int(rng.integers(len(files)))]
        relative = chosen.relative_to(run)
        said = _damage_any(chosen, rng, source / "other" / name / relative)
        return f"{relative}: {said}"

    return damage


# --- Labels ---------------------------------------------------------------------------------------------------------

_PREFER = f"--preferences {sound.LABELS} --steps 2 --width 4 --multipliers 1 --blocks 2 --reward.steps 2"


def _of_labels(source: Path, folder: Path, rng: Rng) -> Case:
    """Two commands read them: the one learns a reward, the other fine-tunes a run on the segments."""
    shutil.copyfile(source / sound.WIDE, folder / sound.WIDE)
    shutil.copyfile(source / sound.LABELS, folder / sound.LABELS)
    if rng.random() < 0.5:
        words = (
            f"augment flow-to-better {sound.WIDE} --env Pendulum-v1 {_PREFER} --reward.width 4 --samples 9 --horizon 4"
        )
        return Case(f"{words} --no-report --out new.hdf5", sound.labels(sound.WIDE), False)
    shutil.copytree(source / "diffusion", folder / "diffusion")
    words = f"finetune policy diffusion --algo dpo --preferences {sound.LABELS} --steps 2 --eval-every 2 --batch-size 4"
    return Case(f"{words} --eval-episodes 1 --warm-up 1 --out out", sound.labels(sound.WIDE), False)


def _labels(folder: Path, rng: Rng, outside: Path, source: Path) -> str:
    path = folder / sound.LABELS
    if rng.random() < 0.3:
        return _label(path, rng)
    return _damage_any(path, rng, source / "other" / sound.LABELS)


def _label(path: Path, rng: Rng) -> str:
    """A pair that contradicts another, names rows that are none, or is no pair; or another size of segments."""
    about = json.loads(path.read_text())
    pairs = about["pairs"]
    number = int(rng.integers(len(pairs)))
    ids, label = pairs[number]["segments"], pairs[number]["label"]
    changes: tuple[dict[str, Any], ...] = (
        {"segments": ids[::-1], "label": label},
        {"segments": [ids[0], ids[0]], "label": label},
        {"segments": [ids[0], 10**12], "label": label},
        {"segments": [-1, ids[1]], "label": label},
        {"segments": [ids[0], ids[1] + 0.5], "label": label},
        {"segments": ids, "label": 2},
        {"segments": ids, "label": None},
        {"segments": ids},
        {"segments": [*ids, 0], "label": label},
    )
    action = int(rng.integers(len(changes) + 2))
    if action < len(changes):
        pairs.append(changes[action])
    elif action == len(changes):
        about["segment"] = [0, -1, 10**9, "4", 4.5, 3][int(rng.integers(6))]
    else:
        about["pairs"] = [[], {}, pairs * 1000, None][int(rng.integers(4))]
    path.write_text(json.dumps(about))
    return f"labels: change {action} of pair {number}"


# --- Configurations -------------------------------------------------------------------------------------------------


def _of_yaml(source: Path, folder: Path, rng: Rng) -> Case:
    shutil.copyfile(source / sound.DATA, folder / sound.DATA)
    text = (source / "train/config.yaml").read_text()
    lines = [line for line in text.splitlines() if not line.startswith(("out:", "dataset:", "env:"))]
    (folder / "my.yaml").write_text("\n".join([f"dataset: {sound.DATA}", "env: none", *lines]) + "\n")
    # A forked child cannot compile: PyTorch waits there for threads that a fork does not have.
    words = "train my.yaml --steps 2 --eval-every 2 --log-every 2 --no-compile --out out"
    return Case(words, sound.config("out"), False)


def _yaml(folder: Path, rng: Rng, outside: Path, source: Path) -> str:
    path = folder / "my.yaml"
    return damages.change_yaml(path, rng) if rng.random() < 0.8 else _damage_any(path, rng)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("HDF5, bytes", 400, _of_data(sound.DATA, False), _bytes_of(sound.DATA)),
        Kind("HDF5 of ours, bytes", 400, _of_data(sound.SEALED, True), _bytes_of(sound.SEALED)),
        Kind("HDF5, structure", 500, _of_data(sound.DATA, False), _structure),
        Kind("HDF5, links", 400, _of_data(sound.DATA, False), _links),
        Kind("npz, bytes", 200, _of_data(sound.NPZ, False), _bytes_of(sound.NPZ)),
        Kind("npz, members", 300, _of_data(sound.NPZ, False), _npz),
        Kind("Minari, HDF5", 300, _of_minari("hdf5"), _minari),
        Kind("Minari, Arrow", 250, _of_minari("arrow"), _minari),
        Kind("run, train", 500, _of_run("train"), _run("train")),
        Kind("run, online", 250, _of_run("online"), _run("online")),
        Kind("run, dppo", 200, _of_run("dppo"), _run("dppo")),
        Kind("run, dpo", 200, _of_run("dpo"), _run("dpo")),
        Kind("run, nft", 150, _of_run("nft"), _run("nft")),
        Kind("run, distil", 150, _of_run("distil"), _run("distil")),
        Kind("run, images", 200, _of_run("images"), _run("images")),
        Kind("run, augment", 200, _of_run("augment"), _run("augment")),
        Kind("configuration", 300, _of_yaml, _yaml),
        Kind("labels", 100, _of_labels, _labels),
    )
}
"""All kinds by name; their shares add up to 5,000."""
assert sum(kind.share for kind in KINDS.values()) == 5_000
