"""What is compared: this tree, or the packages of a commit, as processes import them; and on which machine."""

import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from diffrl.support.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("diffrl", "agents", "envs", "configs")
"""The folders of a tree that are code."""


@contextmanager
def packages(revision: str) -> Iterator[Path]:
    """A folder that holds the packages of a commit, and nothing else of it. Raises UserError where there is none."""
    with tempfile.TemporaryDirectory(prefix="packages-") as folder:
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", revision, *PACKAGES], check=False, capture_output=True
        )
        if archive.returncode:
            raise UserError(f"git archive {revision}: {archive.stderr.decode().strip()}")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def environment(*path: Path) -> dict[str, str]:
    """That of a process of one thread that imports from the folders of `path`, and asks no network."""
    found = os.pathsep.join(map(str, path))
    return {**os.environ, "PYTHONPATH": found, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def machine() -> dict[str, str]:
    """What digests depend on: processor and packages; and the last commit that changed the code."""
    cpu = {"cpu": platform.processor() or platform.machine()}
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().split("\n\n")[0].splitlines()
        fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        names = ("model name", "cpu family", "model", "stepping")
        cpu["cpu"] = ", ".join(f"{name} {fields[name]}" for name in names if name in fields) or cpu["cpu"]
        instructions = fields.get("flags", fields.get("Features", ""))  # x86; ARM
        cpu["instructions"] = hashlib.sha256(" ".join(sorted(instructions.split())).encode()).hexdigest()[:16]
    others = ("torch", "numpy", "gymnasium", "mujoco", "diffusers", "transformers", "peft", "scikit-learn", "pillow")
    return {**cpu, **{name: metadata.version(name) for name in others}, "git": _commit()}


def processor(about: Mapping[str, str]) -> str:
    """The processor's name of a `machine`, as a page says it."""
    return about["cpu"].split(",")[0].removeprefix("model name ")


def git(*words: str) -> str:
    """What git says in this tree; empty where it fails."""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout.strip()


def _commit() -> str:
    """The last commit that changed the packages; with -dirty where they hold changes that are not committed."""
    code = ("--", *PACKAGES)
    return git("log", "-1", "--format=%h", *code) + ("-dirty" if git("status", "--porcelain", *code) else "")
