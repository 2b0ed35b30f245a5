"""Hook of MkDocs: what lies beside `docs/` gets into the site, and links to it are led there.

The pages are read in two places, on the site and in the repository. Their links are the repository's
(`../benchmarks/...`). Equations become MathML here, so that a page asks no other host for a script, and an agent's
settings become a table where a page says `<!-- settings: NAME -->`.
"""

import ast
import dataclasses
import html
import inspect
import itertools
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # MkDocs has put docs/ first, and docs/agents is no package

from agents.config import AGENTS  # noqa: E402

OUTSIDE = {"benchmarks/results": "results", "benchmarks/gpu/README.md": "gpu.md", "CONTRIBUTING.md": "contributing.md"}
"""Where each file or folder of the repository is in the site."""
NOWHERE = "nowhere:"
"""Where a link leads to what is in the repository alone; its text stays."""
WIDE = 90
"""Characters of a line of printed text beyond which it is a sentence, and is wrapped."""
SENTENCE = 45
"""Characters of a table's cell beyond which it is a sentence, for which a column on a phone is too narrow."""
SHOWN = {".md", ".png", ".json", ".html"}


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
    """Lead links from one page to another as the site has them, and fill in settings."""
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
            return match[0] if source.startswith("docs/") and not address.startswith("..") else f"]({NOWHERE})"
        up = "../" * (len(Path(page.file.src_uri).parts) - 1)
        return f"]({up}{place}{'#' + anchor if anchor else ''})"

    markdown = re.sub(r"\]\(([^)\s]+)\)", led, markdown)
    markdown = re.sub(rf"\[([^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*)\]\({NOWHERE}\)", r"\1", markdown)
    markdown = re.sub(r"(?ms)^```text\n(.*?)^```$", _wrapping, markdown)
    return re.sub(r"^<!-- settings: (\w+) -->$", lambda match: settings_table(match[1]), markdown, flags=re.MULTILINE)


def on_page_content(content: str, **_: Any) -> str:
    """Put MathML in the place of each equation that `arithmatex` has found."""

    def inline(match: re.Match[str]) -> str:
        return str(convert(_fenced(match[1])))

    def displayed(match: re.Match[str]) -> str:
        return f'<div class="equation">{convert(_fenced(match[1]), display="block")}</div>'

    content = re.sub(r"<td[ >].*?</td>", _whole_options, content, flags=re.DOTALL)
    content = re.sub(r"<table>.*?</table>", _stacking, content, flags=re.DOTALL)
    content = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, content, flags=re.DOTALL)
    return re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', displayed, content, flags=re.DOTALL)


def _wrapping(block: re.Match[str]) -> str:
    """A block of printed text; one with sentences in it is wrapped where the page ends, and not cut off."""
    sentences = any(len(line) > WIDE for line in block[1].splitlines())
    return f"```{{.text .sentences}}\n{block[1]}```" if sentences else block[0]


def _whole_options(cell: re.Match[str]) -> str:
    """A cell of a table in which options such as --agent.discount are not broken at hyphens, nor figures at their ±.

    A test's name, FILE::TEST, may be broken between its two parts.
    """

    def whole(code: re.Match[str]) -> str:
        if "::" in code[0]:
            return code[0].replace("::", "::<wbr>")
        return re.sub(r"(?<![^\s>])[^\s<>]*-[^\s<>]*", r'<span class="whole">\g<0></span>', code[0])

    return re.sub(r"<code>[^<]*</code>", whole, cell[0]).replace(" ± ", "&nbsp;±&nbsp;")


def _stacking(table: re.Match[str]) -> str:
    """A table, one with sentences marked: on a phone its cells stand below each other, each with its column's name."""
    heads = [re.sub(r"<[^>]+>", "", head) for head in re.findall(r"<th(?: [^>]*)?>(.*?)</th>", table[0], re.DOTALL)]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", table[0], re.DOTALL)
    if max((len(re.sub(r"<[^>]+>", "", cell)) for cell in cells), default=0) <= SENTENCE:
        return table[0]
    names = itertools.cycle(heads)
    named = re.sub(r"<td", lambda cell: f'<td data-of="{html.escape(html.unescape(next(names)))}"', table[0])
    return named.replace("<table>", "<table data-stacks>", 1)


def settings_table(agent: str) -> str:
    """The settings of an agent as a Markdown table: each field's option, default and docstring.

    Without those that the agent refuses.
    """
    config = AGENTS[agent]
    docs: dict[str, str] = {}
    for kind in reversed(config.__mro__[:-1]):
        if dataclasses.is_dataclass(kind):
            docs |= field_docs(kind)
    lines = ["| option | default | |", "|---|---|---|"]
    for field in dataclasses.fields(config):
        if docs.get(field.name, "").startswith("Refused:"):  # an inherited option that this agent does not take
            continue
        option = f"`--agent.{field.name.replace('_', '-')}`"
        lines.append(f"| {option} | {shown(field.default)} | {docs.get(field.name, '')} |")
    return "\n".join(lines)


def field_docs(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, in one line, by the field's name."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, doc in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(doc.value.value).split()).replace("|", "\\|").replace("<", "&lt;")
    return found


def shown(default: Any) -> str:
    """A default as one writes it on the command line; of one that depends on others the docstring says what it is."""
    if default is None:
        return "see text"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return " ".join(map(str, default))
    return f"{default:,}" if isinstance(default, int) and default >= 10_000 else str(default)


def _fenced(equation: str) -> str:
    """TeX in which bars that stand for a size are a pair: a browser spaces single ones as it does a relation."""
    bars = iter([r"\left|", r"\right|"] * equation.count("|"))
    return re.sub(r"(?<!\\)\|", lambda bar: next(bars), html.unescape(equation))


def _normal(parts: tuple[str, ...]) -> list[str]:
    found: list[str] = []
    for part in parts:
        if part == ".." and found:
            found.pop()
        else:
            found.append(part)
    return found
