"""`benchmarks/trees.py`: the packages of a commit are those of that commit, and nothing else lies beside them."""

import pytest
from trees import PACKAGES, ROOT, git, packages

from diffrl.support.errors import UserError

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout")


def test_the_packages_are_the_commits() -> None:
    with packages("HEAD") as tree:
        assert sorted(path.name for path in tree.iterdir()) == sorted(PACKAGES)
        found = sorted(path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file())
        assert found == sorted(git("ls-tree", "-r", "--name-only", "HEAD", *PACKAGES).splitlines())
        assert (tree / "diffrl" / "cli.py").read_text().strip() == git("show", "HEAD:diffrl/cli.py")
    assert not tree.exists()


def test_a_commit_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match="nowhere"), packages("nowhere"):
        pass
