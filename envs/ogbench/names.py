"""What OGBench's ids mean: `cube-single-play-v0` is a data set, `cube-single-play-singletask-task2-v0` a task of it.

NAME-KIND[-small][-singletask[-taskK][-sparse][-pre|-post]]-v0[-val]. `val` is the validation set. Ours are: `small`,
the first 100 episodes; `sparse`, QC's reward of -1 until all is done; and when rewards and success are told.

Of a row (s, a, s') OGBench's reader has always taken the reward and the success of s. Its environment took those of s'
up to 1.1.5, with which FQL and QC were published, and takes those of s since 1.2.0. So an id without a suffix is what
they were published on, the data's of s and the environment's of s'; `-pre` is 1.2.0's, both of s; with `-post`, ours
alone, both are of s'.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, get_args

from diffrl.support.errors import UserError, nearest

Timing = Literal["post", "pre"]
"""When an environment tells reward and success: post, of s', the state after the action; pre, of s."""
SMALL = 100
"""Episodes of a small data set."""
FIRST_EPISODES = "first_episodes"
"""The metadata's key of a small data set that was read from a file of more episodes: how many they are of how many."""
NAMESPACE = "ogbench/"
"""What the Gymnasium ids of our environments begin with."""


@dataclass(frozen=True)
class World:
    """An environment of OGBench's with five tasks, and its data sets."""

    name: str
    max_episode_steps: int
    """Of a task's episodes; the data's are longer."""
    default_task: int
    episodes: dict[str, int]
    """Of each kind of data set, the number of training episodes; a tenth more are for validation."""
    rows: dict[str, int]
    """Of each kind, the rows of an episode: the last has no successor in the data."""
    expert: bool = False
    """Whether its data need a trained expert, so that they are read but not rebuilt here."""

    @property
    def env_id(self) -> str:
        """The Gymnasium id of its environment here."""
        return f"{NAMESPACE}{self.name}-v0"

    @property
    def maze(self) -> bool:
        """Whether it is a maze or a ground to be walked on, rather than a table with an arm."""
        return "maze" in self.name or "soccer" in self.name


def _worlds() -> Iterator[World]:
    def mazes(name: str, steps: int, task: int, kinds: dict[str, tuple[int, int]], expert: bool) -> World:
        episodes, rows = ({kind: pair[i] for kind, pair in kinds.items()} for i in (0, 1))
        return World(name, steps, task, episodes, rows, expert)

    for size in ("medium", "large", "giant", "teleport"):
        far = (500, 2001) if size == "giant" else (1000, 1001)
        kinds = {"navigate": far, "stitch": (5000, 201)}
        yield mazes(f"pointmaze-{size}", 1000, 1, kinds, False)
        explore = {} if size == "giant" else {"explore": (10_000, 501)}
        yield mazes(f"antmaze-{size}", 1000, 1, kinds | explore, True)
    for size in ("medium", "large", "giant"):
        far, steps = ((1000, 4001), 4000) if size == "giant" else ((1000, 2001), 2000)
        near = (10_000, 401) if size == "giant" else (5000, 401)
        yield mazes(f"humanoidmaze-{size}", steps, 1, {"navigate": far, "stitch": near}, True)
    soccer = {
        "arena": {"navigate": (1000, 1001), "stitch": (5000, 201)},
        "medium": {"navigate": (4000, 1001), "stitch": (8000, 501)},
    }
    for size, kinds in soccer.items():
        yield mazes(f"antsoccer-{size}", 1000, 4, kinds, True)
    tables = [("cube-single", 200, 2, 1000), ("cube-double", 500, 2, 1000), ("cube-triple", 1000, 2, 3000)]
    tables += [("cube-quadruple", 1000, 2, 5000), ("scene", 750, 2, 1000)]
    tables += [("puzzle-3x3", 500, 4, 1000), ("puzzle-4x4", 500, 4, 1000)]
    tables += [("puzzle-4x5", 1000, 2, 3000), ("puzzle-4x6", 1000, 2, 5000)]
    for name, steps, task, episodes in tables:
        kinds = {"play": (episodes, 1001), "noisy": (episodes, 1001)}
        yield mazes(name, steps, task, kinds, False)


WORLDS = {world.name: world for world in _worlds()}
"""OGBench's environments of states (not of pixels) that have single tasks, by name."""
TASKS = (1, 2, 3, 4, 5)
_ORDER = ("small", "singletask", "task[0-9]+", "sparse", "pre", "v0", "val")
"""The words of an id behind its kind, in their order."""
_PATTERN = re.compile(
    r"(?P<world>\w+(-\w+)?)-(?P<kind>play|noisy|navigate|stitch|explore)(?P<small>-small)?"
    r"(?P<single>-singletask(-task(?P<task>[0-9]+))?(?P<sparse>-sparse)?(-(?P<timing>pre|post))?)?-v0(?P<val>-val)?"
)


@dataclass(frozen=True)
class Name:
    """An id taken apart."""

    world: World
    kind: str
    small: bool = False
    task: int | None = None
    """The task whose rewards the rows have; None: none, the id is that of the data set."""
    sparse: bool = False
    timing: Timing = "post"
    """Of the environment."""
    validation: bool = False
    """Whether it is the validation set."""
    after: bool = False
    """Whether the data's rewards are of s' as well, which OGBench's reader never has."""

    @property
    def dataset(self) -> str:
        """The id of the data set, the same for all tasks: what is stored once."""
        return f"{self.world.name}-{self.kind}{'-small' if self.small else ''}-v0"

    @property
    def episodes(self) -> int:
        """The number of training episodes."""
        whole = self.world.episodes[self.kind]
        return min(SMALL, whole) if self.small else whole

    @property
    def rows(self) -> int:
        """The rows of an episode in the file; as transitions there is one fewer."""
        return self.world.rows[self.kind]

    @property
    def has_oracle(self) -> bool:
        """Whether the data can be rebuilt here."""
        return not self.world.expert

    @property
    def whole(self) -> Name:
        """The data set that this one is a part or a task of, as OGBench has it."""
        return replace(self, small=False, task=None, sparse=False, timing="post", validation=False, after=False)


def parse(text: str) -> Name | None:
    """An id taken apart; None where it is none of OGBench's. Raises UserError for a task that does not exist."""
    match = _PATTERN.fullmatch(text)
    world = WORLDS.get(match["world"]) if match else None
    if match is None or world is None or match["kind"] not in world.episodes:
        return None
    task = None
    if match["single"]:
        task = int(match["task"]) if match["task"] else world.default_task
        if task not in TASKS:
            raise UserError(f"{text!r}: {world.name} has no task {task}; expected task1 to task{TASKS[-1]}.")
    if match["sparse"] and world.maze:
        raise UserError(f"{text!r}: the rewards of {world.name} are sparse already; leave `-sparse` out.")
    timing: Timing = "pre" if match["timing"] == "pre" else "post"
    small, sparse, validation = (bool(match[part]) for part in ("small", "sparse", "val"))
    return Name(world, match["kind"], small, task, sparse, timing, validation, after=match["timing"] == "post")


def as_before(text: str) -> str | None:
    """The id by which data are read now that an id without a timing meant up to version 0.2.0; None: it is another."""
    name = parse(text)
    if name is None or name.task is None or name.timing == "pre" or name.after:
        return None
    head, tail = text.rsplit("-v0", 1)
    if name.world.name in ("puzzle-4x5", "puzzle-4x6") and "-task" not in text.replace("singletask", ""):
        head = head.replace("-singletask", "-singletask-task4")  # by default then
    return f"{head}-post-v0{tail}"


def get(text: str) -> Name:
    """As `parse`, for a text that must be an id. Raises UserError, naming the nearest, where it is none."""
    found = parse(text)
    if found is None:
        raise UserError(
            f"{text!r} is no data set of OGBench's: {hint(text, datasets())} See `diffrl data list ogbench`."
        )
    return found


@cache
def datasets() -> tuple[str, ...]:
    """The ids of OGBench's data sets."""
    return tuple(f"{world.name}-{kind}-v0" for world in WORLDS.values() for kind in world.episodes)


@cache
def tasks() -> tuple[str, ...]:
    """The ids of all tasks with OGBench's own names."""
    return tuple(task for dataset in datasets() for task in of_dataset(get(dataset)))


def of_dataset(name: Name) -> tuple[str, ...]:
    """The ids of the tasks of a data set: the default task's, then task 1 to 5."""
    stem = name.dataset.removesuffix("-v0")
    return tuple(f"{stem}-singletask{suffix}-v0" for suffix in ("", *(f"-task{task}" for task in TASKS)))


def of_environment(env_id: str, kwargs: Mapping[str, Any], named: str = "") -> str | None:
    """The id of the task that an environment of ours with these arguments is; None: it is none of OGBench's tasks.

    named: the data set or task that the data are said to be of. Without it the id is of the environment's first kind of
    data: what scores are made of is the same for all.
    """
    env_id = env_id.removeprefix("envs:")
    world = WORLDS.get(env_id.removeprefix(NAMESPACE).removesuffix("-v0")) if env_id.startswith(NAMESPACE) else None
    given = {"world": world and world.name, "task": 0, "timing": "post", "sparse": False, **kwargs}
    if world is None or len(given) > 4 or given["world"] != world.name or given["timing"] not in get_args(Timing):
        return None
    if type(given["task"]) is not int or given["task"] not in (0, *TASKS):
        return None
    task, sparse = given["task"] or world.default_task, bool(given["sparse"]) and not world.maze
    try:
        name = parse(named)
    except UserError:
        name = None
    if name is None or name.world != world:
        name = Name(world, next(iter(world.episodes)))
    if (name.task, name.sparse, name.timing) == (task, sparse, given["timing"]):
        return named
    suffix = ("-sparse" if sparse else "") + ("-pre" if given["timing"] == "pre" else "")
    return f"{name.dataset.removesuffix('-v0')}-singletask-task{task}{suffix}-v0"


def reordered(text: str) -> str | None:
    """The id that a text is but for the order of its words, or its -v0; None: it is none.

    So is cube-single-play-singletask-small, as the small configurations are called.
    """

    def place(word: str) -> int:
        return next((i for i, one in enumerate(_ORDER) if re.fullmatch(one, word)), -1)

    words = text.split("-")
    found = "-".join(sorted(dict.fromkeys([*words, "v0"]), key=place))
    try:
        return found if found != text and parse(found) is not None else None
    except UserError:  # no such task
        return None


def hint(text: str, known: Iterable[str]) -> str:
    """Half a sentence on what was meant: the same words in order, else the nearest of `known`."""
    meant = reordered(text)
    return nearest(text, known) if meant is None else f"did you mean {meant!r}?"


def near(text: str) -> tuple[str, ...]:
    """The ids among which a text that is none of them was meant to be; none where it begins like no world."""
    family = text.split("-")[0]
    if family not in {world.split("-")[0] for world in WORLDS} or family == "antmaze":  # D4RL's too
        return ()
    return tasks() if "singletask" in text else datasets()
