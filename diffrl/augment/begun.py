"""A model's folder: with what it was begun, and whether a request goes on with what is there."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffrl.augment.augmenter import Augmenter, RealData
from diffrl.augment.config import Request
from diffrl.data import d4rl
from diffrl.support.errors import UserError, listed
from diffrl.support.folder import SUMS, Damaged, read_json, seal, sealed, write_json
from diffrl.support.machine import versions
from diffrl.training import checkpoint


@dataclass(frozen=True)
class Begun:
    """What the model in a folder is trained on and how: its `config.json`, which never changes."""

    dataset: str
    rows: int | None
    held_out: float
    seed: int
    env_id: str | None
    model: dict[str, Any]
    """The method's settings of the model and its training."""
    fingerprint: str
    """SHA-256 of the data's arrays."""
    rows_version: int
    """The version of the rows held out and drawn in training (`Augmenter.rows_version`); 1 in a folder without it."""
    verb: str
    """Whose model it is (`Augmenter.verb`); in a folder without it, the settings of the model tell."""


def begun_by(request: Request, augmenter: Augmenter, data: RealData) -> Begun:
    """What a request's model is trained on and how."""
    return Begun(
        request.dataset,
        data.rows,
        request.held_out,
        request.seed,
        data.task.env_id,
        augmenter.model_settings,
        d4rl.fingerprint(data.dataset),
        augmenter.rows_version,
        augmenter.verb,
    )


def claim(folder: Path, wanted: Begun, later: Mapping[str, Any]) -> Begun:
    """Make the folder, or see that what is there was begun with the same settings; give them as they stand there.

    Only the version of rows may be another one, where the folder has checkpoints. A start that was refused or cut
    before its first checkpoint has trained nothing, and is in the way of no other settings. Raises UserError for other
    settings, and for another method's start.
    later: `Augmenter.later_settings`.
    """
    path = folder / "config.json"
    if there := path.exists():
        settings = json.loads(json.dumps(dataclasses.asdict(wanted)))
        try:
            found = dict(read_json(path))
            version = int(found.pop("rows_version", 1))
            found["rows_version"] = settings["rows_version"]
            found["model"] = {**later, **found["model"]}
            if found.get("fingerprint") == settings["fingerprint"]:  # the same data, by whatever name
                # Where they are all rows, older versions kept the number asked for.
                found |= {name: settings[name] for name in ("dataset", "rows")}
            alike = set(found["model"]) == set(settings["model"])
            if alike:  # those of older versions do not say it
                found.setdefault("verb", wanted.verb)
            elif not settings.keys() - {"verb"} <= found.keys():
                raise ValueError("no model's")
        except Damaged:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no synthesis' of ours: choose another --folder, or another --out.") from error
        if not alike or found["verb"] != wanted.verb:
            verb = found.get("verb", "")
            whose = f"`diffrl augment {verb}`" if verb not in ("", wanted.verb) else "another method or version"
            what = "a model" if checkpoint.steps(folder) else "a start, without a checkpoint,"
            raise UserError(
                f"{folder} holds {what} of {whose}, and this is `diffrl augment {wanted.verb}`: choose another "
                "--folder, or another --out, or remove that folder."
            )
        if found != settings and checkpoint.steps(folder):
            flat_found, flat_wanted = ({**values, **values["model"]} for values in (found, settings))
            differ = [k for k in flat_wanted if k != "model" and flat_found.get(k) != flat_wanted[k]]
            texts = [
                "other data"
                if k == "fingerprint"
                else f"{k.replace('_', '-')} {flat_found.get(k)}, not {flat_wanted[k]}"
                for k in differ
            ]
            raise UserError(
                f"{folder} holds a model with other settings ({'; '.join(texts)}). Ask for the same to go on with it, "
                "or choose another --out or --folder, or remove it."
            )
        if checkpoint.steps(folder):
            return dataclasses.replace(wanted, rows_version=version)
    elif (folder / "versions.json").exists():
        raise UserError(
            f"{folder / 'versions.json'} is no synthesis' of ours, and is not overwritten: choose another --folder."
        )
    if not there:
        others = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
        if others not in ([], [SUMS]):  # without its config.json that alone is of a start that was cut
            raise UserError(
                f"{folder} holds files of something else ({listed(others)}), where no model is put: choose another "
                "--folder, such as a new one inside it."
            )
        (folder / SUMS).unlink(missing_ok=True)
    write_json(path, dataclasses.asdict(wanted))
    write_json(folder / "versions.json", versions())
    if not sealed(folder):
        seal(folder, (path.name, "versions.json"))
    return wanted
