"""A run's policies as a video: what each seed does from the same start states, side by side.

Mazes of a ball, maze2d's and OGBench's, are drawn from above with the way that was driven. Other environments are asked
for pictures, MuJoCo's by OpenGL off the screen: EGL or OSMesa, whichever works.
"""

import dataclasses
import inspect
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from diffrl.runs.acting import Actor
from diffrl.runs.policy import load_stack, tell_remarks
from diffrl.runs.run import Run
from diffrl.support.console import console, work
from diffrl.support.errors import UserError, counted, said_by
from diffrl.support.files import atomic_path
from diffrl.support.machine import settle, usual_torch
from diffrl.support.plots import BLUE, ORANGE
from diffrl.support.stopping import Interrupted, stop_signals
from envs.ogbench.names import NAMESPACE
from envs.task import Task, refuse_not_finite

if TYPE_CHECKING:
    from diffrl.runs.report import Floor

Picture = NDArray[np.uint8]
"""(height, width, 3)"""
SIDE_BY_SIDE = 4
"""Seeds in one video at most, if none are named."""
_BAR = 18
"""Height of the line of text above a picture, in pixels."""
_MAZE = 320
"""Height of a maze's picture, in pixels."""
_WITHOUT_GL = ("gymnasium.envs.classic_control", "gymnasium.envs.box2d", "gymnasium.envs.toy_text")
"""Modules of environments that draw without OpenGL."""
_PICTURES, _LEAST = 30.0, 20.0
"""Pictures a second: about so many by default; and at least, of an environment whose own time is not known."""
_LONG = 1000
"""Steps that an episode may have where the environment does not say, for the bar that shows how far the work is."""
_PATIENCE = 120.0
"""Seconds that drawing may take by default: where it would take longer, steps are left out."""
_FEWEST = 50
"""Pictures of an episode of full length that are drawn by default however slow drawing is."""
_OGBENCH = {"width": 400, "height": 400}
"""Pixels of OGBench's pictures; its own are of 200, in which a robot's hand is hard to see."""
BACKENDS = ("egl", "osmesa")
"""MuJoCo's ways to OpenGL without a screen, in the order of trying."""


@usual_torch()
def render(
    run: Path | str,
    out: Path | str,
    *,
    episodes: int = 1,
    seeds: Sequence[int] | None = None,
    which: str | int = "last",
    seed: int = 0,
    fps: int | None = None,
    every: int | None = None,
    max_episode_steps: int | None = None,
    quiet: bool = False,
) -> Path:
    """Write a video of a run's policies in its environment, each seed's beside the others; give its path.

    out: a path that ends in .mp4 (which needs the extra `video`) or .gif. seeds: of the run's, by default its first
    four. Episode by episode all seeds start in the same state. which: the `last` or `best` checkpoint, or that of a
    step. seed: what start states and noise are drawn from. fps: pictures a second. By default time is as fast as in the
    environment (see `steps_a_second`), at about 30 pictures a second where it makes as many steps. With another number
    steps are left out as they have to be; more pictures than there are steps show it faster than it is. every: draw one
    step of so many, by default as many as `fps` needs, and of slow pictures fewer, which is said unless quiet; time
    goes on as in the environment unless `fps` says otherwise. max_episode_steps: another time limit than the run's.

    A stop (Ctrl-C) keeps the pictures drawn so far as a whole video, and raises Interrupted. Raises UserError where
    there is no environment, or none that can be drawn here, and for fewer than one episode, seed, step or picture a
    second.
    """
    numbers = {"episodes": episodes, "seeds": 1 if seeds is None else len(seeds), "fps": fps, "every": every}
    for name, value in (numbers | {"max_episode_steps": max_episode_steps}).items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; expected at least 1.")
    out, opened = Path(out), Run.read(run)
    write = writer(out)
    if (env_id := opened.task.env_id) is None:
        raise UserError(f"{opened.path} was trained without an environment: there is nothing to look at.")
    task = opened.task.changed(None, (), max_episode_steps)
    seeds = opened.config.seeds[:SIDE_BY_SIDE] if seeds is None else tuple(seeds)
    settle()
    choose_opengl(task)
    loaded = [load_stack(opened, [one], str(which), "cpu") for one in seeds]
    agents = [agent for agent, _ in loaded]
    tell_remarks(opened, str(which), [step for _, (step,) in loaded], quiet)
    size = _OGBENCH if env_id.removeprefix("envs:").startswith(NAMESPACE) else {}
    seen = dataclasses.replace(task, env_kwargs={**size, **task.env_kwargs, "render_mode": "rgb_array"})
    with ExitStack() as held:
        envs = [held.enter_context(closing(_drawing(seen, task))) for _ in seeds]
        acts = [Actor(agent, opened.preprocessing, seed, keep=1) for agent in agents]
        panels = [_panel(env, f"seed {one}", task) for env, one in zip(envs, seeds, strict=True)]
        limit = (envs[0].spec and envs[0].spec.max_episode_steps) or _LONG
        real = steps_a_second(envs[0])
        usual = max(1, round(real / (_PICTURES if fps is None else fps)))
        first = _begin(envs, acts, panels, (seed, 0))
        slow = 1 if fps is not None or every is not None else _every(_seconds(panels), limit, episodes, usual, quiet)
        # A picture a minute at least: an episode has its first and its last one.
        shown_every = min(max(usual, slow) if every is None else every, limit, max(1, round(60 * real)))
        shown_fps = real / shown_every if fps is None else float(fps)
        drawn = 0
        with stop_signals() as stopped, work(f"{opened.path.name} in {task.env_text}", "steps", quiet) as on_step:

            def frames() -> Iterator[Picture]:
                nonlocal drawn
                for episode in range(episodes):
                    observations = first if episode == 0 else _begin(envs, acts, panels, (seed, episode))
                    shown = _episode(envs, acts, panels, observations, shown_every, stopped)
                    for i, frame in enumerate(shown):
                        on_step(episode * limit + min(i * shown_every, limit), episodes * limit)
                        drawn += 1
                        yield frame
                    if stopped():
                        return
                on_step(episodes * limit, episodes * limit)

            with atomic_path(out) as temporary:
                write(temporary, frames(), shown_fps)
            if stopped():
                raise Interrupted(f"Stopped. {counted(drawn, 'pictures')} are kept: {out} shows what was drawn so far.")
    return out


def _seconds(panels: Sequence["Panel"]) -> float:
    """How long it takes to draw all panels; the first picture, with which a drawer is made ready, is not counted."""
    for _ in range(2):
        began = time.perf_counter()
        for panel in panels:
            panel.picture(0)
    return time.perf_counter() - began


def _every(seconds: float, limit: int, episodes: int, usual: int, quiet: bool) -> int:
    """Of how many steps one is drawn, so that drawing takes two minutes at most; said where it is fewer than usual.

    seconds: those that a picture takes. limit: the steps of an episode, of which at least fifty are drawn.
    """
    steps = limit * episodes
    found = min(math.ceil(seconds * steps / _PATIENCE), limit // _FEWEST)
    if found <= usual:
        return usual
    if not quiet:
        minutes = seconds * steps / usual / 60
        console.print(
            f"A picture takes {seconds:.2g} s here, so one step of {found} is drawn; time is as fast as ever. "
            f"--every {usual} draws more of them, in about {minutes:,.0f} minutes."
        )
    return found


def steps_a_second(env: gymnasium.Env[Any, Any]) -> float:
    """How many steps an environment makes in a second of its own time.

    That is 1 / dt, dt the simulator's time for a step. Where it is not known: what the environment says that its
    pictures are to be shown at (`render_fps`), but not less than 20.
    """
    for name in ("dt", "control_timestep", "tau"):  # MuJoCo's; a method of OGBench's cubes and scenes; cart-pole's
        dt = getattr(env.unwrapped, name, None)
        dt = dt() if inspect.ismethod(dt) else dt
        if isinstance(dt, int | float) and 0.001 <= dt <= 1:
            return 1 / float(dt)
    said = env.metadata.get("render_fps")
    return max(float(said), _LEAST) if isinstance(said, int | float) and said > 0 else _PICTURES


def _begin(
    envs: Sequence[gymnasium.Env[Any, Any]],
    acts: Sequence[Actor],
    panels: Sequence["Panel"],
    entropy: tuple[int, int],
) -> list[NDArray[np.float32]]:
    """Begin an episode of every seed; give its first observations, (O,) each.

    entropy: what the start state is drawn from, the same for all seeds.
    """
    start = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    observations = [np.asarray(env.reset(seed=start)[0], np.float32) for env in envs]
    for act, panel, observation in zip(acts, panels, observations, strict=True):
        act.reset()
        act.first_plans = None
        panel.begin(observation)
    return observations


def _episode(
    envs: Sequence[gymnasium.Env[Any, Any]],
    acts: Sequence[Actor],
    panels: Sequence["Panel"],
    observations: list[NDArray[np.float32]],
    every: int,
    stopped: Callable[[], bool],
) -> Iterator[Picture]:
    """The pictures of one episode, which goes on until it is over for every seed: each `every`-th step's, and the last.

    observations: those it begins with, see `_begin`. stopped: whether it is to end now.
    """
    going, step = set(range(len(envs))), 0
    yield np.hstack([panel.picture(step) for panel in panels])
    while going and not stopped():
        step += 1
        for i in sorted(going):
            action = acts[i](observations[i][None, None])[0, 0]
            if not np.isfinite(action).all():
                raise UserError("The policy's actions are not finite: its training has diverged.")
            observation, reward, terminal, cut, _ = envs[i].step(action)
            observations[i] = np.asarray(observation, np.float32)
            refuse_not_finite(envs[i], observations[i], float(reward))
            panels[i].add(observations[i], float(reward), acts[i].first_plans)
            if terminal or cut:
                going.discard(i)
                panels[i].finish(step)
        if step % every == 0 or not going:
            yield np.hstack([panel.picture(step) for panel in panels])


# --- one seed's picture ---------------------------------------------------------------------------------------------


class Panel:
    """The picture of one environment, as it draws itself, with a line of text above it.

    unnamed: what is said, as a UserError, where an environment that does not name the mode draws nothing; it is asked
    itself, as a wrapper of Gymnasium's refuses what is not named.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], name: str, unnamed: str | None = None) -> None:
        self._env, self._name, self._unnamed = env if unnamed is None else env.unwrapped, name, unnamed
        self._return, self._over = 0.0, 0
        self._last: Picture | None = None

    def begin(self, observation: NDArray[np.float32]) -> None:
        """An episode begins."""
        self._return, self._over, self._last = 0.0, 0, None

    def add(self, observation: NDArray[np.float32], reward: float, plans: NDArray[np.float32] | None) -> None:
        """A step was made. plans: (B, H, O) those that are followed, if the agent plans."""
        self._return += reward

    def finish(self, step: int) -> None:
        """The episode was over after this step: the picture stays."""
        self._last = self._drawn()
        self._over = step

    def picture(self, step: int) -> Picture:
        """The picture now, after so many steps."""
        drawn = self._drawn() if self._last is None else self._last
        return labelled(drawn, f"{self._name}   step {self._over or step}   return {self._return:z.1f}")

    def _drawn(self) -> Picture:
        try:
            drawn: Any = self._env.render()
        except NotImplementedError as error:
            raise UserError(self._unnamed or _cannot_draw(self._env, said_by(error))) from error
        except Exception as error:  # whatever its libraries make of a machine without a screen
            raise UserError(_cannot_draw(self._env, said_by(error))) from error
        if not isinstance(drawn, np.ndarray) or drawn.ndim != 3:
            raise UserError(self._unnamed or _cannot_draw(self._env, "it gives no picture"))
        return drawn[..., :3].astype(np.uint8)


def _cannot_draw(env: gymnasium.Env[Any, Any], why: str) -> str:
    name = env.spec.id if env.spec else "The environment"
    more = " `pip install pygame` may help." if "pygame" in why and "pip install" not in why else ""
    return f"{name} cannot be drawn here: {why.rstrip('.')[:300]}.{more}"


class MazePanel(Panel):
    """A maze from above, with the way driven so far, the ball, and the plan where there is one."""

    def __init__(self, env: gymnasium.Env[Any, Any], name: str, floor: "Floor") -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        from diffrl.runs.report import draw_maze  # which imports MuJoCo: see `choose_opengl`

        super().__init__(env, name)
        self._path: list[NDArray[np.float64]] = []
        self._places = floor.places
        rows, columns = len(floor.grid) - 1.2, len(floor.grid[0]) - 1.2
        size = _MAZE / 100 * columns / rows, _MAZE / 100
        self._canvas: Any = FigureCanvasAgg(Figure(figsize=size, dpi=100))
        ax = self._canvas.figure.add_axes((0, 0, 1, 1))
        draw_maze(ax, floor.grid, floor.goal, [], floor.radius)
        (self._plan,) = ax.plot([], [], color=BLUE, linewidth=1, linestyle="--")
        (self._way,) = ax.plot([], [], color=ORANGE, linewidth=2)
        (self._ball,) = ax.plot([], [], color="black", marker="o", markersize=7)

    def begin(self, observation: NDArray[np.float32]) -> None:
        """An episode begins: the way is empty."""
        super().begin(observation)
        self._path = [self._places(observation)]
        self._plan.set_data([], [])

    def add(self, observation: NDArray[np.float32], reward: float, plans: NDArray[np.float32] | None) -> None:
        """The ball has moved to the observation's place."""
        super().add(observation, reward, plans)
        self._path.append(self._places(observation))
        if plans is not None:
            plan = self._places(plans[0])
            self._plan.set_data(plan[:, 1], plan[:, 0])

    def _drawn(self) -> Picture:
        way = np.stack(self._path)
        self._way.set_data(way[:, 1], way[:, 0])
        self._ball.set_data(way[-1:, 1], way[-1:, 0])
        self._canvas.draw()
        return np.asarray(self._canvas.buffer_rgba())[..., :3].copy()


def _panel(env: gymnasium.Env[Any, Any], name: str, task: Task) -> Panel:
    from diffrl.runs.report import floor_in  # which imports MuJoCo

    if _from_above(task):
        env.reset(seed=0)  # which sets the goal of OGBench's
        if (floor := floor_in(env)) is not None:
            return MazePanel(env, name, floor)
    named = "rgb_array" in env.metadata.get("render_modes", [])
    return Panel(env, name, None if named else _draws_nothing(task, "its render() gives none"))


def _from_above(task: Task) -> bool:
    """Whether a task's environment is a maze with a ball in it, which is drawn from above without OpenGL."""
    return str(task.env_id).rpartition(":")[2].removeprefix(NAMESPACE).startswith(("maze2d-", "pointmaze-"))


def _drawing(seen: Task, task: Task) -> gymnasium.Env[Any, Any]:
    """The environment `seen`, which is `task`'s asked for pictures. Raises UserError where it gives none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not in the possible render_modes", category=UserWarning)
        try:
            return seen.make()
        except UserError as error:
            with closing(task.make()) as env:  # or what is wrong has nothing to do with pictures, and is raised
                modes = env.metadata.get("render_modes", [])
            why = "it has no render_mode that gives them (rgb_array)"
            if "rgb_array" in modes:
                why = "it cannot be made with render_mode='rgb_array', though it names that mode"
            raise UserError(_draws_nothing(task, why)) from error


def _draws_nothing(task: Task, why: str) -> str:
    return (
        f"{task.env_text} draws no pictures: {why}. An environment of your own takes render_mode as an argument, names "
        'the mode (metadata = {"render_modes": ["rgb_array"]}), and has render() give an array (height, width, 3).'
    )


def labelled(picture: Picture, text: str) -> Picture:
    """The picture with a line of text above it, its sides cut to even numbers, as video coders want them."""
    from PIL import Image, ImageDraw

    height, width = (side - side % 2 for side in picture.shape[:2])
    canvas = Image.new("RGB", (width, height + _BAR), "white")
    canvas.paste(Image.fromarray(picture[:height, :width]), (0, _BAR))
    ImageDraw.Draw(canvas).text((4, 3), text, fill="black")
    return np.asarray(canvas)


# --- files ----------------------------------------------------------------------------------------------------------

Writer = Callable[[Path, Iterator[Picture], float], None]


def writer(out: Path) -> Writer:
    """What writes pictures as the kind of file that the path's ending says. Raises UserError for another ending."""
    if out.suffix == ".gif":
        return _write_gif
    if out.suffix != ".mp4":
        raise UserError(f"--out is {str(out)!r}; expected a path that ends in .mp4 or .gif.")
    try:
        import imageio_ffmpeg  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            "An MP4 needs imageio-ffmpeg, which is not installed: pip install 'diffrl[video]' brings it; a .gif needs "
            "nothing."
        ) from error
    return _write_mp4


def _write_mp4(path: Path, frames: Iterator[Picture], fps: float) -> None:
    import imageio_ffmpeg

    first = next(frames)
    height, width = first.shape[:2]
    size = width, height
    coder = imageio_ffmpeg.write_frames(str(path), size, fps=fps, macro_block_size=2, ffmpeg_log_level="error")
    with closing(coder):
        coder.send(None)
        coder.send(np.ascontiguousarray(first))
        for frame in frames:
            coder.send(np.ascontiguousarray(frame))


def _write_gif(path: Path, frames: Iterator[Picture], fps: float) -> None:
    from PIL import Image

    def coloured(frame: Picture) -> "Image.Image":
        return Image.fromarray(frame).quantize(128)

    first = coloured(next(frames))
    rest = (coloured(frame) for frame in frames)
    # GIF counts in hundredths of a second, and browsers slow down what is faster than 50 pictures a second.
    duration = max(2, round(100 / fps)) * 10
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=duration, loop=0)


# --- OpenGL ---------------------------------------------------------------------------------------------------------


def choose_opengl(task: Task) -> str | None:
    """Set `$MUJOCO_GL`, if nobody has, to what works without a screen, where the environment needs it; give it.

    It has to be set before MuJoCo is imported. Raises UserError where neither EGL nor OSMesa works.
    """
    if not needs_opengl(task):
        return None
    if chosen := os.environ.get("MUJOCO_GL"):
        return chosen
    for backend in BACKENDS:
        if works(backend):
            os.environ["MUJOCO_GL"] = backend
            return backend
    raise UserError(
        "Drawing needs OpenGL off the screen, and neither EGL nor OSMesa works here: `apt install libegl1 "
        "libegl-mesa0` or `apt install libosmesa6`."
    )


def needs_opengl(task: Task) -> bool:
    """Whether a task's environment may be drawn by MuJoCo, by where Gymnasium's registration says that its class is."""
    if _from_above(task):
        return False
    spec = gymnasium.registry.get(str(task.env_id).rpartition(":")[2])
    entry = "" if spec is None or not isinstance(spec.entry_point, str) else spec.entry_point
    return not entry.startswith(_WITHOUT_GL)


def works(backend: str) -> bool:
    """Whether MuJoCo gets a picture by a backend, egl or osmesa: tried in a process of its own, which may crash."""
    code = f"from mujoco.{backend} import GLContext\nc = GLContext(8, 8)\nc.make_current()\nc.free()"
    environment = {**os.environ, "MUJOCO_GL": backend, "PYOPENGL_PLATFORM": backend}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, timeout=60, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
