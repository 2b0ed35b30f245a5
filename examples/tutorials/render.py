"""Execute the tutorials and keep what comes of it: notebooks here, pages in docs/tutorials.

    python examples/tutorials/render.py [policy augment images]

A tutorial is a script of cells (jupytext's percent format). It runs in a temporary folder; `$DIFFRL_DATA` and
`$DIFFRL_CACHE` keep what it builds.
"""

import base64
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jupytext
import nbclient

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGES = ROOT / "docs" / "tutorials"
NAMES = ("policy", "augment", "images")
MOST = 1_500
"""Characters of a cell's printed output that are kept."""


def notebook(name: str, sizes: Mapping[str, int] | None = None) -> Any:
    """The notebook of a script. sizes: other numbers for the constants of its first cell of code, by their names."""
    made = jupytext.read(HERE / f"{name}.py")
    made.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for cell in made.cells if sizes else []:
        assignment = re.search(r"^([A-Z]+(?:, [A-Z]+)*) = ([\d_, ]+)$", cell.source, re.MULTILINE)
        if assignment:
            values = dict(zip(assignment[1].split(", "), assignment[2].split(", "), strict=True)) | dict(sizes or {})
            line = f"{assignment[1]} = {', '.join(str(value) for value in values.values())}"
            cell.source = cell.source.replace(assignment[0], line)
            break
    return made


def execute(made: Any, folder: Path) -> Any:
    """Run all cells in a folder. Raises nbclient's CellExecutionError where one fails."""
    nbclient.NotebookClient(made, timeout=1800, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in made.cells:
        cell.metadata.pop("execution", None)  # when it ran is no content
        outputs = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
        if cell.cell_type == "code":
            cell.outputs = outputs
            cell.execution_count = None
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"  # not a random one: a notebook that says the same is the same file
    return made


def page(made: Any, name: str) -> tuple[str, dict[str, bytes]]:
    """The page in Markdown, and its pictures by file name."""
    parts, pictures = [f"<!-- Written by examples/tutorials/render.py from {name}.py: change that. -->"], {}
    for cell in made.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "text" in output or "image/png" not in data:
                text = output.get("text") or data.get("text/plain", "")
                if text.strip() and not text.startswith("<Figure"):
                    kept = text.rstrip().strip("\n")[:MOST]
                    parts.append(f"```text\n{kept}\n```")
            else:
                file = f"{name}-{len(pictures) + 1}.png"
                pictures[file] = base64.b64decode(data["image/png"])
                parts.append(f"![What the cell draws]({file})")
    return "\n\n".join(parts) + "\n", pictures


def main(names: Sequence[str]) -> None:
    """Execute, and write notebooks, pages and pictures."""
    PAGES.mkdir(exist_ok=True)
    for name in names or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            made = execute(notebook(name), Path(folder))
        jupytext.write(made, HERE / f"{name}.ipynb", fmt="ipynb")
        text, pictures = page(made, name)
        (PAGES / f"{name}.md").write_text(text)
        for old in PAGES.glob(f"{name}-*.png"):
            old.unlink()
        for file, content in pictures.items():
            (PAGES / file).write_bytes(content)
        print(f"{name}: {len(text.splitlines())} lines, {len(pictures)} pictures")


if __name__ == "__main__":
    main(sys.argv[1:])
