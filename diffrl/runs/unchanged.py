"""How long the policy of a run stays as it was at step 0: no evaluation till then is a best one."""

import math
from collections.abc import Callable

from diffrl.runs.kind import OFFLINE, ONLINE, SETTINGS
from diffrl.runs.online_config import OnlineConfig
from diffrl.runs.run import Run
from diffrl.support.schema import Natural, held
from diffrl.tuning import config as tuning


def unchanged_until(run: Run) -> int:
    """The last step at which the policy that acts has surely learned nothing in the run.

    Of an offline run its agent's `untrained_steps`, of an online one its warm-up and what is left of these, of a policy
    that is fine-tuned in an environment the iterations in which the critic learns alone; else 0.
    """
    if run.kind == OFFLINE:
        return run.config.agent.untrained_steps
    settings = run.settings or {}
    if run.kind == ONLINE:
        warm_up, updates = (_natural(run, name) for name in ("warm_up", "updates_per_step"))
        return warm_up + math.ceil(run.idle_updates() / max(1, updates))
    if run.kind not in tuning.ALGORITHMS:
        return 0
    return tuning.critic_alone(tuning.from_dict(settings, str(run.path)))


def _natural(run: Run, name: str) -> int:
    """A whole number of an online run's settings. Raises UserError for what is none."""
    value = (run.settings or {}).get(name, getattr(OnlineConfig, name))
    return int(held(value, Natural, f"{name} in {run.path / SETTINGS}"))


def unchanged(run: Run, step: int) -> str:
    """A sentence where a run that started from another one still has that one's policy at this step; else ""."""
    if run.kind == OFFLINE or run.teacher or step > (last := unchanged_until(run)):
        return ""
    if not last:
        return "At step 0 its policy is the one that it started with."
    why = "its critic learns alone (--critic-warm-up)"
    if run.kind == ONLINE:
        waits = f", and then its agent waits (--agent.{run.config.agent.waits_by.replace('_', '-')})"
        why = f"it only collects (--warm-up){waits * bool(run.idle_updates())}"
    return f"Up to step {last:,} its policy is the one that it started with, while {why}."


def tell_unchanged(run: Run, say: Callable[[str], None]) -> None:
    """Say so where evaluations in training will be of the policy that the run started with."""
    if run.task.env_id is not None and (said := unchanged(run, min(run.config.eval_every, run.config.steps))):
        say(f"{said} No evaluation up to there counts as its best.")
