"""The package runs where there is no POSIX: what only POSIX has is asked for, or stands beside what is done without."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "termios", "tty"}
NAMES = {
    "os": "chown fchmod fork forkpty getegid geteuid getgid getpgid getuid killpg mkfifo nice posix_spawn "
    "sched_getaffinity setpgid setpgrp setsid sysconf uname wait3 wait4 O_NOFOLLOW O_DIRECTORY O_CLOEXEC",
    "signal": "SIGALRM SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 alarm pthread_kill setitimer sigwait",
}
"""What `os` and `signal` lack on Windows."""


def posix_only(source: str) -> list[tuple[int, str]]:
    """The lines that use what only POSIX has, unguarded, and what.

    Guards: `if hasattr(...)`, a `try` with a handler, `with suppress(...)`.
    """
    tree = ast.parse(source)
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}

    def guarded(node: ast.AST) -> bool:
        while node in parents:
            node = parents[node]
            if isinstance(node, ast.Try) and node.handlers:
                return True
            if isinstance(node, ast.If | ast.IfExp) and "hasattr" in ast.dump(node.test):
                return True
            if isinstance(node, ast.With) and any("suppress" in ast.dump(item.context_expr) for item in node.items):
                return True
        return False

    found = []
    for node in ast.walk(tree):
        used = []
        if isinstance(node, ast.Import):
            used = [alias.name for alias in node.names if alias.name in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            used = [str(node.module)]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used = [f"{node.value.id}.{node.attr}"] if node.attr in NAMES.get(node.value.id, "").split() else []
        found += [(node.lineno, name) for name in used if not guarded(node)]
    return sorted(found)


@pytest.mark.long
@pytest.mark.parametrize("folder", ["diffrl", "agents", "envs"])
def test_nothing_is_posix_alone(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, name in posix_only(path.read_text())
    ]
    assert not found, "\n".join(found)


def test_the_search_finds_what_it_is_for() -> None:
    assert posix_only("import os, fcntl\nos.fork()\n") == [(1, "fcntl"), (2, "os.fork")]
    assert posix_only("try:\n    import fcntl\nexcept ImportError:\n    fcntl = None\n") == []
    assert posix_only("if hasattr(os, 'getuid'):\n    os.getuid()\n") == []
    assert posix_only("from resource import getrlimit\nx = signal.SIGKILL\n") == [
        (1, "resource"),
        (2, "signal.SIGKILL"),
    ]
