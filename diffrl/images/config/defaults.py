"""What a fine-tuning run is of which nothing is said: the settings of a first look."""

from collections.abc import Callable, Mapping
from typing import Any

from diffrl.images.distil_config import sampled_by
from diffrl.images.rewards.base import asks_a_person
from diffrl.images.rewards.registry import named_in
from diffrl.support.errors import UserError, shown

FIRST_LOOK: Mapping[str, Any] = {
    "algo": "draft",
    "reward": "colour:blue + emoji",
    "held_out": "emoji-held-out",
    "queries": 640,
    "updates": 8,
    "lr": 1e-4,
    "kl": 0.5,
}
"""What a run is that is told neither a reward nor a model, nor another algorithm: something that a person can see."""


VOTED = 1024
"""Images that DiffusionNFT scores by default where a person votes on a built-in model's: 64 choices, four a round."""


def of_digits(reward: object) -> bool:
    """Whether a reward looks at handwritten digits."""
    return isinstance(reward, str) and not named_in(reward).isdisjoint(("digit", "digit-held-out"))


def implied(given: Mapping[str, Any], builtin: Callable[[str], bool]) -> Mapping[str, Any]:
    """What the options given ask for without saying so: an algorithm, or a whole first look. What they say is kept.

    A person votes between images of one prompt, of which DiffusionNFT's rounds have groups; it also learns from the
    images of a model that is sampled without noise. builtin: whether a model's name is that of one of ours. Raises
    UserError for a reward that is an object: a run's folder holds its name alone.
    """
    for name in ("reward", "held_out"):
        if not isinstance(given.get(name), str | int | float | None):
            raise UserError(
                f"{name} is {shown(given[name])}; expected text, by which a run is resumed: a function or an object of "
                f'yours is named by its file, {name}="python:FILE.py#NAME", or by an entry point of diffrl.rewards.'
            )
    reward, model, algo = given.get("reward"), given.get("model"), given.get("algo", "nft")
    if isinstance(reward, str) and asks_a_person(reward) and algo == "nft":
        return {"algo": "nft", **({"queries": VOTED} if not isinstance(model, str) or builtin(model) else {})}
    if isinstance(model, str) and sampled_by(model).get("eta") == 0 and "algo" not in given:
        return {"algo": "nft"}
    return first_look(given)


def first_look(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the options given leave to `FIRST_LOOK`; nothing where they name what the run is. What they say is kept.

    A reward of digits that is held out names tiny-digits.
    """
    other = given.get("algo", FIRST_LOOK["algo"]) != FIRST_LOOK["algo"]
    if other or {"reward", "model"} & given.keys() or of_digits(given.get("held_out")):
        return {}
    idle = {"kl"} if given.get("eta") == 0 else set()  # a chain without noise has no divergence
    batch = given.get("batch")
    if isinstance(batch, int) and batch < FIRST_LOOK["updates"]:
        idle.add("updates")  # each needs an image
    return {name: value for name, value in FIRST_LOOK.items() if name not in idle}
