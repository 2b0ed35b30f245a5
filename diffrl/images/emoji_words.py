"""The prompts of tiny-emoji: an object, or a colour and an object. Imports no torch, so that --help may read it."""

import difflib

from diffrl.support.errors import UserError

OBJECTS = (
    "heart",
    "star",
    "apple",
    "car",
    "fish",
    "cat",
    "tree",
    "mushroom",
    "flower",
    "balloon",
    "frog",
    "crown",
)
"""What there is a picture of, in the order of the classes."""
COLOURS = ("red", "yellow", "green", "blue", "purple", "pink")
"""What an object may be painted in; without one it has its own colours."""
PROMPTS = tuple(f"{colour} {name}".strip() for name in OBJECTS for colour in ("", *COLOURS))
"""All prompts, object by object; a prompt's place is the number of its class."""


def words_of(prompt: str) -> tuple[int | None, int]:
    """The colour (its place in COLOURS; None: the object's own) and the object (in OBJECTS) of a prompt.

    "a blue heart" is "blue heart". Raises UserError for other words, naming the nearest that are known.
    """
    words = prompt.lower().split()
    words = words[1:] if words[:1] in (["a"], ["an"], ["the"]) else words
    expected = "expected an object, or a colour and an object, such as 'heart' or 'blue heart'"
    if not 1 <= len(words) <= 2:
        raise UserError(f"{prompt!r} is no prompt of tiny-emoji: {expected}.")
    if words[-1] not in OBJECTS:
        near = difflib.get_close_matches(words[-1], OBJECTS, n=1, cutoff=0.75)  # a slip of the keys: "dog" is no frog
        meant = f"did you mean {near[0]!r}?" if near else f"the objects: {', '.join(OBJECTS)}."
        raise UserError(f"tiny-emoji knows no {words[-1]!r}; {meant}")
    if len(words) == 2 and words[0] not in COLOURS:
        raise UserError(f"tiny-emoji knows no colour {words[0]!r}; the colours: {', '.join(COLOURS)}.")
    return COLOURS.index(words[0]) if len(words) == 2 else None, OBJECTS.index(words[-1])


def class_of(prompt: str) -> int:
    """The number of a prompt's class: its place in PROMPTS. Raises UserError as `words_of`."""
    colour, thing = words_of(prompt)
    return thing * (1 + len(COLOURS)) + (0 if colour is None else 1 + colour)
