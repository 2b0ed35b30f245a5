"""Benchmarks: ids, reference scores, environments, data generators. Importing it registers our environments.

`import envs; gymnasium.make("maze2d-umaze-v1")`, or in one step, `gymnasium.make("envs:maze2d-umaze-v1")`. (Gymnasium's
entry point for plugins is gone since its version 1.0.)
"""

import gymnasium

__part_of__ = "diffrl"  # `diffrl.support.shadowing` looks for this line


def register() -> None:
    """Register the maze2d and OGBench environments with Gymnasium."""
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
    from envs.ogbench import worlds

    worlds.register()


register()
