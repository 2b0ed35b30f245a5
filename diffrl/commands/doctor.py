"""`diffrl doctor`: what works on this machine, and what to install for the rest."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.table import Table

from diffrl.support.console import Terminal
from diffrl.support.errors import UserError

State = Literal["works", "missing", "note"]
MARKS: dict[State, str] = {"works": "[green]ok[/]", "missing": "[yellow]--[/]", "note": ""}
TIGHT = 5 * 2**30
"""Free bytes of a disk below which a long run, or a generated data set, may not fit."""
RENDERERS = ("egl", "osmesa", "glfw")
DRAW = """import os, sys
import gymnasium
env = gymnasium.make("InvertedPendulum-v5", render_mode="rgb_array")
env.reset(seed=0)
picture = env.render()
sys.exit(0 if picture is not None and picture.std() > 0 else 1)
"""


@dataclass(frozen=True)
class Finding:
    """A line of the page: what was looked at, what was found, and what to do about it."""

    part: str
    found: str
    advice: str = ""
    state: State = "works"


@dataclass(frozen=True)
class Doctor:
    """Say what works on this machine: versions, processor, GPU, compiler, rendering, extras, folders, free disk.

    It changes nothing, writes only what is gone at once, and asks no network. The exit code is 0 whatever it finds.
    """

    rendering: bool = True
    """Try whether MuJoCo draws a picture without a screen, which takes some seconds."""

    def run(self) -> int:
        """Look, and print the page."""
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        findings = list(examine(self.rendering))
        for finding in findings:
            advice = f"\n[dim]{finding.advice}[/]" if finding.advice else ""
            table.add_row(MARKS[finding.state], finding.part, finding.found.replace("[", r"\[") + advice)
        console = Terminal(highlight=False)
        console.print(table)
        missing = dict.fromkeys(finding.part for finding in findings if finding.state == "missing")
        done = "All of it works here." if not missing else f"Look at: {', '.join(missing)}. All else works."
        console.print(f"\n{done} Begin with:")
        console.print(f"  {first_command()}", markup=False, soft_wrap=True)
        return 0


def examine(rendering: bool = True) -> Iterator[Finding]:
    """All findings, in the order of the page. rendering: draw a picture too."""
    yield from versions()
    yield from machine()
    yield compiler()
    if rendering:
        yield drawing()
    yield from extras()
    yield from folders()


def versions() -> Iterator[Finding]:
    """What is installed, and of others what it brings."""
    from diffrl.support import machine as this

    found = this.versions()
    ours, commit = found.pop("diffrl"), found.pop("git", "")
    yield Finding("diffrl", f"{ours}{f', commit {commit}' if commit else ''}, in {Path(__file__).parents[1]}")
    yield Finding("versions", ", ".join(f"{name} {version}" for name, version in found.items()))
    yield from brought()


def brought() -> Iterator[Finding]:
    """What other packages bring, each tried: those that can be used in a line, and a line for each that cannot."""
    from agents import try_out
    from diffrl.augment.methods import tried_out as tried_method
    from diffrl.commands.augment import VERBS
    from diffrl.images.rewards.registry import tried_out
    from diffrl.support import plugins
    from diffrl.support.errors import UserError
    from envs.registry import family

    tries: dict[plugins.Group, Callable[[plugins.Plugin], object]]
    tries = {"diffrl.agents": try_out, "diffrl.rewards": tried_out, "diffrl.datasets": family}
    tries["diffrl.augmenters"] = partial(tried_method, own=VERBS)
    usable, broken = [], []
    for plugin in [plugin for group in plugins.WHAT for plugin in plugins.found(group)]:
        try:
            tries[plugin.group](plugin)
            usable.append(f"{plugin.name} of {plugin.distribution}")
        except UserError as error:
            broken.append(Finding(f"plugin {plugin.name}", str(error), state="missing"))
    if usable:
        yield Finding("plugins", ", ".join(usable))
    yield from broken


def machine() -> Iterator[Finding]:
    """Processor, memory and GPUs."""
    import torch

    from diffrl.support.machine import cores, free_memory

    threads = os.environ.get("OMP_NUM_THREADS", "1, as diffrl sets it")
    yield Finding("processor", f"{cores()} cores to use; threads of a process: {threads}")
    memory = free_memory()
    low = memory < 2 * 2**30
    advice = "Less than 2 GiB: use fewer rows (--rows) and one process (--workers 1)." if low else ""
    yield Finding("memory", f"{size(memory)} free", advice, "missing" if low else "works")
    if not torch.cuda.is_available():
        built = "PyTorch is a build for CPUs" if torch.version.cuda is None else "PyTorch finds no CUDA device"
        yield Finding("GPU", f"none: {built}. Everything runs on the CPU.", state="note")
        return
    for i in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(i)
        yield Finding("GPU", f"{card.name}, {size(card.total_memory)}: --device cuda:{i}")


def compiler() -> Finding:
    """What torch.compile needs on a CPU."""
    from diffrl.support.machine import compiled_code_folder, compiler_found

    slow, variable = "Runs go on uncompiled, which is slower.", "$TORCHINDUCTOR_CACHE_DIR"
    if not compiler_found():
        advice = f"{slow} Install g++ or clang++, such as by `apt install g++`."
        return Finding("compiler", "no C++ compiler", advice, "missing")
    folder = compiled_code_folder()
    if why := refusal(folder):
        advice = f"{slow} Choose another folder for what is compiled by {variable}."
        return Finding("compiler", f"a C++ compiler, but {why}", advice, "missing")
    return Finding("compiler", f"a C++ compiler: long runs compile their losses, into {folder} ({variable})")


def drawing() -> Finding:
    """Whether MuJoCo draws into memory, tried in a process of its own: a missing driver may end it."""
    chosen = os.environ.get("MUJOCO_GL")
    for name in [chosen] if chosen else RENDERERS:
        try:
            command, environment = [sys.executable, "-c", DRAW], {**os.environ, "MUJOCO_GL": name}
            done = subprocess.run(command, env=environment, capture_output=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return Finding("rendering", f"MuJoCo draws without a screen: MUJOCO_GL={name}")
    tried = f"MUJOCO_GL={chosen}" if chosen else ", ".join(RENDERERS)
    advice = (
        "Training and mazes need no pictures of MuJoCo. For them: `apt install libegl1 libosmesa6`, or a GPU's driver."
    )
    return Finding("rendering", f"MuJoCo draws no picture (tried: {tried})", advice, "missing")


def extras() -> Iterator[Finding]:
    """Each extra of the package that its users may want, and whether what it names is installed."""
    try:
        extras_of_ours = wanted()
    except metadata.PackageNotFoundError:  # a checkout on the path of modules
        found = f"not known: diffrl runs from {Path(__file__).parents[2]} and is not installed"
        yield Finding("extras", found, "pip install -e . there, which brings the command `diffrl`, too.", "missing")
        return
    for extra, packages in extras_of_ours.items():
        there, lacking = [], []
        for package in packages:
            try:
                there.append(f"{package} {metadata.version(package)}")
            except metadata.PackageNotFoundError:
                lacking.append(package)
        if lacking:
            yield Finding(extra, f"not installed: {', '.join(lacking)}", f"pip install 'diffrl[{extra}]'", "missing")
        else:
            yield Finding(extra, ", ".join(there))


def wanted() -> dict[str, list[str]]:
    """The packages of each extra, as the installed package's metadata name them; those for developers left out."""
    found: dict[str, list[str]] = {}
    for requirement in metadata.requires("diffrl") or []:
        name = re.match(r"[\w.-]+", requirement)
        extra = re.search(r"""extra *== *["']([\w-]+)["']""", requirement)
        if name and extra and extra[1] not in ("dev", "docs"):
            found.setdefault(extra[1], []).append(name[0])
    return found


def folders() -> Iterator[Finding]:
    """Where data, caches and runs go, whether one may write there, and how much fits."""
    from diffrl.data import minari
    from diffrl.support.files import cache_directory

    for part, folder, variable in (
        ("D4RL's data", data_folder(), "$DIFFRL_DATA"),
        ("Minari's data", minari.store(), "$MINARI_DATASETS_PATH"),
        ("models kept", cache_directory(), "$DIFFRL_CACHE"),
        ("runs", Path("runs").absolute(), "--out"),
    ):
        yield place(part, folder, variable)


def data_folder() -> Path:
    """Where D4RL's data go; what `$DIFFRL_DATA` names, too, where that is a file."""
    from diffrl.support.files import data_directory

    try:
        return data_directory()
    except UserError:
        return Path(os.environ["DIFFRL_DATA"]).expanduser()


def place(part: str, folder: Path, variable: str) -> Finding:
    """One folder. variable: what chooses another."""
    if why := refusal(folder):
        return Finding(part, why, f"Choose another by {variable}.", "missing")
    above = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(above).free
    here = "" if above == folder else ", not there yet"
    advice = f"Little room. Another place: {variable}." if free < TIGHT else ""
    return Finding(part, f"{folder}{here}; {size(free)} free", advice, "missing" if advice else "works")


def refusal(folder: Path) -> str:
    """Why a folder takes no file, half a sentence; "" where it does. Tried by a file that is gone at once.

    One that is not there yet would be made: where it cannot be, that is said.
    """
    from diffrl.support.failure import no_room

    verb = "made"
    try:
        verb = "written" if folder.is_dir() else verb
        why = no_room(folder / "file")
    except OSError as error:  # where a folder above may not be entered
        why = error.strerror or str(error)
    return f"{folder} cannot be {verb}: {why[:1].lower()}{why[1:]}" if why else ""


def first_command() -> str:
    """What to begin with: the command that trains, with other folders where the usual ones cannot be written."""
    from diffrl.support.files import typed

    command = "diffrl train diffusion_ql/maze2d-umaze-v1-small"
    homes = (Path.home(), Path(tempfile.gettempdir()))
    other = next((home / "diffrl" for home in homes if not refusal(home / "diffrl")), Path("FOLDER"))
    if refusal(Path("runs").absolute()):
        free = next(run for number in itertools.count(1) if not (run := other / f"run{number}").exists())
        command = f"{command} --out {typed(free)}"
    if refusal(data_folder()):
        command = f"DIFFRL_DATA={typed(other / 'data')} {command}"
    return command


def size(n: int) -> str:
    """Bytes as a person reads them."""
    return f"{n / 2**30:,.1f} GiB" if n >= 2**30 else f"{n / 2**20:,.0f} MiB"
