"""Reading through one door: no pipe, no bomb, and whatever a parser raises is the user's error."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffrl.support import machine
from diffrl.support.errors import UserError, listed, nearest
from diffrl.support.files import (
    atomic_path,
    by_umask,
    parse_json,
    read_json,
    read_text,
    read_yaml,
    reading,
    regular_file,
    to_yaml,
    typed,
)


@pytest.mark.parametrize(
    "error", [KeyError("x"), RecursionError(), EOFError(), NotImplementedError("x"), OSError(5, "bad"), MemoryError()]
)
def test_whatever_a_parser_raises_is_one_error_in_one_line(error: Exception) -> None:
    said = r"^FILE cannot be read.*\. Look again\.$"
    with pytest.raises(UserError, match=said) as caught, reading("FILE cannot be read", "Look again."):
        raise error
    assert "\n" not in str(caught.value)


def test_an_error_of_ours_and_a_stop_pass_through() -> None:
    for error in (UserError("ours"), KeyboardInterrupt("now")):
        with pytest.raises(type(error), match=str(error)), reading("FILE cannot be read"):
            raise error


def test_only_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, what in (
        (tmp_path / "pipe", "is a named pipe"),
        (Path("/dev/zero"), "is a device"),
        (tmp_path, "is a folder"),
        (tmp_path / "none", "does not exist"),
        (tmp_path / "none\0", "cannot be opened"),
    ):
        for call in (lambda path: regular_file(path, "a file"), read_json, read_yaml):
            with pytest.raises(UserError, match=what):
                call(path)


@pytest.mark.parametrize("text", [b"[" * 200_000, b"{", b"\xff\xfe", b"1" * 5000, b""])
def test_json_that_is_none_is_an_error(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(UserError, match=r"a\.json (is damaged, or no JSON|cannot be read)"):
        read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"^line 3: "):
        parse_json(text, "line 3: no JSON")


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    """As Notepad begins a file with: of words, JSON and a configuration alike."""
    path = tmp_path / "file.yaml"
    path.write_bytes('\ufeff{"a": 1}'.encode())
    assert read_text(path, "a text") == '{"a": 1}'
    assert read_json(path) == read_yaml(path) == {"a": 1}


def test_a_text_has_an_end(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x" * 11)
    assert read_text(tmp_path / "a", "a text", 11) == "x" * 11
    with pytest.raises(UserError, match="more than 10 bytes"):
        read_text(tmp_path / "a", "a text", 10)


def bomb() -> str:
    levels = ["&a0 [x, x]", *(f"&a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, 30))]
    return f"dataset: [{', '.join(levels)}]"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (bomb(), "line 1 has an anchor or an alias"),
        ("a: 1\nb: *c", "line 2 has an anchor or an alias"),
        ("a: 1\n&b c: 1", "line 2 has an anchor or an alias"),
        ("a: 1\n<<: {b: 1}", "has a merge, <<"),
        ("a: " + "[" * 60 + "]" * 60, "more than 50 levels"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: !!bool x", "KeyError"),
        ("a: !!int ''", "IndexError"),
        ("a: !!timestamp x", "AttributeError"),
        ("\0", "unacceptable character"),
        ("a: x\n" * 2**16, "more than 262,144 bytes"),
        ("[a]: 1", "unhashable"),
    ],
)
def test_yaml_that_is_no_configuration_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        read_yaml(tmp_path / "a.yaml")
    assert said in str(caught.value)
    assert str(tmp_path / "a.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_written_twice_has_no_alias_and_is_read(tmp_path: Path) -> None:
    twice = [1, 2]
    values = {"b": twice, "a": {"c": twice, "d": None}}
    (tmp_path / "a.yaml").write_text(to_yaml(values))
    assert read_yaml(tmp_path / "a.yaml") == values
    assert list(read_yaml(tmp_path / "a.yaml")) == ["b", "a"]


def test_messages_have_an_end() -> None:
    assert len(str(UserError("x" * 10**6))) < 5000
    assert listed(["b", "a"]) == "a, b"
    assert listed([f"{i:03}" for i in range(200)]) == (
        "000, 001, 002, 003, 004, 005, 006, 007, 008, 009, ... (200 in all)"
    )
    assert len(listed(["x" * 10**6])) < 100
    assert len(nearest("y" * 10**6, [f"{'x' * 10**4}{i}" for i in range(3000)])) < 200


def test_the_memory_that_is_free_keeps_within_the_process_s_limit() -> None:
    code = (
        "import resource; from diffrl.support.machine import free_memory; resource.setrlimit(resource.RLIMIT_AS, "
        "(2**30, 2**30)); print(free_memory())"
    )
    told = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert 0 < told < 2**30
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < machine.free_memory() < total


def test_a_file_system_without_modes_keeps_no_model_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written with a narrow mode gets that of a new file; where that is refused it stays as it is."""
    file = tmp_path / "model.safetensors"
    file.touch(0o600)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "chmod", lambda *_: (_ for _ in ()).throw(PermissionError(1, "no modes")))
        by_umask(tmp_path)
    assert file.stat().st_mode & 0o777 == 0o600
    by_umask(tmp_path)
    (tmp_path / "new").touch()
    assert file.stat().st_mode == (tmp_path / "new").stat().st_mode != 0o600


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="/proc says which file is waited for")
@pytest.mark.parametrize("names", [["a.txt"], ["a/b.txt", "a/c/d.txt"]], ids=["file", "folder"])
def test_what_is_renamed_is_on_the_disk(names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file of it before the renaming, and the name of it afterwards."""
    order: list[str] = []
    renamed = Path.replace

    def fsync(fd: int) -> None:
        order.append(Path(f"/proc/self/fd/{fd}").resolve().name)

    def replace(path: Path, target: Path) -> Path:
        order.append("renamed")
        return renamed(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    whole = names[0].partition("/")[0]
    with atomic_path(tmp_path / whole) as temporary:
        for name in names:
            file = temporary.parent / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("x")
    assert order == [*(Path(name).name for name in names), "renamed", tmp_path.name]


@pytest.mark.parametrize("name", ["runs/a", "runs/ü ñ#%20 ", "-dash", "it's", "a[b]", "runs/$HOME;ls"])
def test_a_path_in_a_command_is_read_back_by_a_shell(name: str) -> None:
    """As that path, and never as an option."""
    out = subprocess.run(["sh", "-c", f"printf '%s|' {typed(Path(name))}"], capture_output=True, text=True, check=True)
    (word,) = out.stdout.split("|")[:-1]
    assert Path(word) == Path(name)
    assert not word.startswith("-")
