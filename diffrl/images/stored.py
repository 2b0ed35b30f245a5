"""What a run keeps, read back from its files: settings, evaluations, and the files of its rewards. No torch."""

import dataclasses
import json
import re
from collections.abc import Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from diffrl.images.config import ALGORITHMS, NOTHING, FinetuneConfig, schema_of
from diffrl.images.lists import metadata_rows, read_prompts
from diffrl.images.rewards.arguments import path_in, server_in
from diffrl.images.rewards.base import Reward, parts_of
from diffrl.images.rewards.entry import TERM, is_single
from diffrl.support import folder
from diffrl.support.files import read_yaml, sha256
from diffrl.support.schema import read

PART, HELD_OUT_PART = "reward: ", "held_out: "
"""What the name of a part of a summed reward, or held-out reward, begins with, in an evaluation."""
SCORED_BY = ("reward", "held_out")
"""The settings that are rewards."""
MEASURED_BY = "measured_by"
"""What `run.json` calls the settings that decide what an evaluation measures."""
SAMPLING = ("seed", "eval_samples", "steps", "eta", "guidance", "size", "frames")
"""Those by which two runs of one model are evaluated on other images, besides the prompts."""
TRAINED_BY = "trained_by"
"""What `run.json` calls the settings of which the run's checkpoints are."""
TRAINING = ("algo", "lora", "lora_alpha", "layers")
"""These settings: a checkpoint of other ones has other tensors, or what another algorithm made of them."""
MEASURING = ("model", "adapter", "precision", *SCORED_BY, *SAMPLING)
"""All of them besides the prompts."""
PROMPTS, DIGESTS = "prompts", "files"
"""What `measured_by` has besides: a digest of the prompts, and those of the rewards' files by their absolute paths."""
FILES_OF_REWARDS = "reward_files"
"""What `run.json` calls the files of the rewards, by their absolute paths, and their servers that have moved."""
_EXTRAS = {"control": ("control",), "reference": ("reference",), "video": ("reference", "frames")}
"""By the variant of a model: what of an example, besides its prompt, is given to the model in evaluations."""


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


def digests_of(config: FinetuneConfig) -> dict[str, str]:
    """The SHA-256 digests of the files that a run's rewards name, by their absolute paths."""
    specs = [getattr(config, name, None) or "" for name in SCORED_BY]
    files = [file[0] for spec in specs for text in spec.split(" + ") if (file := absolute(text)[1]) is not None]
    return {str(home): sha256(home) for home in files if home.is_file()}


def digest_of_prompts(config: FinetuneConfig) -> str | None:
    """The SHA-256 digest of the prompts of a run's evaluations, with what is known of each; None: the model's own.

    They are those of a file, or of its images or pairs. Raises UserError where these cannot be read.
    """
    data, pairs = getattr(config, "data", None), getattr(config, "pairs", None)
    if config.prompts is not None:
        prompts: list[Any] = list(zip(*read_prompts(config.prompts), strict=True))
    elif data not in (None, "digits"):
        extras = _EXTRAS.get(config.model.partition(":")[0], ())
        prompts = [[row.get("text"), *(row.get(name) for name in extras)] for _, row in metadata_rows(Path(data))]
    elif pairs is not None:
        extras = _EXTRAS.get(config.model.partition(":")[0], ())
        rows = [(str(row.get("text")), *(str(row.get(name)) for name in extras)) for _, row in metadata_rows(pairs)]
        prompts = [list(row) for row in dict.fromkeys(rows)]
    else:
        return None
    return folder.digest(json.dumps(prompts, sort_keys=True).encode())


def files_of(
    config: FinetuneConfig, before: Mapping[str, Any] = {}, measured: Mapping[str, Any] | None = None
) -> dict[str, dict[str, str]]:
    """The files and folders that a run's rewards name, by their absolute paths: how they were `written`, and, of a
    file, the SHA-256 digest of its content. Also the addresses of servers that have moved, and how they were written.

    before, measured: the same of the run that goes on, whose settings have absolute paths, but names as they were
    written; and its `measured_by`. What has moved is `written` as it was.
    """
    digests, measured = digests_of(config), measured or {}
    found: dict[str, dict[str, str]] = {}
    for name in SCORED_BY:
        old_terms = str(measured.get(name) or "").split(" + ")
        for term, old in zip_longest((getattr(config, name, None) or "").split(" + "), old_terms, fillvalue=""):
            text, file = absolute(term)
            same = same_reward(old, text, measured.get(DIGESTS) or {}, digests)
            moved = dict(zip(_named(text), _named(old), strict=True)) if same else {}
            for place, old_place in moved.items():
                address = before.get(old_place, {}).get("written", old_place)
                if "://" in place and place != address:
                    found[place] = {"written": address}
            if file is not None:
                home, typed = str(file[0]), file[1]
                digest = {"sha256": digests[home]} if home in digests else {}
                alike = [one for one in before.values() if digest and one.get("sha256") == digest["sha256"]]
                known = [before[path] for path in (moved.get(home, home), home) if path in before] + alike
                found[home] = {"written": known[0]["written"] if known else typed, **digest}
    return found


def same_reward(before: str, now: str, files_before: Mapping[str, str], files_now: Mapping[str, str]) -> bool:
    """Whether two texts of a reward, paths absolute, are of one: with the same files, and servers wherever they are.

    files_before, files_now: the digests of the files that there are, by path. Where none is known of a file or folder
    of before, another is taken for it if it is gone.
    """
    terms = [[_divided(term) for term in spec.split(" + ")] for spec in (before, now)]
    if [text for text, _ in terms[0]] != [text for text, _ in terms[1]]:
        return False
    places = [[place for _, found in of for place in found] for of in terms]
    return len(places[0]) == len(places[1]) and all(
        "://" in old or _same_file(old, new, files_before, files_now) for old, new in zip(*places, strict=True)
    )


def _same_file(old: str, new: str, files_before: Mapping[str, str], files_now: Mapping[str, str]) -> bool:
    """Whether two files, or folders, of rewards are one: see `same_reward`. Who reads a file says that it is gone."""
    if old in files_before and new in files_now:
        return files_before[old] == files_now[new]
    paths = Path(old).is_absolute() and Path(new).is_absolute()  # and no ids of the hub
    return old == new or (paths and old not in files_before and not Path(old).exists())


def _divided(term: str) -> tuple[str, list[str]]:
    """A term of a reward with blanks for where a server, and a file or folder, is; and these places."""
    match = TERM.fullmatch(term)
    if match is None or match["argument"] is None:
        return term, []
    name, argument = match["name"], match["argument"]
    spans = [span for span in (server_in(name, argument), path_in(name, argument, there=False)) if span is not None]
    places = [argument[start:end] for start, end in spans]
    for start, end in reversed(spans):
        argument = f"{argument[:start]}\0{argument[end:]}"
    return f"{term[: match.start('argument')]}{argument}", places


def _named(term: str) -> list[str]:
    """The addresses, whole, and paths of a term, as names of rewards have them."""
    match = TERM.fullmatch(term)
    places = _divided(term)[1]
    return [match["argument"].partition("#")[0] if match is not None and "://" in place else place for place in places]


def written(spec: str, files: Mapping[str, Mapping[str, str]]) -> str:
    """A reward's text, or its name, with its files and servers as they were written when the run began."""
    if not files:
        return spec
    either = "|".join(re.escape(home) for home in sorted(files, reverse=True))  # a longer one before its beginning
    return re.sub(rf"({either})(?=#|\s|$)", lambda match: files[match[1]]["written"], spec)


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


def of_one_scale(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations of a run that asks a person, with scores by votes in the last one alone: see `FinetuneRun`."""
    without = [{n: v for n, v in entry.items() if n != "reward" and not _of_votes(n)} for entry in history]
    preferred = any(map(preferring, history[-1:]))
    return without[:-1] + (history if preferred else without)[-1:]


def preferring(entry: Mapping[str, Any]) -> bool:
    """Whether votes have preferred an image of an evaluation by then; where they have not, all scores by them are 0."""
    return any([value for name, value in entry.items() if _of_votes(name)] or [entry.get("reward")])


def _of_votes(measure: str) -> bool:
    """Whether a measure is of the part of a sum that goes by votes."""
    return measure.startswith(f"{PART}human")


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
