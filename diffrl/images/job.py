"""Fine-tuning runs of image models from start to end: model, reward, rounds, evaluations, checkpoints, pictures."""

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from diffrl.images import comparable, ended, its_model, rewards, served
from diffrl.images.algorithms import ALGORITHMS, Finetuner, adamw8bit
from diffrl.images.algorithms.base import Metrics
from diffrl.images.config import NOTHING, DPOConfig, DRaFTConfig, FinetuneConfig, OnlineConfig, ReFLConfig
from diffrl.images.config.base import CONFIG, base_of, check_rank
from diffrl.images.evaluation import IndependentClassifier, alarm, classifier_of, evaluate, sampled, training_loss
from diffrl.images.examples import extras_of
from diffrl.images.model import image_shape
from diffrl.images.models import model_of
from diffrl.images.models.emoji import shipped_weights
from diffrl.images.rewards.base import check_prompts, parts_of
from diffrl.images.rewards.human import Human
from diffrl.images.rewards.scaled import scaled
from diffrl.images.run import (
    FILES,
    PICTURE,
    FinetuneRun,
    drop_model,
    evaluation_line,
    grid_path,
    plot_before_after,
    plot_grid,
    print_run,
    short_name,
    write_model,
)
from diffrl.images.run_prompts import prompts_of_run
from diffrl.images.samples import RunState, Setup, chain_of
from diffrl.images.saved import gone_for_good, lost
from diffrl.images.signs import rounding, too_far
from diffrl.images.stored import FILES_OF_REWARDS, MEASURED_BY, TRAINED_BY, as_written, changed, files_of, written
from diffrl.images.suited import notes, refuse, refuse_grouped, refuse_human, refuse_videos, refuse_without_gradient
from diffrl.images.world import LostProcess, World
from diffrl.support import failure, schema
from diffrl.support import folder as folders
from diffrl.support.console import console, work
from diffrl.support.errors import UserError, counted, said_by
from diffrl.support.folder import ABOUT, claimed
from diffrl.support.machine import explaining_memory, resolve_device, settle, usual_torch, versions
from diffrl.support.stopping import Stopped, at_once, ended_by_stop, going_on, stop_signals
from diffrl.training import checkpoint
from diffrl.training.checkpoint import Checkpoint
from diffrl.training.logs import MetricsLog
from diffrl.training.loop import DivergedError

SAVE_EVERY = 120.0
"""Seconds between checkpoints, besides those of evaluations."""


@usual_torch()
def finetune(config: FinetuneConfig, *, quiet: bool = False) -> Path:
    """Fine-tune as `config` says, evaluate, save; give the run's folder, whose `model` is what was trained.

    Raises UserError for all that a user can get wrong, RewardError for a reward that answers with nonsense,
    DivergedError for training that does, Interrupted when told to stop (saved).
    """
    check_rank(schema.held(config, FinetuneConfig, "config"))
    refuse(config)
    return _run(config, None, quiet)


@usual_torch()
def resume(
    path: Path | str,
    *,
    steps: int | None = None,
    stop_kl: float | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Path:
    """Go on with a run from its newest whole checkpoint, bit for bit as if it had not been cut.

    A run that was cut before its first checkpoint begins anew; one with nothing left to do writes its model and picture
    again. steps: in all, to make the run longer, in what its algorithm counts by: images scored, or, of dpo and
    supervised, rounds. stop_kl: another bound, for a run that stopped at its own. device: another than the run's.

    Raises UserError as `finetune`, and for a run whose evaluations would measure something else than those it has.
    """
    run = FinetuneRun.read(path)
    config = run.asked(steps, stop_kl, device)
    comparable.require_to(run, config)
    return _run(config, run, quiet)


def _run(config: FinetuneConfig, resumed: FinetuneRun | None, quiet: bool) -> Path:
    settle()
    world = World(resolve_device(config.device))
    doing, less = f"fine-tuning {config.model}", _less_memory(config)
    if world.main and not quiet and not config.builtin:
        console.print(f"Loading {config.model} ...", markup=False)  # half a minute may pass without a word
    with contextlib.ExitStack() as held:
        held.callback(world.close)
        path = held.enter_context(_alone(config, resumed)) if world.main else Path()
        path = Path(world.told(str(path)))
        if config.optimiser == "adamw8bit":  # missed here, not after minutes of reading
            new = resumed is None
            adamw8bit.require(adamw8bit.ASKED if new else f"{path / CONFIG} says optimiser: adamw8bit, which")
        with explaining_memory(doing, less):
            session = _Session(config, world, quiet or not world.main, resumed)
        with explaining_memory(doing, less, session.kept), going_on(session.stopped):
            return session.run(path, resumed)


@contextlib.contextmanager
def _alone(config: FinetuneConfig, resumed: FinetuneRun | None) -> Iterator[Path]:
    """Yield the folder of a new run or of one that goes on, in which the main process is alone."""
    if resumed is None:
        with claimed(config.out, f"{config.algo}-{short_name(config.model).replace(':', '-')}", FILES) as path:
            yield path
    else:
        with folders.held(resumed.path):
            yield resumed.path


def _less_memory(config: FinetuneConfig) -> str:
    """What makes a new run of these settings need less memory, the cheapest first."""
    options = [f"a --micro-batch below {config.micro_batch}, which changes no result"] if config.micro_batch > 1 else []
    if not config.builtin:
        options += [] if config.checkpointing else ["--checkpointing"]
        options += ["--precision bf16"] if config.precision == "fp32" else []
        options += [] if config.lora else ["--lora 4, adapters in place of the whole network"]
    return "; or ".join(options) or "a smaller model"


class _Session:
    """A run in progress: what it works with, its folder, its loop, and what it says."""

    folder: FinetuneRun

    def __init__(self, config: FinetuneConfig, world: World, quiet: bool, resumed: FinetuneRun | None) -> None:
        self.config, self.world, self.quiet, new = config, world, quiet, resumed is None
        self._check_shares()
        device = str(world.device)
        with _waiting_for(world):  # what is made at first use is made by one
            refuse_human(config, world.size, new)
            reward = None if config.scored_by is None else rewards.parse(config.scored_by, device=device, made=not new)
            if reward is not None and isinstance(config, OnlineConfig) and config.scale_rewards:
                reward = scaled(reward)
            self.humans = [part for part in parts_of(reward) if isinstance(part, Human)]
            looked_at = None if config.held_out in (None, NOTHING) else config.held_out
            self.held_out = None if looked_at is None else rewards.parse(looked_at, device=device, made=not new)
            self.files: dict[str, dict[str, str]] = {}
            self.rewarded = config.scored_by  # as it is said
            self.argued = ":" in f"{config.scored_by} {config.held_out}"  # else no reward names a file or an address
            if self.argued:
                before = {} if resumed is None else resumed.reward_files()
                self.files = files_of(config, before, {} if resumed is None else resumed.about().get(MEASURED_BY))
                for note in changed(self.files, before):
                    self._say(f"[yellow]{note}[/]")
                for asked in (reward, self.held_out):
                    as_written(asked, self.files)
                served.expect(resumed, (reward, self.held_out))
                self.rewarded = None if config.scored_by is None else written(config.scored_by, self.files)
            refuse_grouped(config, (reward, self.held_out), world.size, new)
            # After the rewards: what is wrong with one is said at once.
            made = (config, device, quiet)
            model = model_of(*made) if resumed is None else its_model.made_again(resumed, *made)
            self.classifier = _classifier(config)
        prompts = prompts_of_run(config, model, base_of(config.model))
        for asked in (reward, self.held_out):
            if new and getattr(asked, "videos", False):
                refuse_videos(asked, model)
            check_prompts(asked, prompts.texts, prompts.metadata)
        if new and isinstance(config, DRaFTConfig | ReFLConfig):
            refuse_without_gradient(reward, config, model, prompts)
        if config.shard and world.size > 1:
            # Said of blocks that return a part of a tensor; it is for code that then adds to that in place, which no
            # network here does: gradients are those of one process (tests/images/test_processes.py).
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
            world.shard(model.tuned)
        self.setup = Setup(config, model, chain_of(model, config), prompts, reward, world)
        self.state = RunState(queries=config.scored_before, kl_weight=config.kl_weight, say=self._say)
        self.algorithm = ALGORITHMS[config.algo](self.setup, self.state)
        self.tuner = Finetuner(self.setup, self.state, self.algorithm)

    def run(self, path: Path, resumed: FinetuneRun | None) -> Path:
        """Open the folder, make the rounds, write the results; give the folder."""
        saved = self._open(path, resumed)
        self._say(self._title())
        for note in notes(self.setup.reward):
            self._say(note)
        n, prompts = self.config.eval_samples, len(self.setup.prompts)
        if -(-n // 2) < prompts and resumed is None:
            seen = f"Evaluations show {-(-n // 2)} of {prompts:,} prompts, two images each"
            self._say(f"{seen}: --eval-samples {2 * prompts} shows all.")
        begun = False
        try:
            with self._progress("Preparing", self.config.scored_before):
                self.algorithm.prepare(path)
            log = self._begin(saved)
            begun = True
            with contextlib.ExitStack() as asking:
                if log is not None:
                    asking.callback(log.close)
                for human in self.humans:
                    asking.enter_context(human.opened(path, self.config.rounds - self.state.round, self.state.round))
                self._train(log)
        except UserError as error:
            ended.explain(error, path, self.state if begun else None)
            raise
        self._finish()
        return path

    def _begin(self, saved: Checkpoint | None) -> MetricsLog | None:
        """Go on from a checkpoint, or begin; give the log, of the main process alone."""
        path = self.folder.path
        if saved is not None:
            try:
                with its_model.as_it_began(self.config.model, path):
                    self.tuner.load_state_dict(saved.step, saved.tensors, saved.info)
            except (KeyError, TypeError, ValueError) as error:
                raise checkpoint.CheckpointError(
                    f"The checkpoint of round {saved.step} in {path} does not fit its {CONFIG}: {said_by(error)}."
                ) from error
            if saved.step < self.config.rounds:
                self._say(f"Resuming after {counted(saved.step, 'rounds')}.")
                for note in its_model.since_it_began(self.folder, self.setup, self.algorithm):
                    self._say(f"[yellow]{note}[/]")
        if self.world.main and self.state.round < self.config.rounds:
            drop_model(path)
        return MetricsLog(path, [self.config.seed], self.state.round) if self.world.main else None

    def kept(self) -> str:
        """What is not lost where memory runs out, once there is something in its folder."""
        return ended.kept(self.folder.path) if hasattr(self, "folder") else ""

    def stopped(self) -> str:
        """What is said where the run is told to stop, once there is something in its folder."""
        begun = hasattr(self, "folder") and folders.sealed(self.folder.path)
        return ended.stopped(self.folder.path) if begun else ""

    def _open(self, path: Path, resumed: FinetuneRun | None) -> Checkpoint | None:
        """Begin the run's folder, or clean what a resumed run left behind; give the checkpoint to go on from."""
        config, world = self.config, self.world
        saved = None
        if resumed is not None and checkpoint.steps(path):
            self._check_weights(path)
            saved, complaints = checkpoint.load_latest(path)
            for complaint in complaints + checkpoint.made_again(path, saved.step, config.rounds, "rounds"):
                self._say(f"[yellow]{complaint}[/]")
            if saved.step > config.rounds:
                raise UserError(folders.too_far(path, saved.step, config.rounds, "rounds", config.unit))
            if saved.step == config.rounds and world.main:
                gone = lost(resumed, config) or []
                self._say(folders.all_done(path, saved.step, "rounds", gone, config.unit))
            if world.main and (for_good := gone_for_good(resumed, saved.step)):
                self._say(for_good)
        done = -1 if saved is None else saved.step
        if resumed is not None and done < config.rounds < resumed.config.rounds:
            self._say(folders.ends_sooner(path, resumed.config.rounds, config.rounds, "rounds"))
        history = [] if resumed is None else [entry for entry in resumed.history if entry["round"] <= done]
        self.folder = FinetuneRun(path, config, history, resumed is not None and resumed.damaged)
        world.barrier()  # all have read what is cleaned away now
        if world.main:
            about: dict[str, Any] = {"versions": versions("diffusers", "transformers", "peft", "accelerate")}
            about |= {} if resumed is None else served.noted(resumed)
            if (base := base_of(config.model)) is not None:
                about["base"] = base
            # Of a run of before it is not known, and what its file says now may be an edit.
            known = self.folder.trained_by if resumed is None else resumed.about().get(TRAINED_BY)
            if known is not None:
                about[TRAINED_BY] = known
            if config.model == "tiny-emoji":
                about["weights"] = shipped_weights()
            if self.files:
                about[FILES_OF_REWARDS] = self.files
            if resumed is not None and done == config.rounds and history:  # which measures nothing by what it has now
                about |= {name: value for name, value in resumed.about().items() if name == MEASURED_BY}
                about |= {FILES_OF_REWARDS: resumed.reward_files() | self.files} if self.files else {}
            self.folder.write(about)
            if resumed is not None:
                failure.forget(path)
                checkpoint.clean(path, done)
        world.barrier()
        return saved

    def _check_weights(self, path: Path) -> None:
        """Raise UserError where a run began with other weights of tiny-emoji than those that it would go on from."""
        if self.config.model == "tiny-emoji" and folders.read_json(path / ABOUT).get("weights") != shipped_weights():
            raise UserError(
                f"{path} began with other weights of tiny-emoji than this version has, so it cannot go on here. Begin "
                "it anew, or resume it with the version of diffrl that began it."
            )

    def _train(self, log: MetricsLog | None) -> None:
        """Make the remaining rounds; save and evaluate before the first one and between them.

        What is evaluated has been saved, and a stop in an evaluation or a round is at once: it is made again.
        """
        config, world, state = self.config, self.world, self.state
        history, path = self.folder.history, self.folder.path
        began = saved_at = time.monotonic()
        before = float(history[-1]["seconds"]) if history else 0.0
        saved = state.round if checkpoint.steps(self.folder.path) else -1
        per_round = self._work_of_round()
        in_all, of = config.seen(config.rounds, config.scored_before + config.rounds * self.algorithm.queries)
        passes, done = per_round * config.rounds, per_round * state.round
        progress = self._progress("Fine-tuning", passes, done, in_all, of.split()[0])
        with stop_signals() as stopped, ended_by_stop(stopped, LostProcess), progress:
            while True:
                last = state.round == config.rounds
                due = state.round % config.eval_every == 0 or last
                stop = world.any(stopped()) and not last
                if state.round != saved and (due or stop or world.any(time.monotonic() - saved_at > SAVE_EVERY)):
                    self._save(state.round, *self.tuner.state_dict())
                    saved, saved_at = state.round, time.monotonic()
                if stop:
                    world.barrier()  # the others are not to end, and end this one, before it has saved
                    raise Stopped
                measures = next((entry for entry in history if entry["round"] == state.round), None)
                if due and measures is None:
                    measures = self._evaluate(log, before + time.monotonic() - began)
                elif measures is not None and world.any(not grid_path(path, state.round).is_file()):
                    self._plot_again()
                if last or (measures is not None and self._too_far(measures)):
                    break
                metrics = self._round(state.round == saved)
                if log is not None:
                    log.write(state.round, {n: [v] for n, v in {**metrics, "queries": state.queries}.items()})

    def _round(self, saved: bool) -> Metrics:
        """Make a round. A stop in it, or a reward that fails, leaves a checkpoint of before, if that is not `saved`.

        Not a round that diverges: its images may be of a model that has.
        """
        if self.world.size > 1:  # which stop between rounds, all after the same one
            return self.tuner.advance()
        number = self.state.round
        for human in self.humans:
            human.at(number, asking=True)
        tensors, info = ({}, {}) if saved else self.tuner.state_dict()
        tensors, info = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}, copy.deepcopy(info)
        try:
            with at_once():
                return self.tuner.advance()
        except (Stopped, UserError) as error:
            if not saved and not isinstance(error, DivergedError):
                self._save(number, tensors, info)
            raise

    def _evaluate(self, log: MetricsLog | None, seconds: float) -> dict[str, float]:
        """Evaluate, record and plot the evaluation, and give its measures."""
        state, path = self.state, self.folder.path
        for human in self.humans:
            human.at(state.round, asking=False)
        with self._progress("Evaluating", self.config.eval_samples), self._alone():
            result = evaluate(self.setup, state, self.held_out, self.classifier)
        if log is not None:
            # The record comes after the picture: an evaluation that is recorded is not made again.
            plot_grid(result.images, result.prompts, grid_path(path, state.round))
            if state.round == 0 and (model := self.setup.model).extras:
                *_, c, h, w = image_shape(model)
                for name, given in extras_of(result.metadata, model.extras, (h, w), c).items():
                    plot_grid(given, result.prompts, path / "images" / f"{name}.png")
            finite = {name: value for name, value in result.measures.items() if math.isfinite(value)}
            entry = {"round": state.round, "queries": state.queries, "seconds": round(seconds, 1), **finite}
            entry |= training_loss(self.folder, log)
            entry |= {"silent_rounds": state.silent} if state.silent else {}
            if self.argued:
                served.note(self.folder, (self.setup.reward, self.held_out))
            self.folder.add(entry)
            for name, value in finite.items():
                log.scalars(f"evaluation/{name}", state.round, [value])
            self._say(evaluation_line(entry, self.config))
            if state.round == 0 and (odd := alarm(entry)):
                self._say(f"[bold red]{odd}[/]")
            if "kl_rounding" in entry and (noted := rounding(entry, self.config)):
                self._say(f"[yellow]{noted}[/]")
        return result.measures

    def _plot_again(self) -> None:
        """Sample the images of this round's evaluation again, for their grid alone: nothing is scored."""
        with self._progress("Sampling", self.config.eval_samples), self._alone():
            samples, chosen = sampled(self.setup, self.state)
            images = samples.whole(samples.images.float()).cpu()
        if self.world.main:
            plot_grid(images, self.setup.prompts.of(chosen)[0], grid_path(self.folder.path, self.state.round))

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """What ends at once where a signal comes; of several processes none may, as the others would wait for it."""
        return at_once() if self.world.size == 1 else contextlib.nullcontext()

    def _too_far(self, measures: Mapping[str, float]) -> bool:
        """Whether an evaluation's divergence is beyond --stop-kl; if so, say it."""
        if self.config.stop_kl is None:
            return False
        found = too_far(measures, self.folder.history[0] if self.folder.history else {}, self.config)
        if found:
            self._say(f"[yellow]{found}[/]")
        return found is not None

    def _save(self, number: int, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
        """Write the checkpoint after `number` rounds, by the main process: the others have the same, and go on."""
        if self.world.main:
            checkpoint.save(self.folder.path, number, tensors, info)
            evaluated = [entry["round"] for entry in self.folder.history]
            checkpoint.prune(self.folder.path, evaluated[-1:])  # should training diverge, it is known to be good

    def _finish(self) -> None:
        """Write what was trained, as diffusers has it, and the picture; print the table."""
        if self.world.main:
            write_model(self.folder.path, self.setup.model)
            reward = "" if self.rewarded is None else f", reward: {self.rewarded}"
            title = f"{self.config.algo} on {short_name(self.config.model)}{reward}"
            plot_before_after(self.folder, self.folder.path / PICTURE, title)
            if not self.quiet:
                print_run(self.folder)
        self.world.barrier()

    def _title(self) -> str:
        config, tuned = self.config, self.setup.model.tuned
        trained = sum(p.numel() for p in self.tuner.parameters.values())
        which = ", ".join(config.layers or ())
        if tuned.lora is None:
            how = f"its layers {which}" if which else "the whole network"
        else:
            how = f"LoRA of rank {tuned.lora.rank}" + (f" on {which}" if which else "")
        if config.model.startswith("control:"):
            how = "the ControlNet branch" if how == "the whole network" else f"{how}, in the ControlNet branch"
        what = "" if self.rewarded is None else f", reward {self.rewarded}"
        on = f"{self.world.size} processes, " if self.world.size > 1 else ""
        return (
            f"[bold]{config.algo}[/] on {config.model}: {how}, {trained:,} parameters{what}; "
            f"{config.plan}; {on}{self.world.device} -> {self.folder.path}"
        )

    def _work_of_round(self) -> int:
        """How many images pass through the model in a round: those sampled, and those trained on."""
        own = len(self.world.share(self.algorithm.units))
        return self.algorithm.sampled // self.world.size + own * self.config.passes

    def _check_shares(self) -> None:
        """Raise UserError where a process would have nothing to sample."""
        least = min(self.config.units, self.config.eval_samples)
        if least < self.world.size:
            raise UserError(
                f"{self.world.size} processes for {least} images or groups of a round or an evaluation: give fewer."
            )
        groups = self.config.scored_before // self.config.group if isinstance(self.config, DPOConfig) else 0
        shared = (self.config.units, self.config.eval_samples, groups)
        if self.config.shard and any(n % self.world.size for n in shared):
            raise UserError(
                f"--shard has {self.world.size} processes do the same work: --batch (in groups, where they stay "
                "together), --eval-samples and dpo's groups (--queries / --group) must be multiples of that."
            )

    @contextlib.contextmanager
    def _progress(
        self, title: str, passes: int, done: int = 0, total: int | None = None, unit: str = "images"
    ) -> Iterator[None]:
        """Within the block, have a bar follow the images that pass through the model: `passes`, some of them `done`.

        total: what the bar counts to, in `unit`, if an image passes more than once; by default as far as `passes`.
        """
        state, total = self.state, passes if total is None else total
        kept = state.images, state.on_progress
        with work(title, unit, self.quiet) as update:
            state.images = done
            state.on_progress = lambda images: update(total * min(images, passes) // max(passes, 1), total)
            try:
                yield
            finally:
                state.images, state.on_progress = kept

    def _say(self, text: str) -> None:
        if not self.quiet:
            console.print(text)


@contextlib.contextmanager
def _waiting_for(world: World) -> Iterator[None]:
    """Around what the main process must do before the others do it."""
    if not world.main:
        world.barrier()
    yield
    if world.main:
        world.barrier()


def _classifier(config: FinetuneConfig) -> IndependentClassifier | None:
    """A classifier of the built-in models' images that is no part of any reward; None for other models."""
    base = base_of(config.model)
    return None if base is None else classifier_of(base)
