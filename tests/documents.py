"""The documentation as tests read it: its pages, their headings, links, commands and Python blocks."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


def pages() -> list[Path]:
    """Every page that people read."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "gpu" / "README.md"]
    return [*found, *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks" / "results").rglob("*.md"))]


def taught() -> list[Path]:
    """The pages whose commands and Python a reader is to copy: README and `docs/`."""
    return [page for page in pages() if page == ROOT / "README.md" or (ROOT / "docs") in page.parents]


def name(page: Path) -> str:
    """Its path in the repository."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language ("" for none), its text, the line at which the text begins, from 1."""

    page: Path
    language: str
    text: str
    line: int

    @property
    def where(self) -> str:
        """PAGE:LINE."""
        return f"{name(self.page)}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page. Raises ValueError where the last one has no end."""
    text = page.read_text()
    for match in re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL):
        indent, language, body = match.groups()
        lines = [line.removeprefix(indent) for line in body.splitlines()]
        yield Block(page, language, "\n".join(lines), text[: match.start(3)].count("\n") + 1)
    if len(re.findall(r"^ *```", text, re.MULTILINE)) % 2:
        raise ValueError(f"{name(page)}: a block without an end")


@dataclass(frozen=True)
class Command:
    """A line of a block that calls a program, in words, without its comment."""

    where: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        """As it is typed."""
        return shlex.join(self.words)


def commands(page: Path, program: str = "diffrl") -> list[Command]:
    """What a page's blocks call `program` with. Continued lines (a backslash at the end) are one."""
    found = []
    for block in blocks(page):
        if block.language not in ("", "bash", "sh", "console"):
            continue
        line = block.line
        for joined in re.split(r"(?<!\\)\n", block.text):
            text = joined.replace("\\\n", " ").removeprefix("$ ")
            if text.startswith(f"{program} "):
                words = shlex.split(re.sub(r"(?<=\s)#.*", "", text))  # shlex takes a word's own # for a comment
                if ">" in words:  # where a shell writes what is printed
                    del words[words.index(">") :]
                found.append(Command(f"{name(page)}:{line}", tuple(words[1:])))
            line += joined.count("\n") + 1
    return found


def inline(page: Path, program: str = "diffrl") -> list[Command]:
    """The commands with options that stand within sentences, in backquotes, whole: those with "..." are left out."""
    text = re.sub(
        r"^ *```.*?^ *```$", lambda m: "\n" * m[0].count("\n"), page.read_text(), flags=re.MULTILINE | re.DOTALL
    )
    found = []
    for match in re.finditer(rf"`{program} ([^`]*--[^`]*)`", text):
        if "..." not in match[1]:
            line = text[: match.start()].count("\n") + 1
            found.append(Command(f"{name(page)}:{line}", tuple(shlex.split(match[1].replace("\n", " ")))))
    return found


def without_code(text: str) -> str:
    """A page's text without blocks and inline code, which may hold brackets that are no links."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "`code`", text)


def links(page: Path) -> list[str]:
    """The targets of its links and pictures."""
    return re.findall(r"\]\(\s*<?([^)\s>]+)>?\s*\)", without_code(page.read_text()))


def anchors(page: Path) -> set[str]:
    """The anchors of its headings, as GitHub and Python-Markdown make them alike, and those written out as `id`."""
    found: set[str] = set()
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for heading in re.findall(r"^#+ +(.*?) *#*$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\s-]", "", plain).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", slug))
    return found | set(re.findall(r"""id="([^"]+)\"""", text))
