"""The rewards that have a name: how each is written, and a line of help. No torch."""

REWARDS: dict[str, tuple[str, str]] = {
    "jpeg": ("jpeg[:QUALITY]", "compressibility: -kB of the JPEG's scan, quality 95"),
    "jpeg-file": ("jpeg-file[:QUALITY]", "-kB of the whole JPEG file, as DDPO"),
    "incompressible": ("incompressible[:QUALITY]", "the negative of jpeg"),
    "png": ("png", "-kB of the PNG's data: another codec, to hold out"),
    "digit": ("digit[:D]", "probability of the digit D, or of the prompt's"),
    "digit-held-out": ("digit-held-out[:D]", "the same by another network, on other data"),
    "classifier": (
        "classifier:PATH[#LABEL]",
        "log-probability of LABEL, or of the prompt, by a transformers image classifier",
    ),
    "classifier-probability": ("classifier-probability:PATH[#LABEL]", "the probability itself"),
    "clip": ("clip:PATH", "100 cos of CLIP's image and prompt"),
    "pickscore": ("pickscore:PATH", "PickScore: exp(logit scale) cos"),
    "hps": ("hps:PATH", "HPSv2: cos"),
    "aesthetic": ("aesthetic:PATH[#HEAD]", "LAION's aesthetic predictor on CLIP"),
    "imagereward": ("imagereward:PATH", "ImageReward: BLIP and a head"),
    "richhf": ("richhf:PATH[#WEIGHT]", "rich feedback: overall score less WEIGHT (1) times the artifact map's mean"),
    "python": ("python:FILE.py#NAME", "a function of yours"),
    "remote": ("remote:URL", "a scorer over HTTP and JSON (python -m diffrl.images.rewards.serve)"),
}


def listing() -> str:
    """A line each, for --help."""
    width = max(len(usage) for usage, _ in REWARDS.values())
    return "\n".join(f"{usage:{width}}  {line}" for usage, line in REWARDS.values())


COMPANIONS = {"jpeg": "png", "jpeg-file": "png", "incompressible": "-1*png", "digit": "digit-held-out"}
"""What to look at while another is trained on: the same, by other means."""


def companion(spec: str) -> str | None:
    """The held-out reward of one that has a companion, of the same digit; else None."""
    name, colon, argument = spec.partition(":")
    found = COMPANIONS.get(name)
    return found if found is None or name != "digit" else found + colon + argument
