"""Packages from outside, as an installer leaves them: a module, and a `.dist-info` that says what it brings."""

from pathlib import Path


def install(folder: Path, distribution: str, entry_points: dict[str, dict[str, str]], **modules: str) -> Path:
    """Put a distribution into `folder`, which is to stand on Python's path.

    entry_points: by group, the objects MODULE:NAME by name. modules: their source by name.
    """
    about = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = []
    for group, entries in entry_points.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
    (about / "entry_points.txt").write_text("\n".join(lines))
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return folder
