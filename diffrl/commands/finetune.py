"""`diffrl finetune`."""

import dataclasses
import inspect
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from diffrl.commands import resume
from diffrl.commands.words import parse
from diffrl.images import rewards
from diffrl.images.config import ALGORITHMS, NOTHING, FinetuneConfig, implied, schema_of
from diffrl.images.config.algorithms import BackpropagationConfig, DPOConfig, SupervisedConfig
from diffrl.images.config.base import check_model, check_rank, is_builtin
from diffrl.images.config.pipelines import takes_prompts
from diffrl.images.launch import end_with_launcher, together
from diffrl.images.lists import metadata_rows, read_prompts
from diffrl.images.rewards.arguments import PROMPTS
from diffrl.images.rewards.registry import require_gradient
from diffrl.images.run import FILES
from diffrl.images.suited import refuse, refuse_human
from diffrl.support import folder
from diffrl.support.console import console
from diffrl.support.errors import UserError, closest

USAGE = """Fine-tune an image model, or a policy, on a reward.

  diffrl finetune                                       tiny-emoji on bluer paper, DRaFT: 2 minutes on a CPU
  diffrl finetune --algo ddpo-is --reward jpeg          smaller JPEGs: 4 minutes
  diffrl finetune --reward digit:8 --kl 0.12            all digits shall look like an 8, held to the reference
  diffrl finetune --algo draft --reward digit:8 --queries 1280
  diffrl finetune --model FOLDER-or-hub-id --prompts prompts.txt --reward aesthetic:FOLDER --device cuda
  diffrl finetune --algo dpo --pairs FOLDER --model ID
  diffrl finetune --algo supervised --data FOLDER --model ID
  diffrl resume runs/NAME [--steps N] [--device D]      go on, bit for bit, to N images scored (or N rounds) in all
  diffrl finetune policy runs/NAME --algo dppo          a trained policy, in its environment: see policy --help

Algorithms (--algo):
{algos}

Rewards (--reward), added up by " + ", each with a weight if wanted ("jpeg + 0.5*digit:8"):
{rewards}

The options below are those of --algo {algo}, their defaults those with --model {model}."""


def run(arguments: Sequence[str]) -> int:
    """Parse what stands after `diffrl finetune` and do it."""
    words = list(arguments)
    if words[:1] == ["policy"]:
        from diffrl.commands import finetune_policy

        return finetune_policy.run(words[1:])
    if words and not words[0].startswith("-"):
        meant = shlex.join(["diffrl", "finetune", "policy", *(words[1:] or ["RUN"])])
        near = closest(words[0], ["policy"]) and f"did you mean `{meant}`?"
        options = "options begin with --, such as --algo; of a policy: `diffrl finetune policy RUN`."
        raise UserError(f"There is no `diffrl finetune {words[0]}`: {near or options}")
    if resume.asked(words):
        return resume.spelled(words)
    try:
        config = _configuration(words)  # what is wrong is said once, and not by every process
    except UserError:
        given = _options(words)
        schema = ALGORITHMS.get(_algo(given))
        if schema is not None and set(given) <= {one.name for one in dataclasses.fields(schema)}:
            for name in ("reward", "held_out"):  # what names nothing comes before numbers
                if (text := given.get(name, "")) not in ("", NOTHING) and not text.startswith("-"):
                    rewards.check(text, f"--{name.replace('_', '-')}")
            _refuse_pipeline(schema, given.get("model", schema.model), given)  # which comes first
        raise
    folder.refuse(config.out, FILES)
    for note in [] if config.scored_by is None else rewards.refused(config.scored_by):
        console.print(note, style="yellow", markup=False)
    refuse_unknown(config)
    from diffrl.images.job import finetune

    if not spread(config.processes, ["finetune", *words]):
        finetune(config)
    return 0


def _refuse_pipeline(schema: type[FinetuneConfig], model: str, given: Collection[str]) -> None:
    """Raise UserError for a pipeline that there is not, or without prompts. given: the options that are."""
    if is_builtin(model):
        return
    check_model(model)
    if schema is not SupervisedConfig and not {"prompts", "pairs", "data"}.intersection(given) and takes_prompts(model):
        raise UserError(f"Which prompts? {model} needs --prompts FILE, one a line.")


def refuse_unknown(config: FinetuneConfig) -> None:
    """Raise UserError for a reward, a model or a file that does not exist, before torch and diffusers are imported."""
    prompts: list[str] = []
    for option in ("prompts", "adapter", "pairs", "data"):
        path = getattr(config, option, None)
        if path not in (None, "digits") and not Path(path).exists():
            raise UserError(f"--{option}: there is nothing at {path}. Check the path.")
        if path is not None and option == "prompts":
            prompts = read_prompts(path)[0]
        elif path not in (None, "digits") and option in ("pairs", "data"):
            metadata_rows(Path(path))
    for option, reward in (("--reward", config.scored_by), ("--held-out", config.held_out)):
        if reward in (None, NOTHING):
            continue
        for _, entry, argument in rewards.check(str(reward), option):
            name = entry.usage.partition("[")[0]
            if not argument and name in PROMPTS:
                _check_prompts(prompts, f"--prompts {config.prompts}", option, name)
    if isinstance(config, BackpropagationConfig):
        require_gradient(config.reward, config.algo)
    refuse_human(config)
    check_model(config.model)
    told = [name for name in ("prompts", "pairs", "data") if getattr(config, name, None) not in (None, "digits")]
    _refuse_pipeline(type(config), config.model, told)
    refuse(config)
    check_rank(config)


def _check_prompts(prompts: Sequence[str], source: str, option: str, reward: str) -> None:
    """Raise UserError where one of the prompts of `source` is none that a reward, which reads it, can take."""
    for prompt in prompts:
        try:
            PROMPTS[reward](prompt)
        except UserError as error:
            raise UserError(f"{source} has a prompt that {option} {reward} cannot take: {error}") from error


def _algo(given: Mapping[str, str]) -> str:
    """The algorithm that the options ask for."""
    return str({"algo": FinetuneConfig.algo, **implied(given, is_builtin), **given}["algo"])


def _configuration(words: Sequence[str]) -> FinetuneConfig:
    """The configuration that the words ask for. Raises UserError for an option that the algorithm does not have.

    With --help the options are printed instead, and the defaults shown are what the other words make of them.
    """
    given = _options(words)
    schema = schema_of(_algo(given))
    known = {name for other in ALGORITHMS.values() for name in other.options()}
    for name in known.intersection(given):
        schema.require(name)

    def parsed(words: Sequence[str], default: FinetuneConfig, description: str = "") -> FinetuneConfig:
        return parse(schema, words, "diffrl finetune", default=default, description=description)

    rest = [word for word in words if word not in ("-h", "--help")]
    model = given.get("model", schema.model)
    if schema is DPOConfig and "pairs" in given:  # a default that was typed is refused, too
        DPOConfig.refuse_of_sampled(given)
    values = parsed(rest, schema(model=model))
    # Made of what was given alone: some defaults depend on other fields.
    config = schema(**{name: getattr(values, name) for name in known.intersection(given)})
    return config if len(rest) == len(words) else parsed(["--help"], config, _usage(config))


def _options(words: Sequence[str]) -> dict[str, str]:
    """The options among the words, as fields are named, and the word that follows each."""
    found = {}
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found[name.replace("-", "_").removeprefix("no_")] = value if equals else following
    return found


def _usage(config: FinetuneConfig) -> str:
    """The text above the options that --help prints."""
    width = max(len(name) for name in ALGORITHMS)
    about = {name: (inspect.getdoc(schema) or "").splitlines()[0].rstrip(".") for name, schema in ALGORITHMS.items()}
    return USAGE.format(
        algos="\n".join(f"  {name:{width}}  {text}" for name, text in about.items()),
        rewards="\n".join(f"  {line}" for line in rewards.listing().splitlines()),
        algo=config.algo,
        model=config.model,
    )


def spread(processes: int, words: Sequence[str]) -> bool:
    """Run `diffrl WORDS` in several processes and wait for them; False where there is one, or this is one of them.

    Raises what `together` does: they were stopped, or one of them failed, as it has said.
    """
    end_with_launcher()
    if processes == 1 or "WORLD_SIZE" in os.environ:
        return False
    together(processes, ["-m", "diffrl", *words])
    return True
