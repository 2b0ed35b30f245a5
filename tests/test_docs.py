"""The documentation says what is so: links lead somewhere, commands are understood, Python compiles.

`test_docs_run.py`, slow, runs the commands and the Python too.
"""

import ast
import contextlib
import dataclasses
import html
import importlib.util
import inspect
import io
import json
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from PIL import Image

import agents
from agents.config import AGENTS
from diffrl import cli
from diffrl.data import d4rl
from diffrl.data.offline import OfflineDataset
from diffrl.support.errors import UserError
from diffrl.tuning.config import FORWARD
from diffrl.tuning.distil_config import keeps_critics
from tests import documents
from tests.browser import CHROMIUM, Browser
from tests.documents import ROOT, Command, blocks, commands, inline, name, pages, taught

OURS = {"diffrl", "agents", "envs"}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", pages(), ids=name)
def test_every_link_leads_to_a_file_and_its_heading(page: Path) -> None:
    dead = []
    for link in documents.links(page):
        address, _, anchor = link.partition("#")
        if "://" in address or address.startswith("mailto:"):
            continue
        target = (page.parent / address).resolve() if address else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in documents.anchors(target)):
            dead.append(link)
    assert not dead


def test_the_exit_codes_are_those_that_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every code that an error of ours has is explained, and by name what ends with 1 though nothing has failed."""
    section = (ROOT / "docs" / "runs.md").read_text().partition("## Exit codes")[2]
    explained = {int(code) for code in re.findall(r"^\| (\d+) \|", section, re.MULTILINE)}
    given = {
        node.value.value
        for path in (ROOT / "diffrl").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        if any(isinstance(target, ast.Name) and target.id == "exit_code" for target in node.targets)
    }
    assert given >= {1, 2, 130}
    assert given | {0} == explained
    whole = OfflineDataset(
        *(np.zeros((9, n), np.float32) for n in (3, 1)), np.zeros(9, np.float32), *np.zeros((2, 9), bool)
    )
    broken = dataclasses.replace(whole, rewards=np.full(9, np.nan, np.float32))
    file = d4rl.write_blocks(tmp_path / "data.hdf5", [broken.columns()], {})
    ends_with_1 = re.findall(r"^\| 1 \|.*?(?=^\| \d)", section, re.MULTILINE | re.DOTALL)[0]
    for words in (["data", "list", "nothing-of-the-kind"], ["data", "info", str(file)]):
        assert cli.main(words) == 1
        assert f"`{' '.join(words[:2])}`" in ends_with_1
    assert "diverged" in ends_with_1


class _Parsed(Exception):
    """A command's words were understood; what they would do is left."""


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[Command], None]:
    """Let the command line read a command's words with its own parsers, and stop before it does anything."""
    real = tyro.cli

    def understood(*arguments: Any, **options: Any) -> Any:
        made = real(*arguments, **options)
        if options.get("return_unknown_args") and made[1]:  # which `diffrl.commands.words.parse` refuses
            return made
        raise _Parsed

    class Subcommands:
        """`tyro.extras.SubcommandApp` as `diffrl data` and `diffrl augment` use it."""

        def __init__(self) -> None:
            self.verbs: dict[str, type] = {}

        def command(self, name: str) -> Callable[[type], None]:
            return lambda schema: self.verbs.__setitem__(name, schema)

        def cli(self, args: list[str], **_: Any) -> Any:
            return understood(self.verbs[args[0]], args=args[1:])

    monkeypatch.setattr(tyro, "cli", understood)
    monkeypatch.setattr(tyro.extras, "SubcommandApp", Subcommands)

    def read(command: Command) -> None:
        verb, *words = command.words
        if verb in ("--help", "--version") or words == ["list"]:
            return
        assert verb in cli.VERBS, f"{command.where}: there is no diffrl {verb}"
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), pytest.raises(_Parsed):
                cli.VERBS[verb](words)
        except (SystemExit, UserError) as error:
            if isinstance(error, UserError) or error.code:
                pytest.fail(f"{command.where}: diffrl {command.text}\n{error}\n{said.getvalue()}")

    return read


@pytest.mark.parametrize("page", [p for p in pages() if commands(p) or inline(p)], ids=name)
def test_every_command_is_understood(page: Path, parse: Callable[[Command], None]) -> None:
    """Those of blocks, and of the pages that teach those within sentences too."""
    for command in [*commands(page), *(inline(page) if page in taught() else [])]:
        parse(command)


def test_a_command_with_a_slip_is_not_understood(parse: Callable[[Command], None]) -> None:
    """What the test above would say: of an option, of a verb, of a verb's verb."""
    for words in ("train --agent bc --dataset x.hdf5 --stepz 3", "evaluate runs/NAME --episode many"):
        with pytest.raises(pytest.fail.Exception, match=r"page.md:1: diffrl"):
            parse(Command("page.md:1", tuple(words.split())))
    with pytest.raises(AssertionError, match="there is no diffrl trian"):
        parse(Command("page.md:1", ("trian",)))
    with pytest.raises(pytest.fail.Exception, match="did you mean `diffrl data info x --rows 3`"):
        parse(Command("page.md:1", ("data", "inof", "x", "--rows", "3")))


def test_every_agent_has_a_page_and_the_overview_leads_to_it() -> None:
    """A page `docs/agents/NAME.md` with the places that a reader looks for; the site's menu has it too."""
    folder, menu = ROOT / "docs" / "agents", (ROOT / "mkdocs.yml").read_text()
    missing = [agent for agent in AGENTS if not (folder / f"{agent}.md").is_file()]
    assert not missing, f"write docs/agents/NAME.md for {', '.join(missing)}"
    assert {page.stem for page in folder.glob("*.md")} == set(AGENTS)
    overview = documents.links(ROOT / "docs" / "agents.md")
    for agent in AGENTS:
        text = (folder / f"{agent}.md").read_text()
        lacks = [part for part in (f"<!-- settings: {agent} -->", *PARTS) if part not in text]
        assert not lacks, f"docs/agents/{agent}.md lacks {lacks}"
        assert f"agents/{agent}.md" in overview, f"docs/agents.md has no link to {agent}"
        assert f": agents/{agent}.md\n" in menu, f"mkdocs.yml's menu lacks {agent}"


PARTS = ("## Equation", "## When to use it", "## Measured", "## What differs from the paper", "## Settings")


@pytest.fixture(scope="module")
def hook() -> Any:
    """`docs/mkdocs_hook.py` as a module."""
    for library in ("mkdocs", "latex2mathml"):
        pytest.importorskip(library, reason="needs the extra: pip install 'diffrl[docs]'")
    spec = importlib.util.spec_from_file_location("mkdocs_hook", ROOT / "docs" / "mkdocs_hook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Page:
    """A page of the site, by the path of its file in `docs/`."""

    def __init__(self, path: str) -> None:
        self.file = types.SimpleNamespace(src_uri=path)


def test_a_link_to_what_is_in_the_repository_alone_is_text(hook: Any) -> None:
    """And one to what is in the site leads there; none leads nowhere."""
    text = (
        "files in [s/](stability), code in [`a[0]`](../../diffrl/cli.py), [here](gpu.md), [there](../../docs/data.md#x)"
    )
    made = hook.on_page_markdown(text, _Page("results/stability.md"))
    assert made == "files in s/, code in `a[0]`, [here](../results/gpu.md), [there](../data.md#x)"
    for page in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        place = "index.md" if page.name == "README.md" else page.name
        assert "](#)" not in hook.on_page_markdown(page.read_text(), _Page(f"results/{place}"))


def test_what_is_printed_in_sentences_is_wrapped_and_tables_are_not(hook: Any) -> None:
    page = _Page("index.md")
    table, sentence = "```text\na  1\nb  2\n```\n", f"```text\n{'word ' * 30}\n```\n"
    assert hook.on_page_markdown(table, page) == table
    assert hook.on_page_markdown(sentence, page) == sentence.replace("```text", "```{.text .sentences}", 1)


def test_tables_of_sentences_stack_and_options_are_whole(hook: Any) -> None:
    """Each cell has its column's name then; a table of figures stays as it is."""

    def table(*cells: str) -> str:
        row = "".join(f"<td>{cell}</td>" for cell in cells)
        head = "<thead>\n<tr>\n<th>a</th>\n<th>b &amp; c</th>\n</tr>\n</thead>"
        return f"<table>\n{head}\n<tbody><tr>{row}</tr></tbody></table>"

    assert hook.on_page_content(table("1", "2")) == table("1", "2")
    made = hook.on_page_content(table("<code>--agent.q-weight 2</code>", "word " * 20))
    assert '<td data-of="a"><code><span class="whole">--agent.q-weight</span> 2</code>' in made
    assert '<td data-of="b &amp; c">word' in made
    assert "<td>1.0&nbsp;±&nbsp;0.2</td>" in hook.on_page_content(table("1.0 ± 0.2", "1"))
    assert "<code>tests/test_a-b.py::<wbr>test_c</code>" in hook.on_page_content(
        table("<code>tests/test_a-b.py::test_c</code>", "1")
    )


@pytest.mark.parametrize("page", pages(), ids=name)
def test_no_code_shows_a_backslash_that_a_table_wants(page: Path) -> None:
    """A bar of code in a table has one in the repository, where the site prints it."""
    assert not re.findall(r"^\|.*`[^`\n]*\\\|[^`\n]*`.*$", page.read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in pages() if p.is_relative_to(ROOT / "docs")], ids=name)
def test_a_long_page_has_a_table_of_contents(page: Path) -> None:
    text = page.read_text()
    assert len(text) < 6_000 or text.count("\n## ") >= 2


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_what_is_too_wide_has_a_shade_at_the_edge_behind_which_there_is_more(tmp_path: Path) -> None:
    """A table in the box that the theme makes of it, and an equation; none where all is seen."""
    style = (ROOT / "docs" / "style.css").read_text()
    theme = ":root { --md-default-bg-color: #fff; --md-default-fg-color--lighter: #0005; } body { margin: 0; }"
    size = "style='width: 300px; height: 100px'"

    def box(width: int) -> str:
        table = f"<table><tr><td style='min-width: {width}px'>1</td></tr></table>"
        inner = f"<div style='display: inline-block; min-width: 100%'>{table}</div>"
        return f"<div class='md-typeset'><div class='md-typeset__scrollwrap' {size}>{inner}</div></div>"

    equation = f"<div class='equation' {size}><div style='width: 900px'>x</div></div>"
    page = tmp_path / "page.html"
    page.write_text(f"<style>{theme}{style} .equation {{ margin: 0; }}</style>{box(900)}{box(100)}{equation}")
    with Browser(tmp_path, 400, 300) as browser:
        browser.open(page.as_uri())
        shaded = []
        for scrolled in (0, 300, 9999):
            browser.value(f"document.querySelectorAll('div').forEach(one => {{ one.scrollLeft = {scrolled} }}) || 1")
            browser.screenshot(tmp_path / "page.png")
            picture = np.asarray(Image.open(tmp_path / "page.png").convert("L")).astype(int)
            shaded.append([[bool(picture[y, x] < 240) for x in (1, 298)] for y in (80, 180, 280)])
    whole = [False, False]
    assert shaded == [[edge, whole, edge] for edge in ([False, True], [True, True], [True, False])]


def _refused(schema: Any, field: dataclasses.Field[Any]) -> bool:
    """Whether an agent takes no other value of a switch than its default."""
    if not isinstance(field.default, bool):
        return False
    try:
        schema(**{field.name: not field.default})
    except UserError:
        return True
    return False


@pytest.mark.parametrize("agent", AGENTS)
def test_a_table_of_settings_has_every_field_with_default_and_words(agent: str, hook: Any) -> None:
    rows = [line.strip("| ").split(" | ") for line in hook.settings_table(agent).splitlines()[2:]]
    fields = [field for field in dataclasses.fields(AGENTS[agent]) if not _refused(AGENTS[agent], field)]
    assert len(fields) == len(dataclasses.fields(AGENTS[agent])) - (agent == "diffuser")  # normalise_observations
    assert [row[0] for row in rows] == [f"`--agent.{field.name.replace('_', '-')}`" for field in fields]
    assert all(len(row) == 3 and row[1] and len(row[-1]) > 10 for row in rows)
    assert all("by default" in row[2] for row in rows if row[1] == "see text")
    discount = next(row for row in rows if "discount`" in row[0] and "denoising" not in row[0])
    assert discount[1:] == [str(AGENTS[agent]().discount), "Discount factor of returns."]


@pytest.mark.parametrize("page", [p for p in pages() if "$$" in p.read_text()], ids=name)
def test_every_equation_becomes_mathml(page: Path, hook: Any) -> None:
    """No command of TeX is left over that the converter does not know."""
    text = documents.without_code(page.read_text())
    equations = re.findall(r"\$\$(.+?)\$\$", text, re.DOTALL)
    for equation in [*equations, *re.findall(r"\$([^$\n]+)\$", re.sub(r"\$\$.+?\$\$", "", text, flags=re.DOTALL))]:
        found = hook.on_page_content(f'<div class="arithmatex">\\[{html.escape(equation)}\\]</div>')
        assert found.count("<math") == 1
        assert "\\" not in found, equation


@pytest.mark.parametrize("script", sorted((ROOT / "examples" / "tutorials").glob("*.py")), ids=lambda path: path.stem)
def test_a_tutorials_page_and_notebook_are_of_its_script(script: Path) -> None:
    """Cell by cell; what the cells print and draw is of the day when they were rendered."""
    if script.stem == "render":
        return
    cells = re.split(r"^# %%.*\n", script.read_text(), flags=re.MULTILINE)[1:]
    code = [cell.strip() for cell in cells if not all(line.startswith("#") or not line for line in cell.splitlines())]
    page = ROOT / "docs" / "tutorials" / f"{script.stem}.md"
    assert [block.text.strip() for block in blocks(page) if block.language == "python"] == code
    made = json.loads(script.with_suffix(".ipynb").read_text())
    assert ["".join(cell["source"]).strip() for cell in made["cells"] if cell["cell_type"] == "code"] == code
    assert all((page.parent / link).is_file() for link in documents.links(page) if link.endswith(".png"))


PYTHON = [block for page in taught() for block in blocks(page) if block.language == "python"]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.where)
def test_every_python_block_compiles_and_imports_what_is_there(block: documents.Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in OURS:
            module = importlib.import_module(node.module)
            for alias in node.names:
                there = hasattr(module, alias.name) or (Path(inspect.getfile(module)).parent / alias.name).is_dir()
                assert there or importlib.util.find_spec(f"{node.module}.{alias.name}"), alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in OURS:
                    importlib.import_module(alias.name)


@pytest.mark.parametrize("page", taught(), ids=name)
def test_every_block_that_is_shell_or_python_says_or_looks_so(page: Path) -> None:
    """A block without a language that calls Python's keywords would be missed by the tests of this file."""
    for block in blocks(page):
        first = block.text.lstrip().split("\n")[0]
        assert block.language or not first.startswith(("import ", "from ")), f"{block.where} is Python: say so"


def test_the_page_on_distillation_and_its_help_name_the_teachers_that_there_are() -> None:
    """Those that the program takes, of them those that were trained at all times, and those whose critics are kept."""
    text = " ".join((ROOT / "docs/distil.md").read_text().split())
    listed = re.search(r"Teachers are the policies of (.*?), fine-tuned ones included", text)
    continuous = re.search(r"trained at all times \((.*?)\)", text)
    assert listed
    assert continuous
    assert re.findall(r"`(\w+)`", listed[1]) == list(FORWARD)
    chains = agents.names("chain")
    at_all_times = [name for name in FORWARD if name not in chains]
    assert re.findall(r"`(\w+)`", continuous[1]) == at_all_times
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        cli.main(["distil", "--help"])
    helped = " ".join(said.getvalue().replace("│", " ").split())
    for words in (r"needs a teacher trained at all times \((.*?)\)", r"continuous-time consistency \(of (.*?)\)"):
        in_help = re.search(words, helped)
        assert in_help, words
        assert in_help[1].split(", ") == at_all_times
    for to in ("consistency", "reflow"):
        kept = re.search(rf"{to}: of (.*?)[;)]", helped)
        assert kept
        assert kept[1].split(", ") == [name for name in FORWARD if keeps_critics(name, to)]
