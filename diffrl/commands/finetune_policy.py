"""`diffrl finetune policy`: fine-tune a run's policy by DPPO, DiffusionNFT or preference DPO."""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

import agents
from diffrl.commands import resume
from diffrl.commands.words import parse, take
from diffrl.runs.config import RunOptions
from diffrl.support import folder
from diffrl.support.errors import UserError
from diffrl.tuning import config as tuning
from diffrl.tuning.config import DPOConfig, DPPOConfig, NFTConfig, TuningConfig

USAGE = """Fine-tune a run's policy on its denoising chain: in its environment, or from preferences.

  diffrl finetune policy runs/NAME                       DPPO: PPO over the denoising steps, in the environment
  diffrl finetune policy runs/NAME --tuned-steps 3       the last 3 denoising steps alone
  diffrl finetune policy runs/NAME --algo nft            DiffusionNFT: no log-probabilities, any sampler
  diffrl finetune policy runs/NAME --algo nft --advantages critics    by the run's own critics, without acting
  diffrl finetune policy runs/NAME --algo dpo            preferences between segments of the run's own data
  diffrl finetune policy runs/NAME --algo dpo --preferences pairs.safetensors
  diffrl resume runs/TUNED [--steps N]

Makes a run of its own, which `diffrl evaluate` and `load_policy` take like any other; its step 0 is the policy as it
came. Agents for dppo: {chain}; for dpo: these, {solver}; for nft: {forward}.
Options below are those of --algo {algo}; {other} --help shows the others'."""


@dataclass(frozen=True)
class _Options(RunOptions):
    steps: int | None = None
    """dppo, nft: environment steps of each seed, by default 400,000, rounded up to whole iterations; dpo: updates, by
    default 1,000; nft with --advantages critics: updates, by default 2,000."""
    eval_every: int | None = None
    """Steps between evaluations, each followed by a checkpoint; by default a tenth of the steps."""
    log_every: int | None = None
    """Where steps are updates: those between rows of metrics.csv; by default the run's. What acts to learn writes one
    an iteration."""
    compile: tyro.conf.Suppress[bool | None] = None


@dataclass(frozen=True)
class FinetunePolicy:
    """The options that all algorithms share."""

    run_folder: Annotated[Positional[Path], tyro.conf.arg(name="run", metavar="RUN")]
    """The folder of the run whose policy is fine-tuned."""
    run: OmitArgPrefixes[_Options] = _Options()
    algo: Literal["dppo", "nft", "dpo"] = "dppo"
    """dppo: PPO over the denoising steps, in the environment. nft: DiffusionNFT, in the environment or by critics.
    dpo: from preferences. The learning options are those of this one."""

    def start(self, settings: TuningConfig, given: Collection[str]) -> int:
        """Fine-tune the run's policy as the algorithm's settings say; give the exit code. given: the fields named."""
        from diffrl.runs.kind import FILES, agent_of, environment_of, refuse_frozen, require_checkpoint, require_policy

        require_policy(self.run_folder)
        agent = agent_of(self.run_folder)
        # What raises, before torch is imported: first what no other option would help.
        tuning.refuse_agent(settings.algo, agent)
        tuning.refuse_no_environment(settings, self.run_folder, environment_of(self.run_folder))
        refuse_frozen(self.run_folder)
        require_checkpoint(self.run_folder, settings.start_checkpoint)
        settings.refuse_unused(given)
        tuning.refuse_idle(settings, agent, self.run.log_every)
        tuning.refuse_steps(settings, tuning.default_steps(settings) if self.run.steps is None else self.run.steps)
        if isinstance(settings, DPPOConfig):
            settings.refuse_chain(agent)
        if isinstance(settings, DPOConfig):
            settings.refuse_file()
        folder.refuse(self.run.out, FILES)
        from diffrl.runs.tune import finetune_policy

        options = {f.name: getattr(self.run, f.name) for f in dataclasses.fields(RunOptions)}
        finetune_policy(dataclasses.replace(settings, start_run=self.run_folder), **options)
        return 0


# Where a run starts from is said once, as the folder; and what is filled in is not asked for.
_Start = tyro.conf.Suppress[Path]
_Steps = tyro.conf.Suppress[tuple[int, ...]]


@dataclass(frozen=True)
class _DPPO(DPPOConfig):
    start_run: _Start = Path()
    start_steps: _Steps = ()


@dataclass(frozen=True)
class _DPO(DPOConfig):
    start_run: _Start = Path()
    start_steps: _Steps = ()


@dataclass(frozen=True)
class _NFT(NFTConfig):
    start_run: _Start = Path()
    start_steps: _Steps = ()


@dataclass(frozen=True)
class FinetuneDPPO(FinetunePolicy):
    """Fine-tune a policy in its environment, by DPPO."""

    learning: OmitArgPrefixes[_DPPO] = _DPPO()


@dataclass(frozen=True)
class FinetuneDPO(FinetunePolicy):
    """Fine-tune a policy from preferences, by DPO."""

    learning: OmitArgPrefixes[_DPO] = _DPO()


@dataclass(frozen=True)
class FinetuneNFT(FinetunePolicy):
    """Fine-tune a policy by DiffusionNFT, in its environment or by its critics."""

    learning: OmitArgPrefixes[_NFT] = _NFT()


SCHEMAS = {"dppo": FinetuneDPPO, "dpo": FinetuneDPO, "nft": FinetuneNFT}


def run(arguments: Sequence[str]) -> int:
    """Parse what stands after `diffrl finetune policy` and do it."""
    words = list(arguments)
    if resume.asked(words):
        return resume.spelled(words)
    asked = take(words, "--algo")
    algo = asked or DPPOConfig.algo
    tuning.get(algo)
    other = " and ".join(f"--algo {name}" for name in tuning.ALGORITHMS if name != algo)
    chain, solver = (", ".join(agents.names(kind)) for kind in ("chain", "solver"))
    description = USAGE.format(algo=algo, other=other, chain=chain, solver=solver, forward=", ".join(tuning.FORWARD))
    if not words:
        raise UserError("Which run's policy shall be fine-tuned? `diffrl finetune policy --help` shows how to say.")
    schema: type[FinetuneDPPO] | type[FinetuneDPO] | type[FinetuneNFT] = SCHEMAS[algo]
    prog = f"diffrl finetune policy --algo {algo}" if asked else "diffrl finetune policy"
    given = parse(schema, words, prog, before=["--algo"], description=description)
    plain = {f.name: getattr(given.learning, f.name) for f in dataclasses.fields(given.learning)}
    named = {word[2:].partition("=")[0].replace("-", "_").removeprefix("no_") for word in words if word[:2] == "--"}
    return given.start(tuning.get(algo)(**plain), named)
