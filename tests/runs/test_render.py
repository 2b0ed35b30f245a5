"""Videos: as many pictures as steps say, the same start for every seed, and a sentence where nothing can be drawn."""

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from diffrl.cli import main
from diffrl.runs import render as video
from diffrl.runs.render import BACKENDS, choose_opengl, labelled, needs_opengl, render, steps_a_second, works
from diffrl.support.errors import UserError
from diffrl.support.plots import ORANGE
from diffrl.support.stopping import Interrupted
from envs import registry
from envs.task import Task
from tests.runs.made_runs import MAZE, PENDULUM, SIZES, made_run, small

SHORT = dataclasses.replace(MAZE, max_episode_steps=20)
HOPPER = Task("Hopper-v4", {}, None, False, max_episode_steps=12)
CUBE = Task("ogbench/cube-single-v0", {"task": 2}, None, False, max_episode_steps=6)
POINT = Task("ogbench/pointmaze-medium-v0", {"task": 1}, None, False, max_episode_steps=20)
SIZES["ogbench/pointmaze-medium-v0"] = (2, 2)
SIZES["Hopper-v4"] = (11, 3)
SIZES["ogbench/cube-single-v0"] = (28, 5)


def pictures(path: Path) -> np.ndarray:
    """The frames (T, height, width, 3) of a video."""
    if path.suffix == ".gif":
        with Image.open(path) as image:
            found = []
            for i in range(image.n_frames):  # type: ignore[attr-defined]
                image.seek(i)
                found.append(np.asarray(image.convert("RGB")))
            return np.stack(found)
    import imageio_ffmpeg

    frames = imageio_ffmpeg.read_frames(str(path))
    width, height = next(frames)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in frames])


@pytest.fixture(scope="module")
def maze(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_run(tmp_path_factory.mktemp("render") / "run", small("bc"), SHORT)


def test_every_third_step_of_both_seeds_from_the_same_start(maze: Path, tmp_path: Path) -> None:
    """The maze has 100 steps a second: at 30 pictures every third one, and the last; two episodes one after the other.

    Below the line of text both halves are equal where an episode begins, and not where it ends.
    """
    out = render(maze, tmp_path / "video.gif", episodes=2, quiet=True)
    found = pictures(out)
    each = 1 + 20 // 3 + 1  # the start, steps 3 to 18, step 20
    assert len(found) == 2 * each
    left, right = np.split(found[:, 20:].astype(int), 2, axis=2)
    for start in (0, each):
        assert np.abs(left[start] - right[start]).max() == 0
        assert np.abs(left[start + each - 1] - right[start + each - 1]).max() > 100
    assert np.abs(left[0] - left[each]).max() > 100
    with Image.open(out) as image:
        assert image.info["duration"] == 30


class Drawn(gymnasium.Env[np.ndarray, np.ndarray]):
    """Six steps that draw a grey square, lighter every time."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (Gymnasium's own form)
    render_mode = "rgb_array"

    def __init__(self, render_mode: str | None = None, dt: float | None = None, fps: float | None = None) -> None:
        self.metadata = self.metadata | ({} if fps is None else {"render_fps": fps})
        if dt is not None:
            self.dt = dt

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self._step = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: np.ndarray) -> Any:
        self._step += 1
        return np.zeros(3, np.float32), 0.0, self._step == 6, False, {}

    def render(self) -> Any:
        return np.full((20, 20, 3), 30 * self._step, np.uint8)


@pytest.mark.parametrize(
    ("given", "fps", "pictures_of", "milliseconds"),
    [
        ({"dt": 0.1, "fps": 3}, None, [0, 1, 2, 3, 4, 5, 6], 100),  # real time: ten steps a second
        ({"dt": 0.01}, None, [0, 3, 6], 30),
        ({"dt": 0.01}, 50, [0, 2, 4, 6], 20),
        ({"dt": 0.1}, 20, [0, 1, 2, 3, 4, 5, 6], 50),  # as fast as the user says
        ({"fps": 3}, None, [0, 1, 2, 3, 4, 5, 6], 50),  # no simulator's time: not as slow as that
        ({"fps": 100}, None, [0, 3, 6], 30),
        ({}, None, [0, 1, 2, 3, 4, 5, 6], 30),
    ],
)
def test_time_is_the_environments_own(
    given: dict[str, Any], fps: int | None, pictures_of: list[int], milliseconds: int, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setitem(SIZES, "Drawn-v0", (3, 1))
    gymnasium.register("Drawn-v0", Drawn)
    try:
        task = Task("Drawn-v0", given, None, False, max_episode_steps=10)
        out = render(made_run(tmp_path / "run", small("bc"), task), tmp_path / "a.gif", seeds=(3,), fps=fps, quiet=True)
    finally:
        del gymnasium.registry["Drawn-v0"]
    levels = [round(picture[30, 10].mean() / 30) for picture in pictures(out)]
    assert levels == pictures_of
    with Image.open(out) as image:
        assert image.info["duration"] == milliseconds


def drawn_levels(
    tmp_path: Path, monkeypatch: Any, made: type[Drawn] = Drawn, given: dict[str, Any] | None = None, **options: Any
) -> tuple[list[int], int]:
    """The steps whose pictures a video of such an environment has, and the milliseconds of each."""
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setitem(SIZES, "Drawn-v0", (3, 1))
    gymnasium.register("Drawn-v0", made)
    try:
        task = Task("Drawn-v0", given or {}, None, False, max_episode_steps=10)
        run = made_run(tmp_path / "run", small("bc"), task)
        render(run, tmp_path / "a.gif", seeds=(3,), **{"quiet": True, **options})
    finally:
        del gymnasium.registry["Drawn-v0"]
        if (tmp_path / "a.gif").exists():
            found = [round(picture[30, 10].mean() / 30) for picture in pictures(tmp_path / "a.gif")]
            with Image.open(tmp_path / "a.gif") as image:
                milliseconds = int(image.info["duration"])
    return found, milliseconds


@pytest.mark.parametrize(
    ("options", "steps", "milliseconds"),
    [
        ({"every": 4}, [0, 4, 6], 400),  # time is the environment's
        ({"every": 2, "fps": 20}, [0, 2, 4, 6], 50),  # the user's
        ({"every": 1}, [0, 1, 2, 3, 4, 5, 6], 100),
        ({"max_episode_steps": 3}, [0, 1, 2, 3], 100),
    ],
)
def test_steps_are_left_out_and_episodes_shortened_as_is_asked(
    options: dict[str, Any], steps: list[int], milliseconds: int, tmp_path: Path, monkeypatch: Any
) -> None:
    assert drawn_levels(tmp_path, monkeypatch, given={"dt": 0.1}, **options) == (steps, milliseconds)


def test_of_slow_pictures_fewer_are_drawn_which_is_said(
    tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """As few as patience asks for, but some of each episode; the speed of time stays."""
    monkeypatch.setattr(video, "_PATIENCE", 1e-9)
    monkeypatch.setattr(video, "_FEWEST", 3)  # of ten steps
    assert drawn_levels(tmp_path, monkeypatch, given={"dt": 0.1}, quiet=False) == ([0, 3, 6], 300)
    said = " ".join(capsys.readouterr().err.split())
    assert "so one step of 3 is drawn; time is as fast as ever. --every 1 draws more of them" in said


class Impatient(Drawn):
    """Ctrl-C in its third step."""

    def step(self, action: np.ndarray) -> Any:
        if self._step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return super().step(action)


def test_a_stop_keeps_what_is_drawn(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(Interrupted, match=r"^Stopped\. 4 pictures are kept: .*a\.gif shows what was drawn so far\.$"):
        drawn_levels(tmp_path, monkeypatch, Impatient, episodes=2)
    assert [round(picture[30, 10].mean() / 30) for picture in pictures(tmp_path / "a.gif")] == [0, 1, 2, 3]


@pytest.mark.long
@pytest.mark.parametrize(
    ("benchmark", "needs", "per_second"),
    [
        ("maze2d-umaze-v1", "mujoco", 100.0),
        ("hopper-medium-v2", "mujoco", 125.0),
        ("antmaze-umaze-v0", "mujoco", 10.0),
        ("kitchen-mixed-v0", "gymnasium_robotics", 12.5),
        ("cube-single-play-singletask-v0", "ogbench", 20.0),  # where the time is a method
    ],
)
def test_the_simulators_time_is_known(benchmark: str, needs: str, per_second: float) -> None:
    pytest.importorskip(needs)
    found = registry.get(benchmark)
    env = Task(found.env_id, dict(found.env_kwargs), None, False).make()
    assert steps_a_second(env) == pytest.approx(per_second, rel=1e-12)
    env.close()


def test_ogbenchs_ball_is_drawn_from_above_with_its_way(tmp_path: Path, monkeypatch: Any) -> None:
    """Without OpenGL: its own pictures need it, and take most of a second. The way grows from picture to picture."""
    pytest.importorskip("ogbench")
    monkeypatch.setattr(video, "works", lambda backend: False)
    found = pictures(render(made_run(tmp_path / "run", small("bc"), POINT), tmp_path / "a.gif", seeds=(3,), quiet=True))
    assert len(found) == 21
    orange = (np.abs(found[:, 20:].astype(int) - [round(255 * part) for part in to_rgb(ORANGE)]).sum(-1) < 60).sum(
        (1, 2)
    )
    assert orange[0] == 0
    assert orange[-1] > 20


def test_an_mp4_has_the_same_pictures_as_a_gif(maze: Path, tmp_path: Path) -> None:
    """Up to what the coders lose: a few levels in the mean."""
    pytest.importorskip("imageio_ffmpeg")
    ours, theirs = (
        pictures(render(maze, tmp_path / f"video.{kind}", seeds=(5,), quiet=True)).astype(float)
        for kind in ("mp4", "gif")
    )
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).mean() < 5
    assert np.abs(ours[0] - ours[-1]).max() > 100


def test_another_checkpoint_and_another_start_are_another_video(maze: Path, tmp_path: Path) -> None:
    words = ["render", str(maze), "--seeds", "3", "--out"]
    for name, more in (("a", []), ("same", []), ("step", ["--checkpoint", "10"]), ("start", ["--seed", "1"])):
        assert main([*words, str(tmp_path / f"{name}.gif"), *more]) == 0
    a, same, step, start = ((tmp_path / f"{name}.gif").read_bytes() for name in ("a", "same", "step", "start"))
    assert a == same
    assert a != step
    assert a != start


def test_a_file_that_is_there_is_replaced_by_force_alone(maze: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "video.gif"
    out.write_text("mine")
    words = ["render", str(maze), "--out", str(out), "--seeds", "5"]
    assert main(words) == 2
    assert capsys.readouterr().err == f"diffrl: {out} exists. Use --force to replace it.\n"
    assert out.read_text() == "mine"
    assert main([*words, "--force"]) == 0
    assert len(pictures(out)) > 1


def test_text_stands_above_an_even_picture() -> None:
    picture = np.full((5, 7, 3), 9, np.uint8)
    found = labelled(picture, "seed")
    assert found.shape == (4 + 18, 6, 3)
    assert (found[18:] == 9).all()


def test_what_cannot_be_drawn_is_a_sentence_and_leaves_no_file(maze: Path, tmp_path: Path, monkeypatch: Any) -> None:
    plain = made_run(tmp_path / "plain", small("bc"), Task(None, {}, None, False))
    cases: list[tuple[Path, str, dict[str, Any], str]] = [
        (maze, "video.avi", {}, r"expected a path that ends in .mp4 or .gif"),
        (maze, "video.gif", {"seeds": (4,)}, "has no seed 4"),
        (maze, "video.gif", {"which": "15"}, "has no checkpoint '15'"),
        (plain, "video.gif", {}, "without an environment"),
    ]
    for run, name, options, words in cases:
        with pytest.raises(UserError, match=words):
            render(run, tmp_path / name, quiet=True, **options)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match=r"pip install 'diffrl\[video\]'"):
        render(maze, tmp_path / "video.mp4", quiet=True)
    if importlib.util.find_spec("pygame") is None:
        pendulum = made_run(tmp_path / "pendulum", small("bc"), PENDULUM)
        with pytest.raises(UserError, match=r"cannot be drawn here: .*pygame"):
            render(pendulum, tmp_path / "video.gif", quiet=True)
    assert not [*tmp_path.glob("*.gif"), *tmp_path.glob("*.mp4"), *tmp_path.glob(".*")]


class Blind(Drawn):
    """Takes no argument, and has no pictures."""

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own form)

    def __init__(self) -> None:
        super().__init__()


class Closed(Blind):
    """Names the mode of pictures, and does not take it."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (Gymnasium's own form)


class Careless(Drawn):
    """Takes the mode, and does not name it."""

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own form)


class Empty(Careless):
    """Takes the mode, does not name it, and draws nothing."""

    def render(self) -> Any:
        return None


class Bare(Careless):
    """Takes the mode, and has no render()."""

    render = gymnasium.Env.render


def test_an_environment_that_draws_without_naming_the_mode_is_drawn(tmp_path: Path, monkeypatch: Any) -> None:
    """As OGBench's cubes, scenes and puzzles."""
    assert drawn_levels(tmp_path, monkeypatch, Careless)[0] == [0, 1, 2, 3, 4, 5, 6]


NO_MODE = r"it has no render_mode that gives them \(rgb_array\)\. An environment of your own takes render_mode as"


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (Blind, NO_MODE),
        (Empty, r"its render\(\) gives none\. An environment of your own"),
        (Bare, r"its render\(\) gives none\. An environment of your own"),
        (Closed, "it cannot be made with render_mode='rgb_array', though it names that mode"),
    ],
)
def test_an_environment_without_pictures_is_a_sentence_on_pictures(
    made: type[Drawn], words: str, tmp_path: Path, monkeypatch: Any, recwarn: pytest.WarningsRecorder
) -> None:
    """And on nothing else: not on arguments that nobody gave, nor on training; Gymnasium's warning is not heard."""
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setitem(SIZES, "Blind-v0", (3, 1))
    gymnasium.register("Blind-v0", made)
    try:
        run = made_run(tmp_path / "run", small("bc"), Task("Blind-v0", {}, None, False, max_episode_steps=10))
        with pytest.raises(UserError, match=f"^Blind-v0.* draws no pictures: {words}") as caught:
            render(run, tmp_path / "a.gif", quiet=True)
    finally:
        del gymnasium.registry["Blind-v0"]
    assert "--env" not in str(caught.value)
    assert "render_mode" not in "".join(str(one.message) for one in recwarn)
    assert not (tmp_path / "a.gif").exists()


@pytest.mark.parametrize(
    "given", [{"fps": 0}, {"fps": -5}, {"episodes": 0}, {"seeds": ()}, {"every": 0}, {"max_episode_steps": 0}]
)
def test_a_video_of_nothing_is_a_sentence(maze: Path, tmp_path: Path, given: dict[str, Any]) -> None:
    """From Python, where no option's range has been looked at."""
    with pytest.raises(UserError, match=rf"^{next(iter(given))} is -?\d; expected at least 1\.$"):
        render(maze, tmp_path / "a.gif", **given)
    assert not list(tmp_path.glob("*"))


def test_opengl_is_asked_for_where_it_is_needed(monkeypatch: Any) -> None:
    """What works first is taken; what the user has chosen is kept; where nothing works, what to install is said."""
    assert [needs_opengl(task) for task in (MAZE, POINT, PENDULUM, HOPPER)] == [False, False, False, True]
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(video, "works", lambda backend: False)
    assert choose_opengl(MAZE) is None
    with pytest.raises(UserError, match="apt install libosmesa6"):
        choose_opengl(HOPPER)
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert choose_opengl(HOPPER) == "glfw"
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(video, "works", lambda backend: backend == "osmesa")
    assert choose_opengl(HOPPER) == "osmesa"
    assert not works("nothing")


@pytest.mark.slow
@pytest.mark.parametrize("task", [HOPPER, CUBE], ids=["hopper", "cube"])
def test_mujoco_draws_off_the_screen(task: Task, tmp_path: Path) -> None:
    """By each of the ways that this machine has, in a process of its own, where MuJoCo comes after the choice."""
    if task is CUBE:
        pytest.importorskip("ogbench")
    run = made_run(tmp_path / "run", small("bc"), task)
    found = [backend for backend in BACKENDS if works(backend)]
    if not found:
        pytest.skip("neither EGL nor OSMesa works on this machine")
    code = f"""
import sys
from pathlib import Path
from diffrl.runs import render
assert "mujoco" not in sys.modules
render.BACKENDS = (sys.argv[1],)
render.render({str(run)!r}, Path(sys.argv[1] + ".gif"), fps=100, quiet=True)
"""
    for backend in found:
        subprocess.run([sys.executable, "-c", code, backend], cwd=tmp_path, check=True)
        frames = pictures(tmp_path / f"{backend}.gif")
        assert len(frames) > 5
        assert frames[0, 20:].std() > 20
        assert np.abs(frames[0, 20:].astype(int) - frames[-1, 20:]).max() > 50
