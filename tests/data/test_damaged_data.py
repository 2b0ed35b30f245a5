"""A sample of damaged data files, each in a child of its own: an error in a sentence, or data; never anything else."""

import os
import random
import resource
import shutil
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffrl.data import d4rl
from diffrl.data import minari as minari_format
from diffrl.support.errors import DataError

CASES = 8
MEMORY = 2**30


def damaged(content: bytes, r: random.Random) -> bytes:
    """The content with one fault, mostly near its beginning, where formats say most."""
    b, at = bytearray(content), r.randrange(len(content) if r.random() < 0.3 else min(len(content), 5000))
    n = r.choice([1, 2, 4, 8])
    match r.choice(["bit", "word", "ones", "hole", "cut", "twice"]):
        case "bit":
            b[at] ^= 1 << r.randrange(8)
        case "word":
            b[at : at + n] = r.randbytes(n)
        case "ones":
            b[at : at + n] = b"\xff" * n
        case "hole":
            b[at : at + 16] = bytes(16)
        case "cut":
            del b[at:]
        case "twice":
            b[at:at] = b[at : at + n]
    return bytes(b)


def outcome(read: Callable[[], bytes]) -> str:
    """What a child says that reads: the error's text, or the digest of the data; within 10 s and a GiB more."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(10)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        try:
            said = f"data {read().hex()}"
        except DataError as error:
            said = f"error {error}"
        except BaseException:
            said = f"traceback {traceback.format_exc()[-1000:]}"
        os.write(into, said.encode(errors="replace")[:60_000])
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    return f"killed by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else said


def contents(dataset: object) -> bytes:
    return bytes.fromhex(d4rl.fingerprint(dataset))  # type: ignore[arg-type]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["own", "own, rows", "plain", "npz", "minari hdf5", "minari arrow", "minari json"])
def test_a_damaged_file_is_an_error_or_data_and_with_our_checksum_the_same_data(make, tmp_path, monkeypatch, kind):
    dataset = make([40, 60], "ot", has_next=True)
    path = inner = tmp_path / "whole.hdf5"
    if kind.startswith("minari"):
        pytest.importorskip("minari")
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
        form = "arrow" if kind.endswith("arrow") else "hdf5"
        path = minari_format.write("some/data-v0", dataset, form)
        names = {"hdf5": "main_data.hdf5", "arrow": "0/part-0.arrow", "json": "metadata.json"}
        inner = path / "data" / names[kind.split()[1]]
    elif kind == "npz":
        path = inner = tmp_path / "whole.npz"
        np.savez(path, **dataset.columns())
    else:
        d4rl.write(path, dataset)
        if kind == "plain":
            import h5py

            with h5py.File(path, "r+") as file:
                del file.attrs["sha256"]

    def read(source: Path) -> bytes:
        if kind.startswith("minari"):
            return contents(minari_format.read(source))
        return contents(d4rl.read(source, rows=30 if kind.endswith("rows") else None, check=kind != "plain"))

    whole, content = read(path), inner.read_bytes()
    for number in range(CASES):
        r = random.Random(f"{kind} {number}")
        copy = tmp_path / f"{number}" / path.name
        copy.parent.mkdir()
        shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
        (copy / inner.relative_to(path) if path.is_dir() else copy).write_bytes(damaged(content, r))
        said = outcome(lambda source=copy: read(source))
        assert said.startswith(("error", "data")), (number, said)
        if said.startswith("error"):
            assert len(said) < 1000
        elif kind.startswith("own"):
            assert said == f"data {whole.hex()}", number
