"""The model card of an exported policy: Markdown with the front matter that the Hugging Face Hub reads."""

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffrl.data.observations import Part
from diffrl.runs import config as configuration
from diffrl.runs import packages
from diffrl.runs.config import TrainConfig
from diffrl.runs.diverged import diverged
from diffrl.runs.kind import OFFLINE, ONLINE
from diffrl.runs.online_config import OnlineConfig
from diffrl.runs.run import Run
from diffrl.support.files import to_yaml
from diffrl.support.machine import versions
from diffrl.support.statistics import estimate
from diffrl.training.logs import Scores, returns_of
from diffrl.tuning import config as tuning
from diffrl.tuning.distil_config import DISTIL, DistilConfig
from envs import registry
from envs.datasets import FILE_SUFFIXES, called
from envs.task import benchmark_family, references_of, score_word

FEW_SEEDS = 5
"""Fewer seeds than these say little of the spread."""
_FILLED = ("offline_run", "start_run", "start_steps", "reward_shift", "reward_scale")
"""Settings of a run that started from another one that are filled in, or are a path."""


@dataclass(frozen=True)
class Scored:
    """Episodes that were measured, of the run's seeds in their order."""

    what: str
    """When, and on which episodes, in words."""
    outcomes: NDArray[np.float64]
    """Returns (S, E), or returns and successes (S, E, 2)."""


@dataclass(frozen=True)
class Facts:
    """What the card says that the run's folder does not."""

    run: Run
    seed: int
    """The seed that was exported."""
    which: str
    """The checkpoint that was asked for: last, best, or a step."""
    step: int
    scores: Sequence[Scored]
    trained_with: Mapping[str, str] = field(default_factory=dict)
    """The versions of packages when training began, by name."""
    graph: str = ""
    """How the ONNX graph is called, in Markdown; "": there is none."""
    parts: Sequence[Part] = ()
    """The arrays that the environment gives as an observation; (): it gives vectors, or is not known."""


def without_paths(value: Any) -> Any:
    """The value with each absolute path in it cut to its last part: paths of a machine are nobody else's business."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, str):
        if value.startswith(("/", "~", "file:")) or PureWindowsPath(value).drive:
            return PurePosixPath(value.replace("\\", "/")).name or "."
        return value
    if isinstance(value, Mapping):
        return {str(key): without_paths(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(part) for part in value]
    return value


# --- the command ----------------------------------------------------------------------------------------------------


def train_words(config: TrainConfig) -> list[str]:
    """The words after `diffrl` that begin a run with this configuration, wherever its data are here.

    What the machine chose, such as compiling, is left to the next machine; but not the number of processes that share
    several seeds, on which the seeds' scores depend.
    """
    config = dataclasses.replace(config, dataset=called(config.dataset))
    base, _ = configuration.default(config.agent.name, config.dataset)
    words = ["train", "--agent", config.agent.name, "--dataset", config.dataset]
    for prefix, ours, theirs in (("--", config, base), ("--agent.", config.agent, base.agent)):
        skipped = (*configuration.MACHINE, "dataset", "agent") if prefix == "--" else ()
        words += _options(prefix, ours, theirs, skipped)
    return words + (_option("--workers", config.workers) if _shared(config) else [])


def _shared(config: TrainConfig) -> bool:
    """Whether a seed's scores depend on the number of processes that share the seeds: they are drawn for together."""
    return len(config.seeds) > 1 and config.workers is not None


def start_words(run: Run) -> list[str]:
    """The words that began a run which is not offline: from another run, `RUN` in them, or from a configuration."""
    settings = dict(run.settings or {})
    algo = settings.pop("algo", None)
    schema: Any = {ONLINE: OnlineConfig, DISTIL: DistilConfig}.get(run.kind) or tuning.get(str(algo))
    ours = {f.name: settings[f.name] for f in dataclasses.fields(schema) if f.name in settings}
    verb = ["finetune", "policy", "RUN", "--algo", str(algo)]
    words = [run.kind, _untrained_from(run) or "RUN"] if run.kind in (ONLINE, DISTIL) else verb
    for name in ("steps", "seeds", "eval_every", "eval_episodes"):
        words += _option(f"--{name}", getattr(run.config, name))
    for entry in dataclasses.fields(schema):
        if entry.name in ours and entry.name not in _FILLED and ours[entry.name] != entry.default:
            words += _option(f"--{entry.name}", ours[entry.name])
    return words


def _untrained_from(run: Run) -> str:
    """The configuration whose agents an online run began with, untrained, as its command names it; else ""."""
    name = str((run.settings or {}).get("offline_run", "")) if run.kind == ONLINE else ""
    # A run's folder may be gone by now, so what the name was is told by the name.
    configures = name.endswith((".yaml", ".yml")) or configuration.ships(name)
    return str(without_paths(name)) if configures and not Path(name).is_dir() else ""


def _options(prefix: str, ours: Any, theirs: Any, skipped: Sequence[str]) -> list[str]:
    """The options that say in what a configuration differs from another one of its class."""
    words: list[str] = []
    for entry in dataclasses.fields(ours):
        value = getattr(ours, entry.name)
        if entry.name not in skipped and value != getattr(theirs, entry.name):
            words += _option(f"{prefix}{entry.name}", value)
    return words


def _option(flag: str, value: Any) -> list[str]:
    flag = flag.replace("_", "-")
    if isinstance(value, bool):
        prefix, _, name = flag.rpartition("." if "." in flag else "--")
        dot = "." if "." in flag else "--"
        return [flag if value else f"{prefix}{dot}no-{name}"]
    if isinstance(value, list | tuple):
        return [flag, *(str(without_paths(part)) for part in value)]
    return [flag, str(without_paths(value))]


# --- the card -------------------------------------------------------------------------------------------------------


def card(facts: Facts) -> str:
    """The text of `README.md`: front matter, how to use the policy, how good it is, what it learned from and how."""
    run = facts.run
    config, task = run.config, run.task
    dataset = str(without_paths(called(config.dataset)))
    env = without_paths(task.env_text)
    sections = [
        f"---\n{to_yaml(_front_matter(facts, dataset))}---",
        f"# {config.agent.name} on {dataset}",
        f"A policy that diffrl {_trained(run)}: agent "
        f"`{config.agent.name}`, seed {facts.seed}, after {facts.step:,} steps. It takes observations of "
        f"{run.observation_size} numbers and gives actions of {run.action_size}, both in the units of its environment"
        f"{f', `{env}`' if task.env_id else ''}.",
        "## Use",
        _use(facts),
        "## Scores",
        *_scores(facts),
        "## Data",
        _data(run, dataset),
        "## Training",
        _training(facts),
        "## Caveats",
        "\n".join(f"- {sentence}" for sentence in caveats(facts)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _trained(run: Run) -> str:
    if _untrained_from(run):
        return "trained online, beside offline data"
    if run.kind == DISTIL:
        return f"distilled from a trained policy{f' of the agent `{run.teacher}`' if run.teacher else ''}"
    after = {OFFLINE: "", ONLINE: " and then online"}.get(run.kind, f" and then fine-tuned by {run.kind}")
    return f"trained offline{after}"


def _front_matter(facts: Facts, dataset: str) -> dict[str, Any]:
    run = facts.run
    name = f"{run.config.agent.name}-{re.sub(r'[^0-9A-Za-z._-]+', '-', dataset)}"
    tags = ["reinforcement-learning", "offline-reinforcement-learning", "diffrl", run.config.agent.name, dataset]
    matter: dict[str, Any] = {
        "library_name": "diffrl",
        "pipeline_tag": "reinforcement-learning",
        "tags": list(dict.fromkeys(tags)),
    }
    if facts.scores:
        place = run.config.seeds.index(facts.seed)
        outcomes = facts.scores[-1].outcomes[place : place + 1]  # of what is here; the text has the mean over seeds
        env = run.task.env_id or "none"
        of = f", seed {facts.seed} alone (standard error over episodes)"
        metrics = [_metric("mean_return", f"Mean return{of}", returns_of(outcomes))]
        if run.task.reference:
            kind = "success_rate" if run.task.scored_by_success else "normalized_score"
            word = score_word(run.task.reference)
            metrics.append(_metric(kind, word[0].upper() + word[1:] + of, run.task.score(outcomes)))
        kind = "reinforcement-learning"
        result = {"task": {"type": kind, "name": kind}, "dataset": {"name": env, "type": env}, "metrics": metrics}
        matter["model-index"] = [{"name": name, "results": [result]}]
    return matter


def _metric(kind: str, name: str, values: NDArray[np.float64]) -> dict[str, Any]:
    found = estimate(values)
    spread = "" if np.isnan(found.error) else f" +/- {found.error:.2f}"
    return {"type": kind, "value": f"{found.mean:z.2f}{spread}", "name": name, "verified": False}


def _use(facts: Facts) -> str:
    plans = facts.run.config.agent.plans
    reset = "\npolicy.reset()  # where an episode begins: it follows its plan from call to call" if plans else ""
    sizes = f"({facts.run.observation_size},) -> ({facts.run.action_size},)"
    needs = packages.of_agent(facts.run.config.agent.name)
    text = f"""{f"Needs: {needs}, which brings the agent, beside diffrl.{_GAP}" if needs else ""}```python
import diffrl

policy = diffrl.load_policy("FOLDER")  # this folder; or the Hub's id, "user/name"{reset}
action = policy(observation)  # NumPy, {sizes}, or many in rows
```"""
    if facts.parts:
        text += _GAP + _flattened(facts.parts)
    return f"{text}{_GAP}{facts.graph}" if facts.graph else text


_GAP = "\n\n"


def _flattened(parts: Sequence[Part]) -> str:
    """How the environment's observations make the vector that the policy was trained on, a sentence or two."""
    if not parts[0].path:
        return f"The environment's observations, {parts[0].shape}, are flattened: `observation.reshape(-1)`."
    what = "a dictionary" if isinstance(parts[0].path[0], str) else "a tuple"
    return (
        f"The environment's observations are {what}, which `policy` takes as it is, with many rows in each part, too. "
        f"As a vector its parts are flattened and joined in this order: {', '.join(map(str, parts))}."
    )


def _scores(facts: Facts) -> list[str]:
    run = facts.run
    if not facts.scores:
        why = "has no environment" if run.task.env_id is None else "was not evaluated at this step"
        return [f"None: the run {why}."]
    seeds = run.config.seeds
    word = "success x100" if run.task.scored_by_success else "score x100"
    head = ["measured", "seed", "episodes", "return"] + ([word] if run.task.reference else [])
    rows = [head, ["---"] * len(head)]
    for measured in facts.scores:
        for i, seed in enumerate(seeds):
            mark = " (this one)" if seed == facts.seed else ""
            rows.append(_row(run, measured, f"{seed}{mark}", measured.outcomes[i : i + 1]))
        if len(seeds) > 1:
            rows.append(_row(run, measured, "all", measured.outcomes))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    over = "a seed's is over its episodes" + (", that of all is over the seeds" if len(seeds) > 1 else "")
    text = f"± is the standard error of the mean: {over}."
    if run.task.reference and run.task.scored_by_success:
        text += f" A score is the share of episodes that succeed, x100, as {run.task.reference} counts."
    elif run.task.reference:
        low, high = registry.get(run.task.reference).reference_scores or (0.0, 1.0)
        text += (
            f" Scores are 100 (return - {low:g}) / ({high:g} - {low:g}), by the references of "
            f"{run.task.reference if run.task.comparable else benchmark_family(run.task.reference)}."
        )
    return [table, text]


def _row(run: Run, measured: Scored, seed: str, outcomes: NDArray[np.float64]) -> list[str]:
    scores = [estimate(run.task.score(outcomes)).explained] if run.task.reference else []
    return [measured.what, seed, f"{outcomes.shape[1]:,}", estimate(returns_of(outcomes)).explained, *scores]


def _data(run: Run, dataset: str) -> str:
    config = run.config
    if registry.known(dataset):
        benchmark = registry.get(dataset)
        source = f"the benchmark's{f', {benchmark.url}' if benchmark.url else ''}"
        if package := packages.of_data(dataset):
            source = f"the package {package}, which makes or fetches it"
        elif benchmark.generated:
            own = f"the benchmark's own file{f' ({benchmark.url})' if benchmark.url else ''}"
            source = f"rebuilt by `diffrl data generate`, unless {own} lay in its place"
    elif Path(config.dataset).is_absolute() or Path(dataset).suffix in FILE_SUFFIXES:
        source = "a file of whoever trained it"
    else:
        source = f"`{dataset}`, by its id (Minari's or another package's)"
    lines = [
        f"- Data set: `{dataset}`; source: {source}.",
        f"- Rows: {'all' if config.rows is None else f'the first {config.rows:,}'}.",
        f"- Fingerprint (SHA-256 of its arrays, as diffrl reads them): `{run.fingerprint}`.",
    ]
    return "\n".join(lines)


def _training(facts: Facts) -> str:
    run = facts.run
    settings = {
        key: value for key, value in configuration.to_dict(run.config).items() if key not in configuration.MACHINE
    }
    settings["dataset"] = called(run.config.dataset)
    if run.kind == OFFLINE and _shared(run.config):
        settings["workers"] = run.config.workers
    if run.kind == OFFLINE:
        begun = f"```sh\ndiffrl {shlex.join(train_words(run.config))}\n```"
    else:
        begun = f"{_began(facts)}\n\n```sh\ndiffrl {shlex.join(start_words(run))}\n```"
        own = {key: value for key, value in dict(run.settings or {}).items() if key not in ("offline_run", "start_run")}
        settings["settings"] = own
    others = dict.fromkeys((packages.of_agent(run.config.agent.name), packages.of_data(called(run.config.dataset))))
    made = ", ".join([*(f"{name} {version}" for name, version in versions().items()), *filter(None, others)])
    then = ", ".join(f"{name} {version}" for name, version in facts.trained_with.items())
    then = f" When training began: {then}." if then else ""
    plain = to_yaml(without_paths(settings)).rstrip()
    return f"{begun}\n\nAll settings:\n\n```yaml\n{plain}\n```\n\nVersions when it was exported: {made}.{then}"


def _began(facts: Facts) -> str:
    """What a run that is not offline began with, a sentence or two."""
    run = facts.run
    if configured := _untrained_from(run):
        whose = "" if configuration.ships(configured) else ", a file of whoever trained it"
        return f"It began untrained, from the configuration `{configured}`{whose}."
    if run.kind != DISTIL:
        return "It started from another run, RUN, whose own command is not recorded here."
    steps = list((run.settings or {}).get("start_steps") or [])
    place = run.config.seeds.index(facts.seed)
    after = f", after {steps[place]:,} steps" if place < len(steps) else ""
    name = run.teacher
    kept = "Its settings stand below as `settings.teacher`; the" if name else "The"
    return (
        f"Its teacher is the policy{f' of the agent `{name}`' if name else ''} of another run, RUN{after}. {kept} "
        "command that trained it is not recorded here."
    )


def _learned_from(run: Run) -> str:
    """What a policy learned from and where it was tried, a sentence."""
    tested = run.task.env_id is not None
    tuned = tuning.from_dict(run.settings or {}, str(run.path)) if run.kind in tuning.ALGORITHMS else None
    if run.kind == ONLINE or (tuned is not None and tuning.acts(tuned)):
        return (
            "Learned in simulation, as well as from data, it is tested in simulation only, in the environment that it "
            "learned in, and not where observations differ from that environment's."
        )
    learned = {
        OFFLINE: "Learned from data alone",
        DISTIL: "Learned from its teacher, in states of the data",
        tuning.NFTConfig.algo: "Fine-tuned by its critics' values of its own actions, in states of the data",
    }
    what = learned.get(run.kind, "Fine-tuned from preferences between segments of data")
    if not tested:
        return f"{what}, it is untested. Least is known of it where observations differ from its data's."
    return f"{what}, it is tested in simulation only, and not where observations differ from its data's."


def caveats(facts: Facts) -> list[str]:
    """What a reader should know before trusting a score, or using the policy: a sentence or two each."""
    run, task, n = facts.run, facts.run.task, len(facts.run.config.seeds)
    found: list[str] = []
    if said := diverged(run):
        found.append(f"**{said}**")
    if untrained := run.untrained(facts.step):
        found.append(f"**{untrained}** This is the policy after step {facts.step:,}: it has learned nothing.")
    if facts.scores:
        if facts.which == "best":
            found.append(
                Scores(run.path, {}).all_equal()
                or "The checkpoint was chosen by its own evaluation during training, the best of several: scores "
                "measured then are optimistic."
            )
        if n < FEW_SEEDS:
            found.append(f"{n} seed{'s' * (n > 1)}: too few to say much of the spread over seeds.")
        if task.scored_by_success and not task.comparable:
            found.append("Data or environment are not the benchmark's own: scores do not compare with published ones.")
        elif task.reference and not task.comparable:
            family, of = benchmark_family(task.reference), references_of(task.reference)
            found.append(
                f"Scores are scaled by {of}'s references for {family}, but data or environment are not {of}'s: they do "
                "not compare with published ones."
            )
    if n > 1:
        found.append(f"Of the run's seeds, seed {facts.seed} is here; it was taken for its number, not for its score.")
    if task.reference and (note := registry.get(task.reference).note):
        found.append(f"{task.reference}: {note.rstrip('.')}.")
    if run.config.agent.plans:
        found.append("It follows a plan: call `policy.reset()` where an episode begins.")
    if run.config.agent.policy_kind not in ("deterministic", "planner"):
        found.append("Actions are sampled: two calls on one observation differ.")
    found.append(_learned_from(run))
    return found
