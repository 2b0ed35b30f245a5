"""HDF5 files whose structure is odd: what their bytes say is well-formed, and is not what D4RL's layout has."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.faults.sound import PIPE, ROWS, SECRET

Odd = Callable[[h5py.File, np.random.Generator, Path], str]
"""A change of an open file; the path is the folder outside."""

COLUMNS = ("observations", "actions", "rewards", "terminals", "timeouts")
TARGETS = (*COLUMNS, "next_observations", "infos/qpos", "metadata/env_id", "images", "truncations")
"""Names that a link or an odd array may take: needed, known, and others."""


def _column(rng: np.random.Generator) -> str:
    return COLUMNS[int(rng.integers(len(COLUMNS)))]


def _target(rng: np.random.Generator) -> str:
    return TARGETS[int(rng.integers(len(TARGETS)))]


def _replace(file: h5py.File, name: str, values: Any, **options: Any) -> None:
    if name in file:
        del file[name]
    file.create_dataset(name, data=values, **options)


def _shape(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name = _column(rng)
    values = file[name][()]
    options: list[tuple[str, Any]] = [
        ("(N, 1)", values.reshape(len(values), -1)[:, :1]),
        ("(1, N)", values.reshape(1, -1)),
        ("(N, 1, 1)", values.reshape(len(values), -1)[:, :1, None]),
        ("(0,)", values[:0]),
        ("()", values.reshape(-1)[0]),
        ("(N, 0)", np.zeros((len(values), 0), values.dtype)),
        ("(N, 2, 3)", np.zeros((len(values), 2, 3), values.dtype)),
        ("(N,) + 30 ones", values.reshape(-1)[: len(values)].reshape(len(values), *(1,) * 30)),
        ("flat", values.reshape(-1)),
        ("one row", values[:1]),
        ("(N, 40000)", np.zeros((len(values), 40_000), np.float32)),
    ]
    said, new = options[int(rng.integers(len(options)))]
    _replace(file, name, new)
    return f"{name} has shape {said}"


def _rows(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name, n = _column(rng), int(rng.choice([1, ROWS - 1, ROWS + 1, 2 * ROWS]))
    _replace(file, name, np.resize(file[name][()], (n, *file[name].shape[1:])))
    return f"{name} has {n} rows"


def _dtype(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name = _column(rng)
    kinds = ("f2", "f8", ">f4", "i8", "u1", ">i2", "c8", "S7", "?", "g", "i1", "G")
    kind = kinds[int(rng.integers(len(kinds)))]
    _replace(file, name, file[name][()].astype(kind))
    return f"{name} as {kind}"


def _type(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    """Types that are no numbers."""
    name, n = _target(rng), ROWS
    options: list[tuple[str, Any, Any]] = [
        ("variable text", ["text"] * n, h5py.string_dtype()),
        ("one variable text", "text", h5py.string_dtype()),
        ("a text that is no UTF-8", b"\xff\xfex", h5py.string_dtype()),
        ("a compound", np.zeros(n, [("a", "f4"), ("b", "i4")]), None),
        ("references", np.array([file.ref] * n, object), h5py.ref_dtype),
        ("region references", np.array([file["rewards"].regionref[0:3]], object), h5py.regionref_dtype),
        ("ragged", np.array([np.arange(3.0)] * n + [np.arange(2.0)], object)[:n], h5py.vlen_dtype(np.float32)),
        ("an enumeration", np.zeros(n, "i4"), h5py.enum_dtype({"a": 0, "b": 1}, "i4")),
        ("arrays as elements", np.zeros(n, [("a", "f4", (3,))])["a"], None),
        ("opaque", np.zeros(n, "V8"), None),
        ("times", np.zeros(n, "i8").astype("M8[s]").astype(h5py.opaque_dtype("M8[s]")), None),
        ("bytes of length 100000", np.bytes_(b"x" * 100_000), None),
    ]
    said, values, kind = options[int(rng.integers(len(options)))]
    if name in file:
        del file[name]
    if kind is not None and kind.kind == "O" and isinstance(values, np.ndarray):
        made = file.create_dataset(name, (len(values),), kind)
        for i in range(min(len(values), 20)):
            made[i] = values[i]
    else:
        file.create_dataset(name, data=values, dtype=kind)
    return f"{name}: {said}"


def _value(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name = _column(rng)
    values, said = file[name][()], ("NaN", "infinity", "1e38", "2", "-0.5", "1e300")[int(rng.integers(6))]
    values = values.astype(np.float64)
    values.reshape(-1)[int(rng.integers(values.size))] = float(said)
    _replace(file, name, values if said == "1e300" else values.astype(np.float32))
    return f"{said} in {name}"


def _constant(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name, value = _column(rng), float(rng.choice([0, 1, np.nan, 1e30]))
    _replace(file, name, np.full(file[name].shape, value, np.float32))
    return f"{name} all {value}"


def _missing(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name = _column(rng)
    if rng.random() < 0.2:
        for each in list(file):
            del file[each]
        return "no columns"
    del file[name]
    return f"{name} missing"


def _renamed(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name = _column(rng)
    names = (
        name.upper(),
        name[:-1],
        f"{name} ",
        f"a/{name}",
        f"é{name}",
        "x" * 3000,
        f"{name}\n{name}",
        "[red]",
        "\x1b[2J",
    )
    new = names[int(rng.integers(len(names)))]
    file.move(name, new)
    return f"{name} renamed {new[:20]!r}"


def _many(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    place = ("", "infos/", "metadata/")[int(rng.integers(3))]
    for i in range(500):
        file[f"{place}key number {i}"] = np.float32(i)
    if rng.random() < 0.5:
        del file["rewards"]
    return f"500 keys in {place or 'the root'}"


def _deep(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    group: Any = file
    for _ in range(int(rng.choice([50, 1_500]))):
        group = group.create_group("g")
    group["observations"] = np.zeros(ROWS)
    return "groups in groups"


def _group(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name = _target(rng)
    if name in file:
        file.move(name, "moved")
        file.create_group(name)
        file.move("moved", f"{name}/{name}")
        return f"{name} is a group that holds it"
    file.create_group(name)
    return f"{name} is a group"


def _null(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name = _target(rng)
    _replace(file, name, h5py.Empty("f4"))
    return f"{name} is null"


def _named_type(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name = _target(rng)
    if name in file:
        del file[name]
    file[name] = np.dtype("f4")
    return f"{name} is a type"


def _filters(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name = _column(rng)
    values = file[name][()]
    options: list[dict[str, Any]] = [
        {"compression": "gzip", "compression_opts": 9, "shuffle": True, "fletcher32": True},
        {"compression": "lzf"},
        {"chunks": (1, *values.shape[1:]), "compression": "gzip"},
        {"fletcher32": True, "chunks": True},
        {"maxshape": (None, *values.shape[1:]), "chunks": True},
    ]
    chosen = options[int(rng.integers(len(options)))]
    _replace(file, name, values, **chosen)
    return f"{name} stored with {chosen}"


def _huge(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    """Sizes that only the header has."""
    name = _target(rng)
    shapes: tuple[tuple[int, ...], ...] = (
        (ROWS, 2**36),
        (2**40,),
        (2**40, 3),
        (2**62,),
        (ROWS, 2**20, 2**20),
    )
    shape = shapes[int(rng.integers(len(shapes)))]
    if name in file:
        del file[name]
    contiguous = rng.random() < 0.2 and int(np.prod(shape, dtype=object)) < 2**45
    options: dict[str, Any] = (
        {} if contiguous else {"chunks": tuple(min(n, 64) for n in shape[:2]) + (1,) * (len(shape) - 2)}
    )
    if not contiguous and rng.random() < 0.5:
        options["compression"] = "gzip"
    file.create_dataset(name, shape, "f4", **options)
    return f"{name} declared {shape}{' contiguous' if contiguous else ''}"


def _camera(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    """Pictures, 1.5 GB of them, that nobody needs."""
    name = ("infos/camera", "images", "infos/qpos")[int(rng.integers(3))]
    file.create_dataset(name, (ROWS, 480, 640, 3, 8), "u1", chunks=(1, 480, 640, 3, 1), compression="gzip")
    return f"{name} of 1.5 GB"


def _all_huge(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    """Every column, so that their rows agree."""
    n = int(rng.choice([2**33, 2**40]))
    for name in COLUMNS:
        rest = file[name].shape[1:]
        del file[name]
        file.create_dataset(name, (n, *rest), "f4", chunks=(2**16, *rest))
    return f"{n} rows declared"


def _attributes(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    options: list[tuple[str, Any]] = [
        ("a number", 3),
        ("an array", np.arange(5)),
        ("another digest", "0" * 64),
        ("null", h5py.Empty("f4")),
        ("bytes", np.bytes_(b"\xff" * 64)),
        ("a reference", file.ref),
        ("a long text", "x" * 60_000),
    ]
    said, value = options[int(rng.integers(len(options)))]
    file.attrs["sha256"] = value
    return f"the attribute sha256 is {said}"


def _metadata(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    names = (
        "env_id",
        "env_kwargs",
        "env_spec",
        "max_episode_steps",
        "dataset",
        "action_low",
        "action_bounds",
        "timeouts",
    )
    values: tuple[Any, ...] = (
        "[" * 20_000,
        "no-such-env-v0",
        "os:system",
        "this:that-v0",
        "Pendulum-v1",
        7,
        float("nan"),
        np.arange(1000),
        '{"g": 1}',
        "x" * 100_000,
        b"\xff\xfe",
        "",
        -1,
        [2.0],
        "null",
        "[bold]markup[/]",
        '{"id": "Pendulum-v1", "entry_point": "os:system", "kwargs": {"x": 1}}',
    )
    name, value = names[int(rng.integers(len(names)))], values[int(rng.integers(len(values)))]
    value = np.bytes_(value.encode() or b" ") if isinstance(value, str) else value
    _replace(file, f"metadata/{name}", value)
    return f"metadata/{name}: {str(value)[:40]}"


STRUCTURE: tuple[Odd, ...] = (
    _shape,
    _shape,
    _rows,
    _dtype,
    _type,
    _type,
    _value,
    _constant,
    _missing,
    _renamed,
    _many,
    _deep,
    _group,
    _null,
    _named_type,
    _filters,
    _huge,
    _huge,
    _camera,
    _all_huge,
    _attributes,
    _metadata,
    _metadata,
)
"""What a file may hold that it should not."""


# --- Links, and storage elsewhere -----------------------------------------------------------------------------------


def _free(file: h5py.File, rng: np.random.Generator) -> str:
    name = _target(rng)
    if name in file:
        file.move(name, f"elsewhere/{name}")
    return name


def _soft(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name = _free(file, rng)
    options = (f"/elsewhere/{name}", f"/{name}", "/nowhere", "/", "/elsewhere", f"elsewhere/../{name}", "")
    to = options[int(rng.integers(len(options)))] or "/x/" * 500
    file[name] = h5py.SoftLink(to)
    return f"{name} is a soft link to {to[:30]}"


def _chain(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name, length = _free(file, rng), int(rng.choice([3, 15, 200]))
    for i in range(length):
        file[f"link{i}"] = h5py.SoftLink(f"/link{i + 1}")
    file[f"link{length}"] = np.zeros(ROWS, np.float32)
    file[name] = h5py.SoftLink("/link0")
    return f"{name} is a chain of {length} soft links"


def _hard(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name = _free(file, rng)
    other = _column(rng)
    file[name] = file[other] if other in file else file["/"]
    return f"{name} is a hard link to {other}"


def _cycle(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name = ("infos", "metadata", "a")[int(rng.integers(3))]
    group = file.require_group(name)
    group["again"] = file["/"] if rng.random() < 0.5 else group
    return f"{name} holds itself"


def _external_link(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name = _free(file, rng)
    names = (SECRET, SECRET, SECRET, PIPE, "nothing.h5", "secret.bin")
    inside = ("column", "values", "flags", "text", "/", "nothing")
    to, part = names[int(rng.integers(len(names)))], inside[int(rng.integers(len(inside)))]
    file[name] = h5py.ExternalLink(str(outside / to), part)
    return f"{name} is an external link to {to}#{part}"


def _external_group(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name = ("infos", "metadata")[int(rng.integers(2))]
    if name in file:
        del file[name]
    file[name] = h5py.ExternalLink(str(outside / SECRET), "/")
    return f"{name} is an external link to a file's root"


def _external_storage(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name = _free(file, rng)
    sources = (outside / "secret.bin", outside / SECRET, outside / PIPE, outside / "nothing", Path("/dev/zero"))
    to = sources[int(rng.choice(5, p=[0.4, 0.2, 0.2, 0.1, 0.1]))]
    shape: tuple[int, ...] = () if name == "metadata/env_id" else (ROWS, 3) if "obs" in name else (ROWS,)
    kind = "S8" if not shape else ("f4", "u1")[int(rng.integers(2))]
    size = int(np.prod(shape, dtype=int)) * np.dtype(kind).itemsize
    if shape:
        file.create_dataset(name, shape, kind, external=[(str(to), int(rng.integers(0, 8)), size)])
    else:
        file.create_dataset(name, (1,), kind, external=[(str(to), 0, size)])
    return f"{name} is stored in {to.name}"


def _virtual(file: h5py.File, rng: np.random.Generator, outside: Path) -> str:
    name = _free(file, rng)
    sources = (
        str(outside / SECRET),
        ".",
        str(outside / PIPE),
        str(outside / SECRET) + "x",
        str(outside / "nothing.h5"),
    )
    to = sources[int(rng.choice(5, p=[0.5, 0.15, 0.15, 0.1, 0.1]))]
    layout = h5py.VirtualLayout((ROWS,), "f4")
    layout[:] = h5py.VirtualSource(to, name if to == "." and rng.random() < 0.5 else "column", (ROWS,))
    file.create_virtual_dataset(name, layout)
    return f"{name} is virtual, of {Path(to).name}"


LINKS: tuple[Odd, ...] = (
    _soft,
    _soft,
    _chain,
    _hard,
    _cycle,
    _external_link,
    _external_link,
    _external_group,
    _external_storage,
    _external_storage,
    _virtual,
    _virtual,
)
"""Links of all kinds, and arrays whose values lie in other files."""


def change(path: Path, rng: np.random.Generator, outside: Path, options: tuple[Odd, ...]) -> str:
    """One of the options, done to a file."""
    chosen = options[int(rng.integers(len(options)))]
    with h5py.File(path, "r+") as file:
        return chosen(file, rng, outside)


def unknown_filter(path: Path, rng: np.random.Generator) -> str:
    """A compressed file that says of its chunks that another filter packed them."""
    data, found = bytearray(path.read_bytes()), 0
    at = data.find(b"deflate\0")
    while at >= 0:  # the message has the filter's number eight bytes before its name
        data[at - 8 : at - 6] = (32015).to_bytes(2, "little")
        found, at = found + 1, data.find(b"deflate\0", at + 1)
    path.write_bytes(data)
    return f"{found} pipelines name a filter that is not there"
