"""`benchmarks/trees.py`: the packages of a commit are those of that commit, and nothing else lies beside them."""

import pytest
from trees import PACKAGES, ROOT, git, machine, packages, processor

from diffrl.support.errors import UserError

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")


def test_the_packages_are_the_commits() -> None:
    with packages("HEAD") as tree:
        assert sorted(path.name for path in tree.iterdir()) == sorted(PACKAGES)
        found = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file())
        assert found == sorted(git("ls-tree", "-r", "--name-only", "HEAD", *PACKAGES).splitlines())
        assert (tree / "diffrl" / "cli.py").read_text().strip() == git("show", "HEAD:diffrl/cli.py")
    assert not tree.exists()


def test_a_processor_is_called_by_its_name_on_every_page() -> None:
    assert processor({"cpu": "model name AMD EPYC, cpu family 25, model 17, stepping 1"}) == "AMD EPYC"
    assert processor({"cpu": "x86_64"}) == "x86_64"
    assert processor(machine()) in machine()["cpu"]
    for page in (ROOT / "benchmarks" / "results").glob("*.md"):
        assert "model name " not in page.read_text(), page


def test_a_commit_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match="nowhere"), packages("nowhere"):
        pass
