"""What kind of run a folder holds, and what is said of one that holds none. No torch: it is asked first."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agents.base_config import AgentConfig
from diffrl.runs import config as configuration
from diffrl.runs.config import TrainConfig
from diffrl.support.errors import UserError
from diffrl.support.files import plain_file, read_yaml, same_place, typed
from diffrl.support.folder import ABOUT, IMAGES, IMAGES_DISTIL, read_json, recorded, steps, without_checkpoint
from diffrl.support.remote import local_folder

OFFLINE, ONLINE = "offline", "online"
"""What `kind` in a folder's run.json may say, besides `IMAGES` and `IMAGES_DISTIL`; of a policy that is fine-tuned it
says the algorithm, such as dppo."""
SETTINGS = "settings.yaml"
"""The file that only a run that started from another run has: how it goes on from there."""
FILES = ("config.yaml", "preprocessing.safetensors", SETTINGS)
"""What a run's folder has from the beginning, besides run.json."""
OLD_SETTINGS = {"online": "online.yaml", "finetune": "finetune.yaml"}
"""That file's names in folders from before there were kinds, by the entry of run.json that tells the kind."""


def read_about(path: Path) -> dict[str, Any]:
    """What a folder's run.json says. Raises UserError where there is none that can be read."""
    about = read_json(path / ABOUT)
    if not isinstance(about, dict):
        raise UserError(f"{path} is damaged: run.json holds no entries.")
    return about


def kind_of(path: Path | str) -> str:
    """The kind of run in a folder: offline, online, images, or the algorithm that fine-tunes a policy.

    Raises UserError where the folder holds no run.
    """
    path = local_folder(path)
    if not (path / ABOUT).is_file():
        if (path / "finetune.yaml").is_file():  # of images, from before there were kinds
            return IMAGES
        raise UserError(no_run(path, [ABOUT]))
    return kind_in(path, read_about(path))


def require_run(path: Path | str) -> None:
    """Raise UserError where a folder holds no run: for commands, before they import torch."""
    kind_of(path)


def require_policy(path: Path | str) -> None:
    """Raise UserError where a folder holds no run of a policy: for commands, before they import torch."""
    if (kind := kind_of(path)) in (IMAGES, IMAGES_DISTIL):
        raise of_images(local_folder(path), kind)


def of_images(path: Path, kind: str) -> UserError:
    """What is said of a run of an image model, of a kind, where one of a policy is wanted."""
    if kind == IMAGES_DISTIL:
        return UserError(
            f"{path} is a distilled image model: `diffrl finetune --model {typed(path)}` takes it, its distil.json and "
            "distil.png show it."
        )
    return UserError(
        f"{path} is a fine-tuning run of an image model: `diffrl resume {typed(path)}` goes on with it, "
        f"`diffrl compare {typed(path)}` shows it."
    )


OF_CONFIGURATION = ("dataset", "env", "rows", "agent")
"""What may be changed of a configuration whose agents start untrained in their environment; a run's is its own."""


def refuse_beside(given: Sequence[str], path: Path | str) -> None:
    """Raise UserError where anything of `OF_CONFIGURATION` is given to a run, which goes on with its own."""
    if given:
        raise UserError(
            f"{given[0].partition('=')[0]} is for a configuration, whose agents start untrained; {path} is a run, and "
            "goes on with its own data, environment and agent: leave it out."
        )


def require_checkpoint(path: Path | str, which: str) -> None:
    """Raise UserError where a run has no checkpoint that is called so, last, best, or a step; or none at all."""
    known = steps(local_folder(path))
    if not known:
        raise UserError(without_checkpoint(Path(path)))
    if which not in ("last", "best") and not (which.isdigit() and int(which) in known):
        raise UserError(f"{path} has no checkpoint {which!r}: expected last, best, or one of {known}.")


def refuse_online(path: Path | str) -> None:
    """Raise UserError where no online run can start from a policy's run, whatever the options of it are."""
    if kind_of(path) == ONLINE:
        raise UserError(f"{path} is an online run already: `diffrl resume {typed(path)}`.")
    if environment_of(path) is None:
        raise UserError(
            f"{path} was trained without an environment, so there is nothing to go on in. Train it with --env ID."
        )
    refuse_offline_agent(agent_of(path), str(path))
    refuse_frozen(path)


def environment_of(path: Path | str) -> str | None:
    """The id of a policy's run's environment; None: it has none. Raises UserError where run.json cannot be read."""
    task = read_about(local_folder(path)).get("task")
    return task.get("env_id") if isinstance(task, dict) else None


def refuse_offline_agent(agent: AgentConfig, what: str) -> None:
    """Raise UserError where the agent of a run or configuration, called `what`, cannot learn in its environment."""
    if not agent.stepwise:
        chunk, n_step = getattr(agent, "chunk", 1), getattr(agent, "n_step", 1)
        given, where = "whole segments of data", "another agent"
        if chunk > 1 or n_step > 1:
            given = f"chunks of {chunk} actions" if chunk > 1 else f"returns of {n_step} steps"
            where = "--agent.chunk 1 and --agent.n-step 1"
        raise UserError(
            f"{what} is of the agent {agent.name}, which as it is set learns from {given}: it cannot go on "
            f"from single steps in its environment. Start from a run of {where}."
        )
    if not agent.learns_from_rewards:
        raise UserError(
            f"{what} is of the agent {agent.name}, which clones actions and never looks at a reward: in its "
            "environment it would learn to repeat itself. Fine-tune its policy (`diffrl finetune policy`), where it is "
            "a diffusion, or start from a run of an agent that learns from rewards, such as diffusion_ql."
        )


def refuse_frozen(path: Path | str) -> None:
    """Raise UserError where part of a run's policy is frozen, which a run that starts from it would not keep so."""
    local = local_folder(path)
    files = [local / file for file in (SETTINGS, *OLD_SETTINGS.values())]
    if any(read_yaml(file).get("tuned_steps") is not None for file in files if file.is_file()):
        raise UserError(
            f"{path} has a policy whose first denoising steps are frozen (--tuned-steps), which cannot be "
            "trained a second time; go on with it (`diffrl resume`), or start from the run it came from."
        )


def agent_of(path: Path | str) -> AgentConfig:
    """The settings of the agent of a policy's run. Raises UserError where config.yaml cannot be read."""
    return configuration.load(local_folder(path) / "config.yaml", of_run=True).agent


def untrained_at(path: Path | str) -> TrainConfig | None:
    """The configuration that `path` names; None where it names a run. Raises UserError where it names neither."""
    if Path(path).is_dir():
        require_policy(path)
        return None
    name = str(path).removesuffix(".yaml")
    if Path(path).is_file() or configuration.ships(name):
        return configuration.find(str(path))
    try:
        require_run(path)
    except UserError as error:
        raise UserError(f"{error} Nor is it a configuration: `diffrl train list` names those that ship.") from error
    return None


def kind_in(path: Path, about: Mapping[str, Any]) -> str:
    """The kind that `about`, a folder's run.json, names; in folders older than kinds other entries tell it."""
    if "kind" in about:
        return str(about["kind"])
    if about.get("finetune"):
        return str(read_yaml(path / OLD_SETTINGS["finetune"]).get("algo"))
    return ONLINE if about.get("online") else OFFLINE


def lacking(path: Path, missing: Sequence[str]) -> str:
    """What is said of a folder that is a run's, without these of its files; "" of one that is none."""
    others = [name for name in missing if os.path.lexists(path / name)]
    named = _recorded(path)
    if not (named.intersection(missing) or (path / ABOUT).exists() or (others and steps(path))):
        return ""
    if not others and not named and not steps(path):
        return without_checkpoint(path)
    name = (others or [name for name in missing if name in named] or missing)[0]
    what = "is missing"
    if name in others:
        try:
            plain_file(path / name)
        except OSError as error:
            what = f"cannot be read: {error.strerror or error}"
    return f"{path} is damaged: {name} {what}. Restore it from a copy."


def _recorded(path: Path) -> set[str]:
    """The files that a folder's checksums name; none where there are no checksums that can be read."""
    try:
        return {*recorded(path)}
    except UserError:
        return set()


def no_run(path: Path, missing: Sequence[str]) -> str:
    """Why a folder without these files is no run's, and where runs are, in a sentence or two."""
    if path.is_file():
        return f"{path} is a file, not a run's folder."
    if said := lacking(path, missing):
        return said
    what = "has no " + ", ".join(missing) if path.is_dir() else "does not exist"
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        what += f"; it may be an exported policy, which load_policy({str(path)!r}) takes in Python"
    inside = [] if (path / ABOUT).exists() else sorted(str(p.parent) for p in path.glob(f"*/{ABOUT}"))
    if inside:
        return f"{path} is not a run's folder, but has some in it, such as {inside[0]}."
    known = sorted(str(p.parent) for p in path.parent.glob("*/run.json")) if path.parent.is_dir() else []
    known = [one for one in known if not same_place(path, Path(one))]
    hint = f" Runs beside it: {', '.join(known[-3:])}." if known else ""
    return f"{path} is not a run's folder: it {what}.{hint}"
