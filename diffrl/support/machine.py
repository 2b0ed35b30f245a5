"""What the machine offers a process, what is said where memory runs out, and how it is set up for small tensors.

NumPy and torch come in when used.
"""

import contextlib
import functools
import os
import platform
import reprlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import platformdirs

from diffrl.support.errors import UserError, first_line, out_of_memory

COMPILING_PAYS_FROM = 10_000
"""Steps from which compiling pays although nothing is cached: a minute's wait against a third of a step's time."""


def cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> int:
    """The bytes of memory that this process may still take: the machine's, its control group's, its own limit.

    Each is counted where the system tells it; on Linux all are.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: Windows has no sysconf
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(OSError, ValueError, StopIteration, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(cached.get("inactive_file", 0)))
    with contextlib.suppress(ImportError, OSError, ValueError, IndexError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            found.append(limit - used)
    return max(min(found, default=2**63), 0)


@contextmanager
def explaining_memory(doing: str, less: str, kept: Callable[[], str] = str) -> Iterator[None]:
    """A block that needs much memory. Raises UserError, in two or three sentences, where it runs out.

    doing: what the block does, such as "training". less: what to change so that it needs less. kept: says, when memory
    has run out, what is not lost and how to go on; "" for nothing.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        said = ". ".join(first_line(error).rstrip(".").split(". ")[:3])  # CUDA goes on with advice of its own
        sentences = (f"Memory ran out in {doing}{f': {said}' if said else ''}", f"It needs less with {less}", kept())
        raise UserError(" ".join(f"{sentence}." for sentence in sentences if sentence)) from error


def settle() -> None:
    """Set this process up for training and acting on a CPU: one thread, and an allocator that keeps its memory.

    The matrices are small: a second thread makes a step slower (`OMP_NUM_THREADS` overrides, but for workers, which
    share the cores). Compiled code is to be kept in the user's cache folder: PyTorch's own choice is below /tmp, which
    the next reboot clears.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled_code_folder()))

    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    settle_allocator()


_default_type = threading.Lock()
_before: list[Any] = []
"""A type for each block of `usual_torch` that set float32: the caller's, and float32 for those within or beside it."""


@contextmanager
def usual_torch() -> Iterator[None]:
    """In the block torch has float32 by default, takes gradients, and casts nothing by itself, whatever a caller set.

    What is undone is `set_default_dtype`, `no_grad`, `inference_mode` and `autocast`; afterwards they are as they were.
    It decorates what trains and what acts, so that these are the same for every caller. The default type is the
    process's: other threads have float32 too, until the last block is left.
    """
    torch = sys.modules.get("torch")  # nobody changes what is not loaded yet
    if torch is None or (
        torch.get_default_dtype() == torch.float32
        and not _before
        and torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
        and not any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda"))
    ):
        yield
        return
    with _default_type:
        _before.append(torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        with _default_type:
            torch.set_default_dtype(_before.pop())


@contextmanager
def products(device: str, tf32: bool) -> Iterator[None]:
    """In the block, matrix products and convolutions on a GPU have their factors rounded to TF32, or stay float32.

    Afterwards they are taken as before: the setting is the whole process's, and its owner's.
    """
    import torch

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    if torch.device(device).type == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32  # which is on unless somebody says otherwise
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def compiled_code_folder() -> Path:
    """Where torch.compile keeps what it makes: `$TORCHINDUCTOR_CACHE_DIR`, else in the user's cache folder."""
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(platformdirs.user_cache_dir("diffrl")) / "compiled")


def settle_allocator() -> None:
    """Have glibc keep the memory that a step frees for the next step, by freeing one large block.

    Until a process has once freed a block of some MiB, glibc gives the top of the heap back to the system whenever
    that much is free, and faults it in again: up to 6,000 page faults and 20 ms in a training step. The limit follows
    the largest block freed, up to 32 MiB (mallopt(3), M_MMAP_THRESHOLD), so that data sets are still given back.
    """
    import numpy as np

    np.empty(31 * 2**20, np.uint8)


def resolve_device(name: str) -> str:
    """A device that can be used, by name: "auto" is CUDA where there is one. Raises UserError for any other."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(
            f"There is no device {reprlib.repr(name)}: expected cpu, cuda, cuda:N or auto (--device)."
        ) from error
    try:
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        why = first_line(error).split(". ")[0].rstrip(".")
        raise UserError(f"The device {name!r} cannot be used: {why}. Try the CPU (--device cpu).") from error
    return name


def versions(*more: str) -> dict[str, str]:
    """The versions a run is made with: Python's, those of packages and of `more`; in a checkout of ours the commit."""
    names = ("diffrl", "torch", "numpy", "gymnasium", "mujoco", *more)
    return {"python": platform.python_version(), **{name: _version(name) for name in names}, **_commit()}


@functools.cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def _commit() -> dict[str, str]:
    """The commit of the checkout that this process was started from, as `git`; nothing where there is none to name."""
    root = Path(__file__).parents[2]
    if (root / ".git").exists():  # a checkout of ours; installed from a wheel, there is no commit to name
        with contextlib.suppress(OSError):  # no git on this machine
            command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
            return {"git": subprocess.run(command, capture_output=True, text=True).stdout.strip()}
    return {}


def compiler_found() -> bool:
    """Whether there is the C++ compiler that torch.compile needs on a CPU. (Triton, on a GPU, comes with PyTorch.)"""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))


def choose_compiling(choice: bool | None, steps: int, device: str) -> bool:
    """Whether a run of `steps` steps is to be compiled: as was said (`choice`), else where it pays.

    Where it should be and cannot, says so.
    """
    compiling = steps >= COMPILING_PAYS_FROM if choice is None else choice
    if compiling and device.partition(":")[0] == "cpu" and not compiler_found():
        from diffrl.support.console import console

        console.print(
            "[yellow]Compiling the losses needs a C++ compiler (g++ or clang++; for example `apt install g++`), and "
            "none is found: going on without, which is slower.[/]"
        )
        return False
    return compiling
