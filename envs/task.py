"""Tasks: the environment that a policy is evaluated in, and the references that make scores of its returns."""

import contextlib
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypedDict

import gymnasium
import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from typing_extensions import Unpack

from diffrl.data.env_spec import BENCHMARK, USER, EnvSpec, parts_in
from diffrl.data.observations import Part, goal_left_out
from diffrl.data.offline import OfflineDataset
from diffrl.support.console import console
from diffrl.support.errors import DataError, UserError, said_by, shown
from diffrl.support.schema import Count, held, parse_kwargs
from envs import families, making, registry
from envs.datasets import named_like_d4rl
from envs.making import CannotRebuild, make_env
from envs.ogbench.names import FIRST_EPISODES

__all__ = ["Task", "find_task", "make_env", "open_task"]


@dataclass(frozen=True)
class Task:
    """The environment that a policy is evaluated in, and the references that make scores of its returns."""

    env_id: str | None
    """Gymnasium's id, or MODULE:ID; None: there is no environment."""
    env_kwargs: dict[str, Any]
    """Further arguments of `gymnasium.make`."""
    reference: str | None
    """The benchmark whose references normalise returns; None: there are none."""
    comparable: bool
    """Whether data and environment are that benchmark's, so that scores compare with published ones."""
    max_episode_steps: int | None = None
    """Steps after which an episode is cut; None: as the id is registered; -1: never."""
    wrappers: Sequence[Mapping[str, Any]] = ()
    """Gymnasium's specifications of the environment's wrappers, as Minari stores them."""
    env_origin: str = ""
    """Where the environment is from: --env, the benchmark, or the entry of the data that names it; "": not recorded."""
    observation_parts: Sequence[str] | None = None
    """Of dictionary observations, the keys that make the policy's vector; None: all, or there are no dictionaries."""

    def __post_init__(self) -> None:
        # What a damaged run.json may hold.
        wrappers, parts = self.wrappers, self.observation_parts
        limited = self.max_episode_steps is None or isinstance(self.max_episode_steps, int)
        if not (isinstance(self.env_id, str | None) and isinstance(self.env_kwargs, dict) and limited):
            raise TypeError("the environment in its task is no id with arguments and a time limit")
        if not (
            isinstance(wrappers, list | tuple) and all(isinstance(one, Mapping) and "name" in one for one in wrappers)
        ):
            raise TypeError("the wrappers in its task are no list of wrappers")
        if parts is not None and not (isinstance(parts, list | tuple) and all(isinstance(key, str) for key in parts)):
            raise TypeError("the observation_parts in its task are no list of names")

    @property
    def spec(self) -> EnvSpec | None:
        """The environment as one value; None: there is none."""
        if self.env_id is None:
            return None
        return EnvSpec(
            self.env_id, self.env_kwargs, self.max_episode_steps, tuple(self.wrappers), origin=self.env_origin
        )

    @property
    def env_text(self) -> str:
        """The environment in words, such as Pendulum-v1(g=2, 50 steps) (--env); where from, only if it is not plain."""
        spec = self.spec
        if spec is None:
            return "none"
        text = str(spec)
        return text if text == spec.id or not self.env_origin else f"{text} ({self.env_origin})"

    @property
    def faithful(self) -> bool:
        """Whether scores are the benchmark's: `comparable`, and in the environment that the benchmark has today.

        Runs of before the Adroit tasks were mended (`envs.adroit`) were evaluated in Gymnasium-Robotics' own.
        """
        return self.comparable and self.reference is not None and registry.get(self.reference).env_id == self.env_id

    @property
    def fidelity(self) -> str:
        """The line that stands beside scores, on how the environment compares with the original; "": there is none.

        It is of the environment alone, and so of all data that are scored in the benchmark's own, unchanged. Of a
        benchmark that no package here has, as in a run from another machine, nothing is known.
        """
        if self.reference is None:
            return ""
        try:
            own = registry.get(self.reference)
        except UserError:
            return ""
        changed = self.max_episode_steps is not None or dict(self.env_kwargs) != dict(own.env_kwargs)
        return own.fidelity if self.env_id == own.env_id and not changed else ""

    def make(self) -> gymnasium.Env[Any, Any]:
        """Make the environment. Raises UserError where it is unknown or not installed."""
        assert self.spec is not None
        return making.make(self.spec, self.observation_parts)

    def parts(self) -> tuple[Part, ...]:
        """The arrays that its environment, which is made to ask it, gives as an observation, as they make the vector.

        (): it gives vectors, or there is no environment. Raises UserError as `make`.
        """
        if self.env_id is None:
            return ()
        with closing(self.make()) as env:
            return env.parts if isinstance(env, making.FlatObservation) else ()

    def limit(self) -> int | None:
        """The steps after which its environment, which is made to ask it, cuts an episode; None: it does not."""
        if self.env_id is None:
            return None
        env = self.make()
        found = time_limit(env)
        env.close()
        return found

    @property
    def max_environments(self) -> int:
        """How many of its simulators an evaluation holds at once; 1 where there is no environment."""
        return 1 if self.env_id is None else making.max_environments(self.env_id)

    @cached_property
    def goal_state(self) -> NDArray[np.float32] | None:
        """The observation (O,) that the environment says is to be reached, its `goal_state`; None: it says none.

        The environment is made once, to ask it. Raises UserError where what it says is no observation.
        """
        if self.env_id is None:
            return None
        with closing(self.make()) as env:
            said, space = getattr(env.unwrapped, "goal_state", None), env.observation_space
        if said is None:
            return None
        try:
            state = np.asarray(said, np.float32)
        except (TypeError, ValueError):
            state = np.empty(0, np.float32)
        if state.shape != space.shape or not np.isfinite(state).all():
            size = "x".join(map(str, space.shape or ()))
            raise UserError(
                f"The goal_state of {self.env_text} is {shown(said)}; expected an observation to be reached, {size} "
                "finite numbers."
            )
        return state

    def within(self, spec: EnvSpec | None) -> "Task":
        """This task in another environment; None: in none."""
        if spec is None:
            return replace(self, env_id=None, env_kwargs={}, max_episode_steps=None, wrappers=(), env_origin="")
        return replace(
            self,
            env_id=spec.id,
            env_kwargs=dict(spec.kwargs),
            max_episode_steps=spec.max_episode_steps,
            wrappers=tuple(spec.wrappers),
            env_origin=spec.origin,
        )

    def changed(self, env: str | None, env_kwargs: Sequence[str], max_episode_steps: int | None) -> "Task":
        """This task as the options --env, --env-kwargs and --max-episode-steps change it; itself without them.

        Raises UserError where they do not fit together.
        """
        if env is None and not env_kwargs and max_episode_steps is None:
            return self
        own = None if self.spec is None else replace(self.spec, origin="the run's")
        spec = asked_spec(env, env_kwargs, max_episode_steps, own)
        reference = self.reference
        if spec is not None and spec.id != self.env_id:
            reference = registry.reference_of(spec.id, spec.kwargs)
        return replace(self.within(spec), reference=reference, comparable=False)

    @property
    def scored_by_success(self) -> bool:
        """Whether an episode's score is 100 where it succeeds and else 0, as OGBench's; not made of its return."""
        return self.reference is not None and registry.get(self.reference).scored_by == "success"

    def score(self, outcomes: NDArray[Any]) -> NDArray[Any]:
        """The scores (x100) of episodes (...,), normalised, from their returns (...,) or outcomes (..., 2).

        An outcome is a return and whether the episode succeeded, see `Evaluator`. Raises UserError where the score is
        made of successes, and the environment has not told them.
        """
        assert self.reference is not None
        told = outcomes.ndim == 3
        if self.scored_by_success:
            if not told:
                raise UserError(
                    f"{self.env_text} tells of no success, of which the scores of {self.reference} are made."
                )
            return 100.0 * outcomes[..., 1]
        return registry.normalised_score(self.reference, outcomes[..., 0] if told else outcomes)


def asked_spec(
    env: str | None, env_kwargs: Sequence[str], max_episode_steps: int | None, otherwise: EnvSpec | None
) -> EnvSpec | None:
    """The environment of --env, else `otherwise`, with --env-kwargs and --max-episode-steps; None: none is wanted.

    Raises UserError for arguments without an environment.
    """
    kwargs = parse_kwargs(env_kwargs)
    held(max_episode_steps, Count | None, "--max-episode-steps")
    spec = otherwise if env is None else None if env == "none" else EnvSpec(env, origin=USER)
    if spec is None:
        if kwargs or max_episode_steps is not None:
            flag = "--env-kwargs" if kwargs else "--max-episode-steps"
            raise UserError(f"{flag} is given, but there is no environment: name one with --env ID.")
        return None
    changed = spec.changed(kwargs, max_episode_steps)
    if changed is spec:
        return spec
    words = [*(f"--env-kwargs {key}" for key in kwargs), *(["--max-episode-steps"] if max_episode_steps else [])]
    return replace(changed, origin=f"{spec.origin}, changed by {', '.join(words)}" if env is None else USER)


class Asked(TypedDict, total=False):
    """What a user may ask of a task, by the names of the options; what is left out is not asked for."""

    env: str | None
    """Gymnasium's id of the environment, or "none": without one; None: the benchmark's, else the data file's."""
    rows: int | None
    """The number of first rows used; None: all. Scores of a part do not compare with published ones."""
    env_kwargs: Sequence[str]
    """Words KEY=VALUE, further arguments of the environment."""
    max_episode_steps: int | None
    """Another time limit than the environment's own."""


def find_task(name: str, dataset: OfflineDataset, **asked: Unpack[Asked]) -> Task:
    """The task of a data set, in the environment that is asked for, else the benchmark's, else the data file's.

    name: the data set's, as the user gave it. asked: see `Asked`. Raises UserError where these do not fit together, or
    the environment that the file names cannot be rebuilt.
    """
    return task_of(name, dataset.metadata, **asked)


def task_of(name: str, metadata: Mapping[str, Any], **asked: Unpack[Asked]) -> Task:
    """The task of a data set, by its metadata: see `find_task`."""
    env, env_kwargs, limit = asked.get("env"), asked.get("env_kwargs", ()), asked.get("max_episode_steps")
    benchmark = registry.find(name)
    own = None if benchmark is None else benchmark.env_id
    minari_id = metadata.get("minari_id")
    minari = None if minari_id is None else families.of_minari(str(minari_id))
    base = Task(None, {}, None, False, observation_parts=parts_in(metadata))
    if benchmark is not None and own is not None and env in (None, own):
        spec: EnvSpec | None = EnvSpec(own, dict(benchmark.env_kwargs), origin=BENCHMARK if env is None else USER)
        changed = asked_spec(None, env_kwargs, limit, spec)
    else:
        of_data = EnvSpec.of(metadata) if env is None else None
        if of_data is None and env is None and minari is not None:
            of_data = EnvSpec(minari.env_id, dict(minari.env_kwargs), origin="the id")
        elif of_data is not None:
            given = parse_kwargs(env_kwargs)  # what the user says of an argument is the user's
            making.check_rebuilt(replace(of_data, kwargs={k: v for k, v in of_data.kwargs.items() if k not in given}))
        changed = spec = asked_spec(env, env_kwargs, limit, of_data)
    env_id = None if changed is None else changed.id
    task = base.within(changed)
    if benchmark is not None and benchmark.has_scores:
        comparable = env_id == own and asked.get("rows") is None and changed is spec
        comparable &= "rebuilt" not in metadata and FIRST_EPISODES not in metadata and not benchmark.ours_alone
        return replace(task, reference=benchmark.id, comparable=comparable)
    if minari is not None and minari.fits(env_id, task.env_kwargs):
        return replace(task, reference=minari.reference)
    source = str(metadata.get("origin", metadata.get("source", "")))
    reference = registry.reference_of(env_id, task.env_kwargs, source) if env_id else None
    return replace(task, reference=reference or _reference_of_source(source, task))


def _reference_of_source(source: str, task: Task) -> str | None:
    """The benchmark that data were made from, where it is scored in the task's environment; None: there is none such.

    source: as the data name it. Of D4RL's and OGBench's environments the references are known without it.
    """
    with contextlib.suppress(UserError):  # of a package that is broken
        own = registry.find(source)
        if own is not None and own.has_scores and task.env_id == own.env_id and task.env_kwargs == dict(own.env_kwargs):
            return own.id
    return None


class DiscreteActions(UserError):
    """The environment of a data set has discrete actions, whatever type of numbers the data hold them as."""


def open_task(
    name: str, dataset: OfflineDataset, **asked: Unpack[Asked]
) -> tuple[Task, gymnasium.Env[Any, Any] | None]:
    """The task of a data set (`find_task`) and its environment, whose spaces are checked against the data.

    Raises UserError where the spaces do not fit, or the environment cannot be made. Where it was the data file and not
    the user that named it, and it is not here, prints the reason instead and goes on without an environment; what is
    here but cannot be rebuilt as the file says is refused, and so is one of discrete actions.
    """
    task, env = find_task(name, dataset, **asked), asked.get("env")
    if task.env_id is None and env is None and (said := named_like_d4rl(name)):
        console.print(said, markup=False, highlight=False)
    if task.observation_parts is not None and (remark := goal_left_out(dataset.metadata)):
        console.print(remark, markup=False)
    if env is not None and task.spec is not None:
        for said in filter(None, (_otherwise(task, dataset), making.otherwise_rewarded(task.spec))):
            console.print(said, style="yellow", markup=False)
    try:
        return task, fitting_env(name, task, dataset.observation_size, dataset.action_size)
    except (CannotRebuild, DiscreteActions):
        raise
    except UserError as error:
        changed = asked.get("env_kwargs") or asked.get("max_episode_steps") is not None
        if env is not None or changed or registry.known(name):
            raise
        console.print(f"Going on without an environment. {error}", style="yellow", markup=False)
        return task.within(None), None


def _otherwise(task: Task, dataset: OfflineDataset) -> str | None:
    """What to say where --env names the data's environment, but not as the data have it; None: nothing."""
    try:
        of_data = EnvSpec.of(dataset.metadata)
    except DataError:
        return None
    if (
        of_data is None
        or "env_spec" not in dataset.metadata
        or of_data.id != task.env_id
        or str(of_data) == str(task.spec)
    ):
        return None
    return f"The data's own environment is {of_data}, and --env asks for {task.spec}: leave --env out for the data's."


def fitting_env(name: str, task: Task, observation_size: int, action_size: int) -> gymnasium.Env[Any, Any] | None:
    """The task's environment; None: it has none. Raises UserError where its spaces are not of these sizes.

    name: what the sizes are of, a data set or a run.
    """
    if task.env_id is None:
        return None
    env = task.make()
    named = task.env_origin == USER  # who has just said --env is not told to
    advice = f"{name} is from another environment." if named else "Name the environment the data came from with --env."
    for kind, size in (("observation", observation_size), ("action", action_size)):
        space = getattr(env, f"{kind}_space")
        if kind == "action" and not isinstance(space, gymnasium.spaces.Box):
            whole = isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary)
            raise (DiscreteActions if whole else UserError)(
                f"The actions of {task.env_id} are {str(space)[:200]}: {'discrete' if whole else 'such'} actions are "
                "not supported. The agents here act by vectors of real numbers (a Box)."
            )
        if not isinstance(space, gymnasium.spaces.Box) or space.shape != (size,):
            raise UserError(
                f"{task.env_id} and {name} do not fit: the environment's {kind}s are {str(space)[:200]}, the data's "
                f"have {size} dimensions. {advice}"
            )
    if task.env_kwargs:
        _try_out(env, str(task.spec))
    if isinstance(env, making.FlatObservation) and task.observation_parts is None:
        inner: Any = env.env.observation_space
        if isinstance(inner, gymnasium.spaces.Dict):
            keys = ", ".join(inner.spaces)
            console.print(f"Observations of {task.env_id} are flattened in Gymnasium's order: {keys}.", markup=False)
    return env


def refuse_not_finite(env: gymnasium.Env[Any, Any], observation: NDArray[Any], reward: float = 0.0) -> None:
    """Raise UserError, naming the environment, where an observation or a reward that it gave is not finite."""
    name = type(env.unwrapped).__name__ if env.spec is None else env.spec.id
    gave = "" if math.isfinite(reward) else f"the reward {reward:g}"
    if not np.isfinite(observation).all():
        place = np.argwhere(~np.isfinite(observation))[0].tolist()
        gave = f"an observation whose entry {', '.join(map(str, place))} is {observation[tuple(place)]:g}"
    if gave:
        raise UserError(
            f"The environment {name} gave {gave}; expected finite numbers, without which nothing can be scored or "
            "learned in it."
        )


def _try_out(env: gymnasium.Env[Any, Any], text: str) -> None:
    """Make a step: arguments that the environment takes may be of no use to it. Raises UserError where they are not."""
    try:
        env.reset(seed=0)
        env.step(np.zeros(env.action_space.shape or (), env.action_space.dtype))
    except Exception as error:  # whatever an environment makes of its arguments
        raise UserError(
            f"{text} cannot make a step ({said_by(error)}). Change its arguments (--env-kwargs); training can do "
            "without it: --env none."
        ) from error


def benchmark_family(reference: str) -> str:
    """What the references belong to: the environment of a benchmark's id, such as hopper or maze2d-umaze.

    OGBench's scores are of a task, which its id names.
    """
    if "singletask" in reference:
        return reference
    words = reference.split("-")
    return "-".join(words[:2]) if words[0] == "maze2d" else words[0]


def references_of(reference: str) -> str:
    """Whose the reference returns of a benchmark are: D4RL, or what the ids of another package's family begin with."""
    return "D4RL" if registry.is_d4rl(reference) else benchmark_family(reference)


def scaled_by_others(reference: str) -> str:
    """What is said of scores by the reference returns of a benchmark whose data or environment they are not of."""
    of, family = references_of(reference), benchmark_family(reference)
    return (
        f"Scaled by {of}'s reference returns for {family}, but data or environment are not {of}'s: do not report it "
        f"under a {of} name."
    )


def score_word(reference: str) -> str:
    """What the scores of a benchmark are, as tables and pictures call them."""
    success = registry.known(reference) and registry.get(reference).scored_by == "success"
    return "success x100" if success else "normalised score x100"


NO_DATA_LIMIT = 1000
"""Steps after which an episode is cut where neither environment nor data say."""
NOT_KEPT = 0
"""What stands for the data's limit (`data_limit`) where nobody has noted it down."""


def data_limit(dataset: OfflineDataset) -> int | None:
    """The steps of the data's longest episode, where that says something of a time limit; None: it says nothing.

    It does where an episode was cut, or goes on for 1,000 steps or more; not where each is of one row, as generated
    ones are.
    """
    longest = int(dataset.episode_lengths().max())
    return longest if (dataset.marks_timeouts and longest > 1) or longest >= NO_DATA_LIMIT else None


def capped(task: Task, env: gymnasium.Env[Any, Any] | None, of_data: int | None, quiet: bool = False) -> Task:
    """The task with a time limit, where its environment `env` has none of its own: else an episode may never end.

    of_data: the data's (`data_limit`), which it takes; 1,000 steps where these say nothing (None), or what they say was
    not kept (`NOT_KEPT`). It is part of the task, so that every evaluation has the same, and is said, unless quiet.
    """
    if env is None or time_limit(env) is not None:
        return task
    steps = of_data or NO_DATA_LIMIT
    if not quiet:
        why = "as long as the data's longest" if of_data else "as the data say of no limit either"
        if of_data == NOT_KEPT:
            why = "as run.json does not say how long the data's are"
        console.print(
            f"{task.env_id} has no time limit: its episodes are cut after {steps:,} steps, {why} (--max-episode-steps)."
        )
    return replace(task, max_episode_steps=steps)


def time_limit(env: gymnasium.Env[Any, Any]) -> int | None:
    """The steps after which an environment cuts an episode, by a wrapper; None: it has none."""
    while isinstance(env, gymnasium.Wrapper):
        if isinstance(env, gymnasium.wrappers.TimeLimit):
            return int(env._max_episode_steps)
        env = env.env
    return None
