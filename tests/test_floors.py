"""The house and its floors: what may import what. `python tests/test_floors.py` prints the floors as measured.

An arrow is an import of a module of ours by another, wherever it stands: at the top, in a function, or for type
checking alone. A string that is the name of a module of ours (`python -m diffrl.worker` in a new process) is one too.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "diffrl/support": 0,
    "diffrl/diffusion": 1,
    "diffrl/nets": 1,
    "diffrl/data": 2,
    "diffrl/alignment": 2,
    "agents": 3,
    "envs": 3,
    "diffrl/training": 4,
    "diffrl/tuning": 5,
    "diffrl/augment": 5,
    "diffrl/images": 5,
    "diffrl/runs": 6,
    "diffrl/commands": 7,
    "diffrl": 8,
}
"""An import stays in its folder or goes to a lower floor. `diffrl` itself holds three files."""
ROOT_FILES = {"diffrl.__init__", "diffrl.__main__", "diffrl.cli"}
ONLY = {"diffrl/diffusion": "diffrl.support.errors", "diffrl/nets": "diffrl.support.errors"}
"""Folders that import this one module of ours, and no other outside themselves."""
LIMIT, LONGER = 500, {"diffrl/runs/diagnose.py": 526}
"""Lines of a file at most; those that were longer when the limit was set may not grow."""
NO_ALGORITHM = ("diffrl.runs.run", ("diffrl/tuning", "diffrl/augment", "diffrl/images"))
"""A run's folder is read and written without knowing what is trained in it."""
DYNAMIC = ("import_module", "__import__", "find_spec", "resolve_name", "run_module")
NAME = re.compile(r"\w+(\.\w+)+(:\w+)?")
"""A string that may name a module: PACKAGE.MODULE, or PACKAGE.MODULE:CLASS."""


@dataclass(frozen=True)
class Arrow:
    """One module of ours that imports another. kind: import, function, typing, or text (named by a string)."""

    source: str
    target: str
    where: str
    """FILE:LINE"""
    kind: str


@dataclass(frozen=True)
class House:
    """The modules of ours below a folder, by name (of a package: NAME.__init__), and all arrows between them."""

    root: Path
    files: Mapping[str, Path]
    arrows: tuple[Arrow, ...]
    hidden: tuple[str, ...]
    """Imports whose target only the running program knows, a sentence each."""

    def where(self, name: str) -> str:
        """The path of a module below the root."""
        return self.files[name].relative_to(self.root).as_posix()


# --- Reading --------------------------------------------------------------------------------------------------------


def read(root: Path) -> House:
    """Parse the files of `diffrl`, `agents` and `envs` below `root`."""
    files = {}
    for top in ("diffrl", "agents", "envs"):
        for path in sorted((root / top).rglob("*.py")):
            files[".".join(path.relative_to(root).with_suffix("").parts)] = path
    arrows, hidden = [], []
    for name, path in files.items():
        tree = ast.parse(path.read_text())
        where = path.relative_to(root).as_posix()
        for target, line, kind in _imports(tree, name, files):
            if target != name:
                arrows.append(Arrow(name, target, f"{where}:{line}", kind))
        hidden += [f"{where}:{line}: {text}" for line, text in _hidden(tree, files)]
    return House(root, files, tuple(arrows), tuple(hidden))


def _imports(tree: ast.Module, name: str, files: Mapping[str, Path]) -> Iterator[tuple[str, int, str]]:
    """Target, line and kind of each import of ours in a module."""
    package = name.split(".")[:-1]
    for node, kind in _walk(tree, "import"):
        asked: list[str] = []
        if isinstance(node, ast.Import):
            asked = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                asked.append(f"{base}.{alias.name}" if _module(f"{base}.{alias.name}", files) else base)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
            asked, kind = [node.value.partition(":")[0]], "text"
        for word in dict.fromkeys(asked):
            target = _module(word, files)
            if target:
                yield target, node.lineno, kind


def _module(word: str, files: Mapping[str, Path]) -> str:
    """The name in `files` of the module that `word` means; "" of what is not ours."""
    return word if word in files else f"{word}.__init__" if f"{word}.__init__" in files else ""


def _walk(node: ast.AST, kind: str) -> Iterator[tuple[ast.AST, str]]:
    """All nodes below, with the kind that an import there has."""
    for name, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                inner = kind
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                    inner = "function" if kind == "import" else kind
                elif isinstance(node, ast.If) and name == "body" and "TYPE_CHECKING" in ast.unparse(node.test):
                    inner = "typing"
                yield child, inner
                yield from _walk(child, inner)


def _hidden(tree: ast.Module, files: Mapping[str, Path]) -> Iterator[tuple[int, str]]:
    """Line and sentence of each dynamic import that reaches, or may reach, one of ours.

    One whose argument is computed may where its file names modules of ours in strings. Not hidden: what the loader of
    plug-ins imports, which asks for `entry_points`, and the `entry_point=` of an environment that gymnasium registers.
    """
    ours = {name.split(".")[0] for name in files}
    called, plugins = set(DYNAMIC), False
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            called |= {alias.asname for alias in node.names if alias.name in DYNAMIC and alias.asname}
            plugins |= any(alias.name == "entry_points" for alias in node.names)
    registered = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == "entry_point"}
    named = [word for word, _, kind in _imports(tree, "", files) if kind == "text"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
            module, colon, _ = node.value.partition(":")
            if colon and _module(module, files) and not plugins and id(node) not in registered:
                yield node.lineno, f"{node.value!r} is an import in a string: write an import statement"
        if not isinstance(node, ast.Call) or not (node.args or node.keywords):
            continue
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if function not in called:
            continue
        argument = node.args[0] if node.args else node.keywords[0].value
        text = [c.value for c in ast.walk(argument) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
        call = f"{function}({ast.unparse(argument)})"
        if any(re.split("[.:]", word)[0] in {"", *ours} for word in text):
            yield node.lineno, f"{call} imports one of ours: write an import statement"
        elif not isinstance(argument, ast.Constant) and named and not plugins:
            yield node.lineno, f"{call} may import {named[0]}, which the file names: write import statements"


def folder(name: str) -> str:
    """The folder that a module lives in for its floor: agents, envs, diffrl, or one right below diffrl."""
    first, second, *rest = name.split(".")
    return f"{first}/{second}" if first == "diffrl" and rest else first


# --- The laws -------------------------------------------------------------------------------------------------------


def arrows_up(house: House) -> list[str]:
    """Imports that do not go to a lower floor, those between folders of one floor among them; folders without one."""
    failures = [f"{house.where(n)}: {folder(n)} has no floor" for n in house.files if folder(n) not in FLOORS]
    for arrow in house.arrows:
        a, b = folder(arrow.source), folder(arrow.target)
        if a != b and a in FLOORS and b in FLOORS and FLOORS[a] <= FLOORS[b]:
            step = f"{a} ({FLOORS[a]}) -> {b} ({FLOORS[b]})"
            failures.append(f"{arrow.where}: {step} does not go down: {arrow.target}")
    return failures


def circles(house: House) -> list[str]:
    """Circles between folders, of all arrows, and between modules, of those followed when a module is imported."""
    folders = [(folder(a.source), folder(a.target), a.where) for a in house.arrows]
    modules = [(a.source, target, a.where) for a in house.arrows if a.kind == "import" for target in _run_by(a, house)]
    failures = []
    for edges in (folders, modules):
        graph = nx.DiGraph()
        for source, target, where in edges:
            if source != target and not graph.has_edge(source, target):
                graph.add_edge(source, target, where=where)
        for component in nx.strongly_connected_components(graph):
            if len(component) > 1:
                circle = nx.find_cycle(graph.subgraph(component))
                failures.append(
                    "; ".join(f"{graph.edges[a, b]['where']}: {a} -> {b}" for a, b in circle) + ": a circle"
                )
    return failures


def _run_by(arrow: Arrow, house: House) -> list[str]:
    """What the import runs: its target, and the packages around that which are not around the importing module."""
    parts = arrow.target.split(".")
    around = [".".join([*parts[:i], "__init__"]) for i in range(1, len(parts))]
    new = [name for name in around if not arrow.source.startswith(name.removesuffix("__init__"))]
    return [name for name in dict.fromkeys([*new, arrow.target]) if name in house.files]


def outsiders(house: House) -> list[str]:
    """What the core imports of ours besides errors, and what the run's folder imports of the algorithms."""
    failures = []
    for arrow in house.arrows:
        a, b = folder(arrow.source), folder(arrow.target)
        if a in ONLY and b != a and arrow.target != ONLY[a]:
            failures.append(f"{arrow.where}: {a} -> {arrow.target}: of ours it may import {ONLY[a]} alone")
        if arrow.source == NO_ALGORITHM[0] and b in NO_ALGORITHM[1]:
            failures.append(f"{arrow.where}: {arrow.source} -> {arrow.target}: a run's folder knows no algorithm")
    return failures


def loose_files(house: House) -> list[str]:
    """Files beside the folders."""
    loose = [name for name in house.files if folder(name) == "diffrl" and name not in ROOT_FILES]
    return [f"{house.where(name)}: belongs in a folder" for name in loose]


def long_files(house: House) -> list[str]:
    """Files that are too long."""
    failures = []
    for name, path in house.files.items():
        lines, limit = len(path.read_text().splitlines()), LONGER.get(house.where(name), LIMIT)
        if lines > limit:
            failures.append(f"{house.where(name)}: {lines} lines, more than {limit}")
    return failures


def configurations(house: House) -> list[str]:
    """The modules of configurations: config.py, and those in a folder config/."""
    return [name for name in house.files if "config" in name.split(".")]


def with_torch(house: House) -> list[str]:
    """Configurations whose import brings torch, through whatever else is imported."""
    code = "import importlib, sys\nfor n in sys.argv[1:]: importlib.import_module(n)\nprint('torch' in sys.modules)"

    def brings(names: list[str]) -> bool:
        command = [sys.executable, "-c", code, *(name.removesuffix(".__init__") for name in names)]
        environment = {**os.environ, "PYTHONPATH": str(house.root)}
        process = subprocess.run(command, cwd=house.root, env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        return process.stdout.strip() == "True"

    names = configurations(house)
    return [f"{house.where(n)}: its import brings torch" for n in names if brings([n])] if brings(names) else []


# --- The tree as it is ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours() -> House:
    return read(ROOT)


def none(failures: Sequence[str]) -> None:
    """Fail with these, a line each."""
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)


def test_imports_go_to_lower_floors(ours: House) -> None:
    none(arrows_up(ours))


def test_there_is_no_circle(ours: House) -> None:
    none(circles(ours))


def test_the_core_imports_nothing_of_ours_and_a_runs_folder_no_algorithm(ours: House) -> None:
    none(outsiders(ours))


def test_no_import_is_hidden(ours: House) -> None:
    none(ours.hidden)


def test_three_files_lie_beside_the_folders(ours: House) -> None:
    none(loose_files(ours))


def test_no_file_is_too_long(ours: House) -> None:
    none(long_files(ours))


def test_configurations_import_no_torch(ours: House) -> None:
    assert configurations(ours)
    none(with_torch(ours))


# --- The laws themselves, on small trees ----------------------------------------------------------------------------


def built(root: Path, files: Mapping[str, str]) -> House:
    """A tree of files, by path without .py, its folders packages."""
    for name, text in files.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        for package in list(path.parents)[: name.count("/")]:
            (package / "__init__.py").touch()
        path.write_text(text)
    return read(root)


def test_a_tree_that_keeps_the_laws(tmp_path: Path) -> None:
    files = {
        "diffrl/support/errors": "",
        "diffrl/nets/mlp": "from diffrl.support.errors import UserError\nfrom . import optim",
        "diffrl/nets/optim": "from ..support import errors",
        "agents/bc": "import diffrl.nets.mlp\ndef f():\n    from agents import base",
        "agents/base": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from agents.bc import BC",
    }
    house = built(tmp_path, files)
    assert {(a.source, a.target, a.where.split(":")[1], a.kind) for a in house.arrows} == {
        ("diffrl.nets.mlp", "diffrl.support.errors", "1", "import"),
        ("diffrl.nets.mlp", "diffrl.nets.optim", "2", "import"),
        ("diffrl.nets.optim", "diffrl.support.errors", "1", "import"),
        ("agents.bc", "diffrl.nets.mlp", "1", "import"),
        ("agents.bc", "agents.base", "3", "function"),
        ("agents.base", "agents.bc", "3", "typing"),
    }
    for law in (arrows_up, circles, outsiders, loose_files):
        assert law(house) == []
    assert house.hidden == ()
    assert floors(house, folder) == {"diffrl": 0, "diffrl/support": 0, "diffrl/nets": 1, "agents": 2}


UP = {
    "at the top": "from diffrl.runs.run import Run",
    "of a module": "from diffrl.runs import run",
    "of a name in a package": "from diffrl.runs import something",
    "relative": "from ..runs.run import Run",
    "relative, of a module": "from ..runs import run",
    "in a function": "def f():\n    import diffrl.runs.run",
    "in a method": "class A:\n    def f(self):\n        from diffrl.runs import run",
    "for types": "import typing\nif typing.TYPE_CHECKING:\n    from diffrl.runs.run import Run",
    "by name, for a process": "COMMAND = ['python', '-m', 'diffrl.runs.run']",
}


@pytest.mark.parametrize("text", UP.values(), ids=UP)
def test_an_arrow_up_fails(text: str, tmp_path: Path) -> None:
    (failure,) = arrows_up(built(tmp_path, {"diffrl/training/loop": text, "diffrl/runs/run": ""}))
    line = len(text.splitlines())
    assert failure.startswith(f"diffrl/training/loop.py:{line}: diffrl/training (4) -> diffrl/runs (6)")


SIBLINGS = [
    ("diffrl/tuning/ppo", "diffrl/images/run"),
    ("diffrl/images/run", "diffrl/augment/job"),
    ("diffrl/augment/job", "diffrl/tuning/ppo"),
    ("diffrl/diffusion/loss", "diffrl/nets/mlp"),
    ("diffrl/data/replay", "diffrl/alignment/gae"),
    ("agents/bc", "envs/maze2d"),
]


@pytest.mark.parametrize(("one", "other"), SIBLINGS)
def test_an_arrow_between_siblings_fails(one: str, other: str, tmp_path: Path) -> None:
    text = f"def f():\n    import {other.replace('/', '.')}"
    (failure,) = arrows_up(built(tmp_path, {one: text, other: ""}))
    assert failure.startswith(f"{one}.py:2: ")


def test_a_folder_without_a_floor_fails(tmp_path: Path) -> None:
    failures = arrows_up(built(tmp_path, {"diffrl/misc/bag": ""}))
    assert failures == [f"diffrl/misc/{name}.py: diffrl/misc has no floor" for name in ("__init__", "bag")]


def test_a_circle_of_folders_fails_wherever_its_imports_stand(tmp_path: Path) -> None:
    files = {
        "agents/bc": "import diffrl.data.replay",
        "diffrl/data/replay": "def f():\n    import envs.maze2d",
        "envs/maze2d": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import agents.bc",
    }
    (failure,) = circles(built(tmp_path, files))
    assert "agents/bc.py:1: agents -> diffrl/data" in failure
    assert "diffrl/data/replay.py:2: diffrl/data -> envs" in failure
    assert "envs/maze2d.py:3: envs -> agents" in failure


def test_a_circle_of_modules_fails_if_it_is_one_when_they_are_imported(tmp_path: Path) -> None:
    files = {"agents/a": "import agents.b", "agents/b": "from agents import c", "agents/c": "import agents.a"}
    (failure,) = circles(built(tmp_path, files))
    assert "agents/b.py:1: agents.b -> agents.c" in failure
    assert circles(built(tmp_path, files | {"agents/c": "def f():\n    import agents.a"})) == []


def test_a_circle_through_a_package_fails(tmp_path: Path) -> None:
    """To import envs.b is to run envs/__init__ first; within envs that has begun already."""
    files = {"envs/__init__": "import agents.a", "envs/b": "from envs import c", "envs/c": "", "agents/a": ""}
    assert circles(built(tmp_path, files)) == []
    failures = circles(built(tmp_path, files | {"agents/a": "import envs.b"}))
    assert any("agents/a.py:1: agents.a -> envs.__init__" in failure for failure in failures)


HIDDEN = {
    "plain": "import importlib\nimportlib.import_module('agents.bc')",
    "imported": "from importlib import import_module\nimport_module('agents.bc')",
    "renamed": "from importlib import import_module as load\nload('agents.bc')",
    "keyword": "from importlib import import_module\nimport_module(name='agents.bc')",
    "relative": "from importlib import import_module\nimport_module('.bc', 'agents')",
    "built": "from importlib import import_module\ndef f(n):\n    import_module(f'agents.{n}')",
    "added": "from importlib import import_module\ndef f(n):\n    import_module('agents.' + n)",
    "old": "__import__('agents.bc')",
    "looked up": "from importlib.util import find_spec\nfind_spec('agents')",
    "of a table": "from importlib import import_module\nT = ['agents.bc']\ndef f(i):\n    import_module(T[i])",
    "for elsewhere": "HOME = 'agents.bc:BC'",
}


@pytest.mark.parametrize("text", HIDDEN.values(), ids=HIDDEN)
def test_a_hidden_import_fails(text: str, tmp_path: Path) -> None:
    (failure,) = built(tmp_path, {"diffrl/runs/build": text, "agents/bc": ""}).hidden
    assert failure.startswith(f"diffrl/runs/build.py:{len(text.splitlines())}: ")


OPEN = {
    "others'": "import importlib\nimportlib.import_module('diffusers')",
    "others', computed": "from importlib import import_module\ndef f(n):\n    import_module(n)",
    "the loader": "from importlib.metadata import entry_points as e\n[p.load() for p in e(group='diffrl.agents')]",
    "gymnasium's": "import gymnasium\ngymnasium.register('bc', entry_point='agents.bc:BC')",
    "prose": '"""See agents.bc: it is one."""\nfrom importlib import import_module\ndef f(n):\n    import_module(n)',
}


@pytest.mark.parametrize("text", OPEN.values(), ids=OPEN)
def test_an_import_of_others_is_not_hidden(text: str, tmp_path: Path) -> None:
    assert built(tmp_path, {"diffrl/runs/build": text, "agents/bc": ""}).hidden == ()


def test_the_core_may_import_errors_alone(tmp_path: Path) -> None:
    files = {"diffrl/support/errors": "", "diffrl/support/files": ""}
    text = "from diffrl.support.errors import UserError"
    assert outsiders(built(tmp_path, files | {"diffrl/diffusion/loss": text})) == []
    (failure,) = outsiders(built(tmp_path, files | {"diffrl/diffusion/loss": "from diffrl.support import files"}))
    assert failure.startswith("diffrl/diffusion/loss.py:1: diffrl/diffusion -> diffrl.support.files")


def test_a_runs_folder_knows_no_algorithm(tmp_path: Path) -> None:
    files = {"diffrl/runs/run": "def f():\n    import diffrl.tuning.ppo", "diffrl/tuning/ppo": ""}
    (failure,) = outsiders(built(tmp_path, files))
    assert failure.startswith("diffrl/runs/run.py:2: ")


def test_loose_and_long_files_fail(tmp_path: Path) -> None:
    files = {"diffrl/cli": "", "diffrl/loose": "", "diffrl/runs/a": "\n" * 500, "diffrl/runs/b": "\n" * 501}
    house = built(tmp_path, files)
    assert loose_files(house) == ["diffrl/loose.py: belongs in a folder"]
    assert long_files(house) == ["diffrl/runs/b.py: 501 lines, more than 500"]


def test_a_configuration_that_imports_torch_through_ours_fails(tmp_path: Path) -> None:
    """A module `torch` of the tree's own stands for torch."""
    (tmp_path / "torch.py").touch()
    files = {"agents/config": "import diffrl.nets.mlp", "diffrl/nets/mlp": "import torch", "envs/config/maze": ""}
    house = built(tmp_path, files)
    assert configurations(house) == ["agents.config", "envs.config.__init__", "envs.config.maze"]
    assert with_torch(house) == ["agents/config.py: its import brings torch"]


# --- The floors as measured -----------------------------------------------------------------------------------------


def floors(house: House, group: Callable[[str], str]) -> dict[str, int]:
    """The floor of each group of modules: the longest chain of imports below it; a circle of groups is one of them."""
    graph = nx.DiGraph()
    graph.add_nodes_from(group(name) for name in house.files)
    graph.add_edges_from((group(a.source), group(a.target)) for a in house.arrows if a.kind != "text")
    graph.remove_edges_from(list(nx.selfloop_edges(graph)))
    condensed = nx.condensation(graph)
    found: dict[int, int] = {}
    for node in reversed(list(nx.topological_sort(condensed))):
        found[node] = 1 + max((found[below] for below in condensed.successors(node)), default=-1)
    return {name: found[condensed.graph["mapping"][name]] for name in graph}


def folder_or_file(name: str) -> str:
    """The folder; of what lies beside the folders the file."""
    return f"{name.replace('.', '/')}.py" if folder(name) == "diffrl" else folder(name)


def print_floors(house: House) -> None:
    """A table from the highest floor to the lowest, and how many there are."""
    from rich.console import Console
    from rich.table import Table

    found, console = floors(house, folder_or_file), Console()
    table = Table("measured", "planned", "folder, or file beside the folders", title="Floors of imports")
    for name, floor in sorted(found.items(), key=lambda item: (-item[1], item[0])):
        planned = FLOORS["diffrl"] if name[:-3].replace("/", ".") in ROOT_FILES else FLOORS.get(name, "")
        table.add_row(str(floor), str(planned), name)
    console.print(table)
    files = replace(house, arrows=tuple(a for a in house.arrows if "__init__" not in a.source + a.target))
    folders = [floor for name, floor in found.items() if not name.endswith(".py")]
    console.print(
        f"{max(found.values()) + 1} floors between folders and the files beside them, the highest folder on floor "
        f"{max(folders)}; {max(floors(files, str).values()) + 1} between files, packages' __init__ left out."
    )


if __name__ == "__main__":
    print_floors(read(ROOT))
