"""`diffrl doctor` and the greeting: what they say is so, on this machine and on one that lacks things."""

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from diffrl.cli import main
from diffrl.commands import doctor
from diffrl.commands.greeting import greeting
from tests.support.plugin_cases import install


def by_part(findings: "list[doctor.Finding]") -> dict[str, doctor.Finding]:
    return {finding.part: finding for finding in findings}


def test_the_page_names_versions_folders_and_disk(
    own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["doctor", "--no-rendering"]) == 0
    said = capsys.readouterr().out
    assert f"torch {metadata.version('torch')}" in said
    assert f"{own_data}; {doctor.size(shutil.disk_usage(own_data).free).split('.')[0]}" in said
    assert f"{tmp_path / 'runs'}, not there yet" in said
    assert ("PyTorch" in said) == (not torch.cuda.is_available())
    assert len(said.splitlines()) < 40  # a page
    assert not list(tmp_path.iterdir())  # and nothing is made


def test_what_a_package_brings_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for each that cannot be used, with the reason that its use gives; those that can be share one."""
    monkeypatch.syspath_prepend(tmp_path)
    good = "def glow(images, prompts, metadata):\n    return images.mean((1, 2, 3))"
    modules = {"glow_good": good, "glow_gone": "import no_such_module", "glow_odd": "def x(:", "glow_exit": "exit(3)"}
    groups = {
        "diffrl.agents": {"glowa": "glow_odd:Glow", "bc": "glow_good:glow"},
        "diffrl.rewards": {"glow": "glow_good:glow", "glow-gone": "glow_gone:glow", "jpeg": "glow_good:glow"},
        "diffrl.datasets": {"glowd": "glow_good:NONE", "glowe": "glow_exit:F", "hopper": "glow_good:glow"},
    }
    install(tmp_path, "glowing", groups, **modules)
    usable, *broken = doctor.brought()
    assert (usable.state, usable.found) == ("works", "glow of glowing")
    ours = "the name is that of one of diffrl's own"
    for finding, name, why in zip(
        broken,
        ["bc", "glowa", "glow-gone", "jpeg", "glowd", "glowe", "hopper"],
        [
            f"'bc' of glowing (glow_good:glow) cannot be used: {ours}",
            "'glowa' of glowing (glow_odd:Glow) cannot be used: its import fails with SyntaxError",
            "'glow-gone' of glowing (glow_gone:glow) cannot be used: its import fails with ModuleNotFoundError",
            f"'jpeg' of glowing (glow_good:glow) cannot be used: {ours}",
            "'glowd' of glowing (glow_good:NONE) cannot be used: its import fails with AttributeError",
            "'glowe' of glowing (glow_exit:F) cannot be used: its import fails with SystemExit: 3",
            f"'hopper' of glowing (glow_good:glow) cannot be used: {ours}",
        ],
        strict=True,
    ):
        assert (finding.part, finding.state) == (f"plugin {name}", "missing")
        assert why in finding.found


def test_an_extra_that_is_missing_says_how_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    requires = [
        "torch>=2",
        'diffusers>=0.36; extra == "images"',
        'no-such-package>=1; extra == "magic"',
        'x; extra == "dev"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    assert doctor.wanted() == {"images": ["diffusers"], "magic": ["no-such-package"]}
    magic = by_part(list(doctor.extras()))["magic"]
    assert (magic.state, magic.advice) == ("missing", "pip install 'diffrl[magic]'")
    assert "no-such-package" in magic.found


def test_a_checkout_that_is_not_installed_is_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.requires
    monkeypatch.setattr(metadata, "requires", lambda name: real(f"{name}-not-installed"))
    (only,) = doctor.extras()
    assert (only.part, only.state) == ("extras", "missing")
    assert only.found.startswith("not known: diffrl runs from ")


def test_every_extra_of_ours_is_looked_at() -> None:
    assert {"images", "minari", "robotics", "sb3"} <= set(doctor.wanted())


def test_without_a_compiler_it_is_said_and_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert doctor.compiler().state == "missing"
    assert "g++" in doctor.compiler().advice
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    assert doctor.compiler().state == "works"


def test_a_full_disk_and_a_place_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    for free, state in ((doctor.TIGHT, "works"), (doctor.TIGHT - 1, "missing")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        assert doctor.place("data", tmp_path / "new" / "folder", "$X").state == state
    (tmp_path / "file").touch()
    refused = doctor.place("data", tmp_path / "file" / "new", "$X")
    assert (refused.state, refused.advice) == ("missing", "Choose another by $X.")
    assert refused.found == f"{tmp_path / 'file' / 'new'} cannot be made: not a directory"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc, in which nothing can be made")
def test_what_is_recommended_works_where_the_usual_folders_cannot_be_made(
    own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs, data, models and compiled code each have a variable or an option of their own."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("DIFFRL_DATA", "DIFFRL_CACHE", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, "/proc/x")
    monkeypatch.chdir("/proc")
    assert main(["doctor", "--no-rendering"]) == 0
    said = capsys.readouterr().out
    for part, place in (("D4RL's data", "x"), ("models kept", "x"), ("runs", "runs")):
        line = next(line for line in said.splitlines() if part in line and line.startswith("--"))
        assert line.rstrip().endswith(f"/proc/{place} cannot be made: no such file or directory")
    assert "MiB free. Little room" not in said
    if "no C++ compiler" not in said:
        assert "a C++ compiler, but /proc/x cannot be made" in said
        assert "Choose another folder for what is compiled by $TORCHINDUCTOR_CACHE_DIR." in said
    command, there = said.splitlines()[-1].strip(), tmp_path / "diffrl"
    train = "diffrl train diffusion_ql/maze2d-umaze-v1-small"
    assert command == f"DIFFRL_DATA={there / 'data'} {train} --out {there / 'run1'}"
    (there / "run1").mkdir(parents=True)
    assert doctor.first_command().endswith("run2")
    monkeypatch.setenv("DIFFRL_DATA", str(own_data))
    monkeypatch.chdir(tmp_path)
    assert doctor.first_command() == train


def test_a_file_where_data_would_be_kept_does_not_end_the_page(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIFFRL_DATA", str(tmp_path / "file"))
    assert main(["doctor", "--no-rendering"]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'file'} cannot be made: not a directory" in said
    assert said.splitlines()[-1].strip().startswith("DIFFRL_DATA=")


@pytest.mark.slow
def test_on_a_full_disk_what_is_recommended_runs(tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "tests.doctor_on_a_full_disk", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'benchmarks'}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=280)
    if done.returncode == 3:
        pytest.skip("this kernel lets us mount no file system")
    assert done.returncode == 0, done.stderr
    for part in ("models kept", "runs"):
        line = next(line for line in done.stdout.splitlines() if line[3:].startswith(part))
        assert "cannot be made: no space left on device" in line
    assert "a C++ compiler, but" in done.stdout or "no C++ compiler" in done.stdout
    assert list((tmp_path / "diffrl" / "run1" / "checkpoints").iterdir())


def test_rendering_is_what_a_process_that_draws_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn by what `$MUJOCO_GL` names, if it names something; a process that fails draws nothing."""
    monkeypatch.setattr(doctor, "DRAW", "import os, sys; sys.exit(os.environ['MUJOCO_GL'] != 'osmesa')")
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert doctor.drawing().found.endswith("MUJOCO_GL=osmesa")
    monkeypatch.setenv("MUJOCO_GL", "egl")
    assert doctor.drawing().state == "missing"
    assert "MUJOCO_GL=egl" in doctor.drawing().found
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert doctor.drawing().state == "missing"


@pytest.mark.slow
def test_rendering_here_is_found_or_told() -> None:
    found = doctor.drawing()
    assert found.state == "works" or "libosmesa6" in found.advice


def test_without_a_word_diffrl_says_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0
    said = capsys.readouterr().out
    assert "diffrl train diffusion_ql/maze2d-umaze-v1-small" in said
    assert "diffrl doctor" in said
    assert "newest run" not in said
    assert max(map(len, said.splitlines())) <= 100


def test_the_newest_run_is_named_with_its_verbs(tmp_path: Path) -> None:
    for age, (name, kind) in enumerate({"b": "images", "a": "offline"}.items()):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"kind": kind}))
        os.utime(tmp_path / name / "run.json", (age, age))
    assert f"diffrl evaluate {tmp_path.as_posix()}/a" in greeting(tmp_path)
    os.utime(tmp_path / "b" / "run.json", (9, 9))
    assert f"diffrl compare {tmp_path.as_posix()}/b" in greeting(tmp_path)
    (tmp_path / "b" / "run.json").write_text("{")  # damaged: still the newest
    assert f"diffrl resume {tmp_path.as_posix()}/b" in greeting(tmp_path)
