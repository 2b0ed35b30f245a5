"""Another package named `agents`, `envs` or `configs` is noticed when diffrl is imported, and by the command line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import diffrl
from diffrl.support.shadowing import PACKAGES

ROOT = Path(diffrl.__file__).parents[1]
IMPORT = ("-c", "import diffrl")


def python(*words: str, path: list[Path], folder: Path = Path("/")) -> subprocess.CompletedProcess[str]:
    """Python with these folders first on its path, as if started in `folder`."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A folder with a distribution that has a package `agents`, as `pip install --target` makes it."""
    folder = tmp_path / "other"
    (folder / "agents").mkdir(parents=True)
    (folder / "agents" / "__init__.py").write_text("class Agent: ...\n")
    about = folder / "open_ai_agents-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: open-ai-agents\nVersion: 1.0\n")
    (about / "RECORD").write_text("agents/__init__.py,,\n")
    return folder


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder that diffrl is installed into, by itself."""
    folder = tmp_path / "site"
    for name in ("diffrl", *PACKAGES):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_a_package_found_first_is_named_with_its_distribution_and_ours(other: Path) -> None:
    result = python(*IMPORT, path=[other, ROOT])
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1
    assert "ShadowedError" in last
    for words in (str(ROOT / "agents"), str(other / "agents"), "open-ai-agents", "fresh virtual environment"):
        assert words in last
    caught = python("-c", "try: import diffrl\nexcept ImportError: print('caught')", path=[other, ROOT])
    assert caught.stdout == "caught\n"


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_in_the_current_folder_ends_the_command_line_in_one_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    result = python("-m", "diffrl", "--version", path=[ROOT], folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith(f"diffrl: diffrl needs its own package `{name}`, {ROOT / name},")
    assert str(tmp_path / name) in result.stderr
    assert "run from another folder" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_one_imported_before_is_noticed_too(other: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(other)!r}); import agents; sys.path.pop(0); import diffrl"
    assert str(other / "agents") in python("-c", code, path=[ROOT]).stderr.splitlines()[-1]
    by_hand = "import sys, types; sys.modules['envs'] = types.ModuleType('envs'); import diffrl"
    assert "a module made by hand" in python("-c", by_hand, path=[ROOT]).stderr.splitlines()[-1]


def test_a_folder_that_is_no_package_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "configs").mkdir()
    assert python("-c", "import diffrl, agents; agents.FQL()", path=[tmp_path, ROOT]).returncode == 0


def test_one_installed_into_the_same_folder_is_noticed(other: Path, site: Path) -> None:
    """There its `__init__.py` overwrites ours, and takes it along when it is removed; our other files stay."""
    assert python(*IMPORT, path=[site]).returncode == 0
    shutil.copytree(other, site, dirs_exist_ok=True)
    beginning = site / "agents" / "__init__.py"
    for damage in ("is another package's", "is missing"):
        result = python(*IMPORT, path=[site])
        assert result.returncode == 1
        assert f"{beginning} {damage}" in result.stderr.splitlines()[-1]
        assert "(open-ai-agents)" in result.stderr.splitlines()[-1]
        beginning.unlink(missing_ok=True)
