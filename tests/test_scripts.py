"""Scripts beside the package import from it only what is there; no other test runs all of them."""

import ast
import importlib
from pathlib import Path

import pytest

import diffrl

ROOT = Path(diffrl.__file__).parents[1]
SCRIPTS = sorted(file for folder in ("benchmarks", "examples") for file in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_what_a_script_imports_from_us_is_there(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in ("diffrl", "agents", "envs"):
                    importlib.import_module(alias.name)
        if (
            isinstance(node, ast.ImportFrom)
            and node.module
            and node.module.split(".")[0] in ("diffrl", "agents", "envs")
        ):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
