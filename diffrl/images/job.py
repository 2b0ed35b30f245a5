"""Fine-tuning runs of image models from start to end: model, reward, rounds, evaluations, checkpoints, pictures."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffrl.diffusion.chain import DenoisingChain
from diffrl.images import algorithms, pictures, rewards
from diffrl.images.algorithms.backprop import require_gradient
from diffrl.images.algorithms.base import Setup
from diffrl.images.algorithms.dpo import FILE as PAIRS_FILE
from diffrl.images.config import ONLINE, FinetuneConfig
from diffrl.images.evaluation import Evaluation, Judge, evaluate
from diffrl.images.examples import Examples, Pairs
from diffrl.images.model import ImageModel, Lora, image_shape
from diffrl.images.models import load_model
from diffrl.images.prompts import Prompts, plain, read_prompts
from diffrl.images.report import evaluation_line, print_run
from diffrl.images.rewards.base import Reward
from diffrl.images.run import FinetuneRun
from diffrl.images.samples import conditions
from diffrl.images.trainer import Finetuner
from diffrl.images.world import World
from diffrl.support.console import console, work
from diffrl.support.errors import UserError
from diffrl.support.machine import resolve_device, settle, versions
from diffrl.training import checkpoint
from diffrl.training.logs import MetricsLog
from diffrl.training.loop import Interrupted, stop_signals

SAVE_EVERY = 120.0
"""Seconds between checkpoints, besides those of evaluations."""


def finetune(config: FinetuneConfig, *, quiet: bool = False) -> Path:
    """Fine-tune as `config` says, evaluate, save; give the run's folder, whose `model` is what was trained.

    Raises UserError for all that a user can get wrong, RewardError for a reward that answers with nonsense,
    DivergedError for training that does, Interrupted when told to stop (saved).
    """
    config = config.resolved()
    if config.out is not None:
        FinetuneRun.refuse(config.out)
    return _run(config, None, quiet)


def resume(
    path: Path | str,
    *,
    queries: int | None = None,
    rounds: int | None = None,
    stop_kl: float | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Path:
    """Go on with a run from its newest whole checkpoint, bit for bit as if it had not been cut.

    A run that was cut before its first checkpoint begins anew; one with nothing left to do writes its model and picture
    again. queries, rounds: in all, to make it longer. stop_kl: another bound, for a run that stopped at its
    own. device: another than the run's.
    """
    run = FinetuneRun.read(path)
    changes: dict[str, Any] = {"out": Path(path)}
    if queries is not None:
        if run.config.algo not in ONLINE:
            raise UserError(f"{run.config.algo} scores no images as it goes on: give --rounds.")
        assert run.config.batch is not None
        changes |= {"queries": queries, "rounds": queries // run.config.batch}
    if rounds is not None:
        if run.config.algo in ONLINE:
            raise UserError(f"{run.config.algo} runs by the images it scores: give --queries.")
        changes["rounds"] = rounds
    changes |= {name: value for name, value in (("stop_kl", stop_kl), ("device", device)) if value is not None}
    return _run(dataclasses.replace(run.config, **changes), run, quiet)


def _run(config: FinetuneConfig, resumed: FinetuneRun | None, quiet: bool) -> Path:
    settle()
    world = World(resolve_device(config.device))
    quiet = quiet or not world.main
    try:
        _check_shares(config, world)
        with _waiting_for(world):  # what is made at first use is made by one
            model = _model(config, str(world.device), quiet)
            reward, held_out = _rewards(config, str(world.device))
            judge = _judge(config)
        setup = Setup(config, model, _chain(config, model), _prompts(config, model), reward, world)
        assert config.kl is not None
        setup.kl_weight = config.kl if config.kl_target is None else config.kl or 0.01
        if config.algo in ("draft", "refl"):
            require_gradient(setup)
        session = _Session(setup, held_out, judge, quiet)
        return session.run(resumed)
    finally:
        world.close()


class _Session:
    """A run under way."""

    def __init__(self, setup: Setup, held_out: Reward | None, judge: Judge | None, quiet: bool) -> None:
        self.setup, self.config, self.world = setup, setup.config, setup.world
        self.held_out, self.judge, self.quiet = held_out, judge, quiet

    def run(self, resumed: FinetuneRun | None) -> Path:
        config, world = self.config, self.world
        assert config.rounds is not None
        path = config.out or Path(world.told(str(_new_folder(config)) if world.main else ""))
        self.folder = resumed or FinetuneRun(path, dataclasses.replace(config, out=path))
        self.folder.config = dataclasses.replace(config, out=path)
        saved = None
        if resumed is not None and checkpoint.steps(path):
            saved, complaints = checkpoint.load_latest(path)
            for complaint in complaints:
                self._say(f"[yellow]{complaint}[/]")
            if saved.step > config.rounds:
                raise UserError(f"{path} has {saved.step} rounds already, more than the {config.rounds} asked for.")
            if saved.step == config.rounds:
                self._say(f"{path} has all of its {saved.step} rounds; give more --queries (or --rounds) to go on.")
        done = -1 if saved is None else saved.step
        self.folder.history = [e for e in self.folder.history if e["round"] <= done]
        world.barrier()  # all have read what is cleaned away now
        if world.main:
            self.folder.write({"versions": versions("diffusers", "transformers", "peft", "accelerate")})
            if resumed is None:
                (path / PAIRS_FILE).unlink(missing_ok=True)  # of a run that was cut before its first checkpoint
            else:
                checkpoint.clean(path, done)
        world.barrier()
        self._say(self._title())
        with self._progress("Preparing") as progress:
            self._watch(progress, config.queries if config.algo == "dpo" and config.pairs is None else 0)
            algorithm = algorithms.build(self.setup, path)
        tuner = Finetuner(self.setup, algorithm)
        if saved is not None:
            tuner.load(saved.step, saved.tensors, saved.info)
            self._say(f"Resuming after {saved.step:,} rounds.")
        log = MetricsLog(path, [config.seed], tuner.round) if world.main else None
        try:
            self._train(tuner, log)
        finally:
            if log is not None:
                log.close()
        self._finish()
        return path

    def _train(self, tuner: Finetuner, log: MetricsLog | None) -> None:
        config, world, path = self.config, self.world, self.folder.path
        assert config.rounds is not None
        assert config.eval_every is not None
        began, saved_at = time.monotonic(), time.monotonic()
        before = float(self.folder.history[-1]["seconds"]) if self.folder.history else 0.0
        here = [entry for entry in self.folder.history if entry["round"] == tuner.round]
        if tuner.round == 0 or (tuner.round == config.rounds and not here):
            self._evaluated(tuner, log, before)
            self._save(tuner)
        if here and self._too_far(here[0]):
            return
        per_round = self._work_of_round(tuner)
        with stop_signals() as stopped, self._progress("Fine-tuning") as progress:
            self._watch(progress, per_round * config.rounds, per_round * tuner.round)
            while tuner.round < config.rounds:
                metrics = tuner.advance()
                if log is not None:
                    log.write(tuner.round, {n: [v] for n, v in {**metrics, "queries": tuner.queries}.items()})
                last = tuner.round == config.rounds
                stop = world.any(bool(stopped))
                if tuner.round % config.eval_every == 0 or last:
                    measures = self._evaluated(tuner, log, before + time.monotonic() - began).measures
                    self._save(tuner)
                    saved_at = time.monotonic()
                    if self._too_far(measures):
                        break
                elif stop or world.any(time.monotonic() - saved_at > SAVE_EVERY):
                    self._save(tuner)
                    saved_at = time.monotonic()
                if stop and not last:
                    raise Interrupted(
                        f"Stopped after {tuner.round} rounds; saved. Go on with `diffrl finetune --resume {path}`."
                    )

    def _too_far(self, measures: Mapping[str, float]) -> bool:
        """Whether an evaluation is beyond --stop-kl, and say so."""
        bound, kl = self.config.stop_kl, measures.get("kl", 0.0)
        if bound is None or kl <= bound:
            return False
        self._say(
            f"[yellow]Stopped: the divergence from the reference, {kl:.3g} nats an image, is beyond --stop-kl "
            f"{bound:g}.[/]"
        )
        return True

    def _evaluated(self, tuner: Finetuner, log: MetricsLog | None, seconds: float) -> Evaluation:
        """Evaluate, write it down, draw it."""
        with self._progress("Evaluating") as progress:
            keep = self.setup.on_progress
            self._watch(progress, self.config.eval_samples or 0)
            result = evaluate(self.setup, self.held_out, self.judge)
            self.setup.on_progress = keep
        if log is not None:
            finite = {name: value for name, value in result.measures.items() if math.isfinite(value)}
            entry = {"round": tuner.round, "queries": tuner.queries, "seconds": round(seconds, 1), **finite}
            self.folder.add(entry)
            for name, value in finite.items():
                log.scalars(f"evaluation/{name}", tuner.round, [value])
            pictures.grid(result.images, result.prompts, pictures.grid_path(self.folder.path, tuner.round))
            self._say(evaluation_line(entry, self.config))
        return result

    def _save(self, tuner: Finetuner) -> None:
        """A checkpoint, by the main process; the others need not wait: all have the same."""
        if self.world.main:
            tensors, info = tuner.state()
            checkpoint.save(self.folder.path, tuner.round, tensors, info)
            checkpoint.prune(self.folder.path, ())

    def _finish(self) -> None:
        """What was trained, as diffusers has it; the picture; the table."""
        if self.world.main:
            target = self.folder.path / "model"
            target.mkdir(exist_ok=True)
            self.setup.model.save(target)
            title = f"{self.config.algo} on {self.config.model}, reward: {self.config.reward}"
            pictures.before_after(self.folder, self.folder.path / "before_after.png", title)
            if not self.quiet:
                print_run(self.folder)
        self.world.barrier()

    def _title(self) -> str:
        config, model = self.config, self.setup.model
        trained = sum(p.numel() for p in model.tuned.parameters().values())
        how = "the whole network" if model.tuned.lora is None else f"LoRA of rank {model.tuned.lora.rank}"
        what = "" if self.setup.reward is None else f", reward {config.reward}"
        on = f"{self.world.size} processes, " if self.world.size > 1 else ""
        return (
            f"[bold]{config.algo}[/] on {config.model}: {how}, {trained:,} parameters{what}; "
            f"{config.rounds} rounds of {config.batch}; {on}{self.world.device} -> {self.folder.path}"
        )

    def _work_of_round(self, tuner: Finetuner) -> int:
        """Images that pass in a round: those sampled, and those trained on."""
        own = len(self.world.share(tuner.algorithm.units))
        sampled = 0 if self.config.algo in ("draft", "refl", "dpo", "supervised") else tuner.algorithm.queries
        return sampled // self.world.size + own * self.config.passes

    @contextlib.contextmanager
    def _progress(self, title: str) -> Iterator[Callable[[int, int], None]]:
        with work(title, "images", self.quiet) as update:
            yield update

    def _watch(self, update: Callable[[int, int], None], total: int, done: int = 0) -> None:
        """Have the bar follow what passes through the model."""
        count = done

        def on_progress(n: int) -> None:
            nonlocal count
            count += n
            update(min(count, total), total)

        self.setup.on_progress = on_progress

    def _say(self, text: str) -> None:
        if not self.quiet:
            console.print(text)


@contextlib.contextmanager
def _waiting_for(world: World) -> Iterator[None]:
    """Let the main process go first, and the others after it."""
    if not world.main:
        world.barrier()
    yield
    if world.main:
        world.barrier()


def _model(config: FinetuneConfig, device: str, quiet: bool) -> ImageModel:
    lora = Lora(config.lora) if config.lora else None
    options: dict[str, Any] = {} if config.adapter is None else {"adapter": config.adapter}
    if config.checkpointing:
        options["checkpointing"] = True
    if config.builtin:
        options["quiet"] = quiet
    return load_model(config.model, lora=lora, precision=config.precision, device=device, seed=config.seed, **options)


def _rewards(config: FinetuneConfig, device: str) -> tuple[Reward | None, Reward | None]:
    """The reward, which supervised (and dpo on pairs of yours) does without, and the held-out one."""
    needed = config.algo != "supervised" and not (config.algo == "dpo" and config.pairs is not None)
    if not needed:
        return None, None if config.held_out is None else rewards.parse(config.held_out, device=device)
    held_out = config.held_out or rewards.companion(config.reward)
    return (
        rewards.parse(config.reward, device=device),
        None if held_out is None else rewards.parse(held_out, device=device),
    )


def _judge(config: FinetuneConfig) -> Judge | None:
    if not config.builtin:
        return None
    from diffrl.images.rewards.digits import digit_classifier

    return digit_classifier()


def _chain(config: FinetuneConfig, model: ImageModel) -> DenoisingChain:
    assert config.steps is not None
    try:
        times = model.times(config.steps)
        return DenoisingChain(model.prediction.process, times, config.eta, clip=model.clip, event_dims=len(model.shape))
    except ValueError as error:
        raise UserError(f"--steps {config.steps} with --eta {config.eta:g} make no chain: {error}.") from error


def _prompts(config: FinetuneConfig, model: ImageModel) -> Prompts:
    """Of the file; else those of the images or pairs, or a built-in model's classes.

    All are encoded once, so that a bad one is found now.
    """
    if config.prompts is not None:
        prompts = read_prompts(config.prompts, files=model.extras)
    elif config.algo == "supervised" and config.data not in (None, "digits"):
        *frames, c, h, w = image_shape(model)
        examples = Examples(config.data, (h, w), channels=c, frames=frames[0] if frames else 0)
        prompts = Prompts(tuple(examples.prompts), tuple(examples.metadata))
    elif config.pairs is not None:
        *_, c, h, w = image_shape(model)
        prompts = plain(list(dict.fromkeys(Pairs(config.pairs, (h, w), channels=c).prompts)))
    elif config.builtin:
        prompts = plain([str(digit) for digit in range(10)])
    elif config.algo == "supervised":
        prompts = plain([""])
    else:
        raise UserError(f"Which prompts? {config.model} needs --prompts FILE, one a line.")
    conditions(model, prompts.texts[:1], prompts.metadata[:1])
    if not model.extras:
        model.conditions(list(dict.fromkeys(prompts.texts)))
    return prompts


def _check_shares(config: FinetuneConfig, world: World) -> None:
    """Raise UserError where a process would have nothing to sample."""
    assert config.batch is not None
    assert config.eval_samples is not None
    assert config.group is not None
    group = config.group if config.algo == "d3po" else 1
    least = min(config.batch // group, config.eval_samples)
    if config.algo == "dpo" and config.pairs is None:
        least = min(least, config.queries // config.group)
    if least < world.size:
        raise UserError(f"{world.size} processes for {least} images or groups of a round or an evaluation: give fewer.")


def _new_folder(config: FinetuneConfig) -> Path:
    """A folder of its own for the run."""
    model = Path(config.model).name
    stem = f"{config.algo}-{model}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        path = Path("runs") / f"{stem}{suffix}"
        with contextlib.suppress(FileExistsError):
            path.mkdir(parents=True)
            return path
    raise UserError(f"runs/{stem} exists a thousand times; choose another --out.")
