"""What a run keeps, read back from its files: settings, evaluations, and the files of its rewards. No torch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffrl.images.config import ALGORITHMS, NOTHING, FinetuneConfig, schema_of
from diffrl.images.rewards.arguments import path_in
from diffrl.images.rewards.base import Reward, parts_of
from diffrl.images.rewards.entry import TERM, is_single
from diffrl.support import folder
from diffrl.support.files import read_yaml, sha256
from diffrl.support.schema import read

SCORED_BY = ("reward", "held_out")
"""The settings that are rewards."""
MEASURED_BY = "measured_by"
"""What `run.json` calls the settings that decide what an evaluation measures."""
SAMPLING = ("seed", "eval_samples", "steps", "eta", "guidance", "size", "frames")
"""Those by which two runs of one model are evaluated on other images, besides the prompts."""
MEASURING = ("model", "adapter", "reward", "held_out", *SAMPLING)
"""All of them besides the prompts and, where no file has these, what they may be of: `data` and `pairs`."""
FILES_OF_REWARDS = "reward_files"
"""What `run.json` calls the files of the rewards, by their absolute paths."""


def absolute(term: str) -> tuple[str, tuple[Path, str] | None]:
    """A reward with its weight, the path in its argument absolute; and that path, with how it was written.

    As it is where the absolute path has what divides a reward from its argument's parts, or from the next one.
    """
    match = TERM.fullmatch(term)
    written = None if match is None else path_in(match["name"], match["argument"] or "")
    if match is None or written is None:
        return term, None
    start, end = written
    typed = match["argument"][start:end]
    home, before = Path(typed).expanduser().absolute(), match.start("argument")
    if "#" in str(home) or " + " in str(home):
        return term, None
    return f"{term[: before + start]}{home}{term[before + end :]}", (home, typed)


def files_of(config: FinetuneConfig, before: Mapping[str, Any] = {}) -> dict[str, dict[str, str]]:
    """The files and folders that a run's rewards name, by their absolute paths: how they were `written`, and, of a
    file, the SHA-256 digest of its content.

    before: the same of the run that goes on, whose settings have absolute paths, but names as they were written.
    """
    found = {}
    for spec in (getattr(config, name, None) for name in SCORED_BY):
        for _, file in (absolute(text) for text in (spec or "").split(" + ")):
            if file is not None:
                home, typed = file
                written = before.get(str(home), {}).get("written", typed)
                digest = {"sha256": sha256(home)} if home.is_file() else {}
                found[str(home)] = {"written": written, **digest}
    return found


def written(spec: str, files: Mapping[str, Mapping[str, str]]) -> str:
    """A reward's text, or its name, with its files as they were written when the run began."""
    for home, file in sorted(files.items(), reverse=True):  # a longer path before one that it begins with
        spec = spec.replace(home, file["written"]) if home != file["written"] else spec
    return spec


def as_written(reward: Reward | None, files: Mapping[str, Mapping[str, str]]) -> None:
    """Name a reward and its parts as they were written when the run began: evaluations and spreads go by the names."""
    for one in {id(one): one for one in (reward, *parts_of(reward)) if one is not None}.values():
        if (name := written(one.name, files)) != one.name:
            one.name = name


def changed(files: Mapping[str, Mapping[str, str]], before: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A sentence for each file of the rewards that is another than when the run was last worked on."""
    return [
        f"{file['written']} has changed since the run was last worked on: from here on rewards are those of the file "
        "as it is now."
        for home, file in files.items()
        if before.get(home, {}).get("sha256", file.get("sha256")) != file.get("sha256")
    ]


def load(path: Path) -> FinetuneConfig:
    """Read a `finetune.yaml` strictly. Raises UserError for anything it should not hold.

    Files of older runs hold the options of all algorithms: those that the run's own does not have are left out.
    """
    values = dict(read_yaml(path))
    schema = schema_of(values.get("algo"))
    if not {"reward", "model"} & values.keys() and (reward := getattr(schema, "reward", None)) is not None:
        values["reward"] = reward  # a file is no first look
    unread = {name for other in ALGORITHMS.values() for name in other.options()}.difference(schema.options())
    config = read(schema, {n: v for n, v in values.items() if v is not None and n not in unread}, str(path))
    if "held_out" in values and values["held_out"] is None and not is_single(config.scored_by or ""):
        return dataclasses.replace(config, held_out=NOTHING)  # begun before sums had companions
    return config


def read_history(file: Path) -> list[dict[str, Any]]:
    """The entries of `evaluations.json`. Raises Damaged where it is not as `FinetuneRun.add` writes it."""
    history = folder.read_json(file)
    try:
        for entry in history:
            if type(entry["round"]) is not int or not all(isinstance(value, int | float) for value in entry.values()):
                raise TypeError("a measure is no number")
            entry["queries"], entry["seconds"]
    except (KeyError, TypeError, AttributeError) as error:
        raise folder.Damaged(file, f"is damaged: it is no record of evaluations ({error})") from error
    return list(history)
