"""Hook of MkDocs: what lies beside `docs/` gets into the site, and links to it are led there.

The pages are read in two places, on the site and in the repository. Their links are the repository's
(`../benchmarks/...`).
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"benchmarks/results": "results", "benchmarks/gpu/README.md": "gpu.md", "CONTRIBUTING.md": "contributing.md"}
"""Where each file or folder of the repository is in the site."""
SHOWN = {".md", ".png", ".json"}


def outside() -> dict[str, str]:
    """Files beside `docs/`: path in the site by path in the repository."""
    found = {}
    for path, place in OUTSIDE.items():
        if (ROOT / path).is_file():
            found[path] = place
            continue
        for file in sorted((ROOT / path).iterdir()):
            if file.suffix in SHOWN:
                name = "index.md" if file.name == "README.md" else file.name
                found[f"{path}/{file.name}"] = f"{place}/{name}"
    return found


def on_files(files: Files, config: Any) -> Files:
    """Add them."""
    for path, place in outside().items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links from one page to another as the site has them."""
    places = outside()
    source = next((path for path, place in places.items() if place == page.file.src_uri), f"docs/{page.file.src_uri}")

    def led(match: re.Match[str]) -> str:
        address, _, anchor = match[1].partition("#")
        if "://" in address or not address:
            return match[0]
        path = Path(source).parent.joinpath(address)
        target = Path(*_normal(path.parts)).as_posix()
        if target.startswith("docs/"):
            place = target.removeprefix("docs/")
        elif target in places:
            place = places[target]
        else:  # code: read in the repository
            return match[0] if source.startswith("docs/") and not address.startswith("..") else "](#)"
        up = "../" * (len(Path(page.file.src_uri).parts) - 1)
        return f"]({up}{place}{'#' + anchor if anchor else ''})"

    return re.sub(r"\]\(([^)\s]+)\)", led, markdown)


def _normal(parts: tuple[str, ...]) -> list[str]:
    found: list[str] = []
    for part in parts:
        if part == ".." and found:
            found.pop()
        else:
            found.append(part)
    return found
