"""Benchmarks: ids, reference scores, environments, data generators. Importing it registers our environments.

`import envs; gymnasium.make("maze2d-umaze-v1")`, or in one step, `gymnasium.make("envs:maze2d-umaze-v1")`. (Gymnasium's
entry point for plugins is gone since its version 1.0.)
"""

import gymnasium

__part_of__ = "diffrl"  # `diffrl.support.shadowing` looks for this line


def register() -> None:
    """Register the environments of D4RL's benchmarks and of OGBench's with Gymnasium, under their ids."""
    from gymnasium.envs.registration import registry

    limits = {"open": ("v0", 150), "umaze": ("v1", 300), "medium": ("v1", 600), "large": ("v1", 800)}
    for maze, (version, steps) in limits.items():
        for reward, infix in (("sparse", ""), ("dense", "-dense")):
            env_id = f"maze2d-{maze}{infix}-{version}"
            if env_id not in registry:
                gymnasium.register(
                    env_id,
                    entry_point="envs.maze2d:Maze2dEnv",
                    kwargs={"maze": maze, "reward": reward},
                    max_episode_steps=steps,
                )
    for maze, steps in {"umaze": 700, "medium": 1000, "large": 1000}.items():
        for kind in ("", "-diverse") if maze == "umaze" else ("-play", "-diverse"):
            for version in ("v0", "v2"):
                env_id = f"antmaze-{maze}{kind}-{version}"
                if env_id not in registry:
                    gymnasium.register(
                        env_id, entry_point="envs.antmaze:AntMazeEnv", kwargs={"maze": maze}, max_episode_steps=steps
                    )
    for tasks in ("complete", "partial", "mixed"):
        if (env_id := f"kitchen-{tasks}-v0") not in registry:
            gymnasium.register(
                env_id, entry_point="envs.kitchen:KitchenEnv", kwargs={"tasks": tasks}, max_episode_steps=280
            )
    for task in ("pen", "door", "hammer", "relocate"):
        for quality in ("human", "cloned", "expert"):
            for version in ("v0", "v1"):
                if (env_id := f"{task}-{quality}-{version}") not in registry:
                    gymnasium.register(
                        env_id,
                        entry_point="envs.adroit:AdroitEnv",
                        kwargs={"task": task},
                        max_episode_steps=100 if task == "pen" else 200,
                    )
    from envs.ogbench import worlds

    worlds.register()


register()
