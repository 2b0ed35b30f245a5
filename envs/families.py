"""What holds for whole families of D4RL's ids, and of Minari's: environment, step limit, fidelity to the original."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_LOCOMOTION = {"hopper": "Hopper-v4", "halfcheetah": "HalfCheetah-v4", "walker2d": "Walker2d-v4"}
_MAZE_STEPS = {"open": 150, "umaze": 300, "medium": 600, "large": 800}
_OTHER_STEPS = {"flow-ring": 500, "flow-merge": 750, "minigrid": 50}
_OLD_ENGINE = "Data of the mujoco_py era do not replay exactly on today's engine."

RANDOM = {
    "hopper": "17.7 ± 1.8",
    "halfcheetah": "-258 ± 22",
    "walker2d": "2.6 ± 0.7",
    "maze2d-umaze": "30.5 ± 2.1",
    "maze2d-medium": "13.4 ± 2.1",
    "maze2d-large": "12.5 ± 2.3",
    "antmaze": "0 in 60 episodes",
    "kitchen": "0 in 10 episodes",
    "pen": "77.0 ± 9.1",
    "door": "-56.66 ± 0.07",
    "hammer": "-275.8 ± 0.6",
    "relocate": "-6.0 ± 0.3",
}
"""Mean return of uniform actions in our environment, ± its standard error, as measured; beside D4RL's `ref_min`."""
HOPPER_RANDOM = ", and 18.3 in D4RL's own file hopper-random-v1"
"""Why hopper's two figures differ: D4RL's reference is not the mean of its own random episodes, with which ours agrees.

18.3 is the sum of that file's rewards over its 45,264 terminal rows (github.com/Farama-Foundation/D4RL/issues/86).
"""


def family(benchmark_id: str, domain: str, task: str, version: str, ref_min: float | None) -> dict[str, Any]:
    """The fields of a D4RL id's `Benchmark` that its family decides.

    domain, task: the id's two parts, such as antmaze and medium-play-v2. version: v0, v1 or v2. ref_min: D4RL's mean
    return of a random policy.
    """
    quality = task.removesuffix(f"-{version}")
    maze = quality.split("-")[0]
    sparse = "dense" not in quality

    def fidelity(how: str, measured: str) -> str:
        """The line that stands beside a score."""
        low = RANDOM.get(measured)
        compared = "not compared" if low is None or ref_min is None else f"{low} here, {ref_min:.4g} in D4RL"
        compared += HOPPER_RANDOM if measured == "hopper" and ref_min is not None else ""
        return f"{how}; returns of a random policy: {compared}."

    if domain in _LOCOMOTION:
        note = _OLD_ENGINE
        if domain == "hopper" and version in ("v0", "v1"):
            note = f"The v0 and v1 hopper files are faulty: use hopper-{quality}-v2. {note}"
        return {
            "env_id": _LOCOMOTION[domain],
            "max_episode_steps": 1000,
            "note": note,
            "fidelity": fidelity(f"{_LOCOMOTION[domain]} on today's MuJoCo, for D4RL's on mujoco_py", domain),
            "minari": f"mujoco/{domain}/{quality}-v0" if quality in ("medium", "expert") else None,
        }
    if domain == "ant":
        note = "Not comparable today: D4RL's Ant has 111 observations, Gymnasium's v4 has 27 and v5 has 105."
        return {"env_id": None, "max_episode_steps": 1000, "note": note}
    if domain == "maze2d":
        return {
            "env_id": benchmark_id,
            "max_episode_steps": _MAZE_STEPS[maze],
            "generated": True,
            "note": "Environment and data are rebuilt here after D4RL's; timeouts mark a reached target.",
            "fidelity": fidelity("maze2d rebuilt here after D4RL's", f"maze2d-{maze}" if sparse else ""),
        }
    if domain == "maze2d-eval":
        note = "No environment here: D4RL's evaluation mazes are not rebuilt, and its table has no references for them."
        return {"env_id": None, "max_episode_steps": _MAZE_STEPS[maze], "note": note}
    if domain == "antmaze":
        return {
            "env_id": benchmark_id,
            "max_episode_steps": 700 if maze == "umaze" else 1000,
            "note": _antmaze_note(quality, version),
            "fidelity": fidelity("AntMaze rebuilt here after D4RL's", domain),
            "minari": f"D4RL/antmaze/{quality}-v1",
        }
    if domain == "kitchen":
        return {
            "env_id": benchmark_id,
            "env_extra": "robotics",
            "max_episode_steps": 280,
            "note": _KITCHEN_NOTE,
            "fidelity": fidelity("Gymnasium-Robotics' kitchen with D4RL's observations, noise and counts", domain),
            "minari": f"D4RL/kitchen/{quality}-v2",
        }
    if domain in ("pen", "door", "hammer", "relocate"):
        mended = "dropped pens end an episode" if domain == "pen" else "the distance to the object is punished"
        return {
            "env_id": benchmark_id,
            "env_extra": "robotics",
            "max_episode_steps": 100 if domain == "pen" else 200,
            "note": _adroit_note(domain),
            "fidelity": fidelity(f"Gymnasium-Robotics' {domain}, mended: {mended}, as in D4RL", domain),
            "minari": f"D4RL/{domain}/{quality}-v2",
        }
    note = "No environment here: its simulator is not packaged for today's Gymnasium."
    if domain == "minigrid":
        note = "Discrete actions, which diffrl's agents do not have. " + note
    steps = _OTHER_STEPS.get(domain, _MAZE_STEPS[maze] if domain == "bullet-maze2d" else 1000)
    if benchmark_id == "carla-lane-v0":
        steps = 250
    return {"env_id": None, "max_episode_steps": steps, "note": note}


def _antmaze_note(quality: str, version: str) -> str:
    note = (
        "Environment rebuilt here. As D4RL's public code has them: maps, start, goal cell and its spread, radius .5, "
        "reward, end at the goal, step limit, observation and torques; the ant is Gymnasium's asset with D4RL's "
        "constants. Not confirmed here: roll-outs on D4RL's engine (MuJoCo 2.1), and scores of trained policies."
    )
    if version == "v0":
        note += (
            f" The v0 files' timeouts are out of step with the episodes: use antmaze-{quality}-v2. D4RL's v0 draws one "
            "goal for a whole process; here each episode has its own, as in v2."
        )
    return note


_KITCHEN_NOTE = (
    "Gymnasium-Robotics' kitchen. As D4RL's public code has them: the 60 observations, their noise, goals, threshold, "
    "start, the four tasks, rewards by what remains to do, the end and the step limit. Not confirmed here: that meshes "
    "and joints of the two kitchens are the same, and scores of trained policies. The data's rewards are D4RL's own."
)


def _adroit_note(domain: str) -> str:
    mended = (
        "it goes on when the pen is dropped, which ends an episode in D4RL"
        if domain == "pen"
        else "it rewards the distance between palm and object, which D4RL punishes"
    )
    models = ", the object's model" if domain in ("pen", "hammer") else ""
    return (
        f"Gymnasium-Robotics' task, mended in one point: {mended}. Compared with D4RL's public code: reward, end, "
        f"start, observation, step limit{models}. Not confirmed here: scores of trained policies. {_OLD_ENGINE}"
    )


@dataclass(frozen=True)
class MinariTask:
    """What a Minari id is about: where its policies act, and the references that users ask for."""

    env_id: str
    """Gymnasium's or Gymnasium-Robotics' id; a data set's own record of its environment goes before it."""
    reference: str | None = None
    """The D4RL benchmark whose references scale returns; None: D4RL has none that would mean anything."""
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the environment without which the references mean nothing."""
    note: str = ""
    """How the task differs from that benchmark's, or why it has no references."""

    def fits(self, env_id: str | None, env_kwargs: Mapping[str, Any]) -> bool:
        """Whether returns in this environment, of any version, are what `reference` is about."""

        def same(given: Any, needed: Any) -> bool:
            return sorted(given) == sorted(needed) if isinstance(given, list | tuple) else bool(given == needed)

        if env_id is None or env_id.rsplit("-v", 1)[0] != self.env_id.rsplit("-v", 1)[0]:
            return False
        return all(same(env_kwargs.get(key), needed) for key, needed in self.env_kwargs.items())


_REMADE = "Minari's data are newly made on v5, not D4RL's"
_POINTMAZE = "PointMaze is another task than D4RL's maze2d (goals differ between episodes, radius .45)"
_GOES_ON = "Minari's AntMaze shows the goal, and its radius is .45 where D4RL's is .5"
_MINARI = {
    **{
        f"mujoco/{robot}/": MinariTask(f"{env[:-1]}5", f"{robot}-medium-v2", note=_REMADE)
        for robot, env in _LOCOMOTION.items()
    },
    "mujoco/ant/": MinariTask("Ant-v5", note="D4RL's Ant has 111 observations, today's has 105"),
    "mujoco/humanoid/": MinariTask("Humanoid-v5"),
    "mujoco/invertedpendulum/": MinariTask("InvertedPendulum-v5"),
    "mujoco/inverteddoublependulum/": MinariTask("InvertedDoublePendulum-v5"),
    "mujoco/pusher/": MinariTask("Pusher-v5"),
    "D4RL/pen/": MinariTask("AdroitHandPen-v1", "pen-human-v1", note="200 steps for D4RL's 100, dropped pens included"),
    **{
        f"D4RL/{task}/": MinariTask(
            f"AdroitHand{task.capitalize()}-v1", f"{task}-human-v1", note="the distance to the object counts otherwise"
        )
        for task in ("door", "hammer", "relocate")
    },
    **{
        f"D4RL/antmaze/{maze}-": MinariTask(
            f"AntMaze_{env}-v4", reference, {"continuing_task": False, "reset_target": False}, _GOES_ON
        )
        for maze, env, reference in (
            ("umaze", "UMaze", "antmaze-umaze-v2"),
            ("medium", "Medium", "antmaze-medium-play-v2"),
            ("large", "Large", "antmaze-large-play-v2"),
        )
    },
    **{
        f"D4RL/kitchen/{quality}-": MinariTask(
            "FrankaKitchen-v1",
            f"kitchen-{quality}-v0",
            {"tasks_to_complete": ["microwave", "kettle", tasks[0], tasks[1]]},
            "its observations and their noise are not D4RL's",
        )
        for quality, tasks in (
            ("complete", ("light switch", "slide cabinet")),
            ("partial", ("light switch", "slide cabinet")),
            ("mixed", ("bottom burner", "light switch")),
        )
    },
    **{
        f"D4RL/pointmaze/{maze}{'-dense' if dense else ''}-v": MinariTask(f"PointMaze_{env}{dense}-v3", note=_POINTMAZE)
        for maze, env in (("open", "Open"), ("umaze", "UMaze"), ("medium", "Medium"), ("large", "Large"))
        for dense in ("", "Dense")
    },
}
"""By the beginning of the id."""


def of_minari(dataset_id: str) -> MinariTask | None:
    """What one of Minari's own ids, `D4RL/...` or `mujoco/...`, is about; None: another's, or nothing is known."""
    return next((task for prefix, task in _MINARI.items() if dataset_id.startswith(prefix)), None)
