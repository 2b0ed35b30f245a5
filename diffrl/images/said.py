"""What a fine-tuning run says of itself: a line an evaluation, its table at the end, and what that warns of."""

import math
from collections.abc import Mapping
from typing import Any

from diffrl.images.config import FinetuneConfig
from diffrl.images.run import CHANCE, MODEL, PART, PICTURE, SAID, FinetuneRun, said_of_model
from diffrl.support.console import console


def passed(entry: Mapping[str, Any], config: FinetuneConfig) -> str:
    """What has passed by an evaluation, in words: images scored, or, where a run scores none, examples learned from."""
    if config.counts == "queries":
        return f"{entry['queries']:,} images scored"
    examples = getattr(config, "examples", "images")
    return f"{entry['round'] * config.batch * config.updates * config.passes:,} {examples} learned from"


def evaluation_line(run: FinetuneRun) -> str:
    """The line of the last evaluation: after how many rounds and images, and what was measured.

    Of a run that learns from examples also the training loss, its mean over the rounds since the evaluation before.
    """
    names = ("reward", "held_out", "class_accuracy", "kl", "diversity")
    entry, before = run.history[-1], run.history[-2]["round"] if len(run.history) > 1 else 0
    losses = [row["loss"] for row in run.losses() if before < row["round"] <= entry["round"]]
    measured = {"loss": sum(losses) / len(losses)} if losses else {}
    measured |= {name: entry[name] for name in names if name in entry}
    shown = "  ".join(f"{name.replace('_', ' ')} [bold]{value:.3f}[/]" for name, value in measured.items())
    number, _, what = passed(entry, run.config).partition(" ")
    return f"round {entry['round']:>4}  {number:>6} {what}  {shown}"


def print_run(run: FinetuneRun) -> None:
    """Print a run's measures before and after, what they warn of, where its files are, and what to do next."""
    from rich.table import Table

    first, last = run.measured[0], run.history[-1]
    table = Table(title=f"{run.config.eval_samples} images of the same prompts and noise", title_justify="left")
    for name, justify in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    parts = {name: f"  {name.removeprefix(PART)}" for name in last if name.startswith(PART)}
    for name, text in {"reward": SAID["reward"], **parts, **SAID}.items():
        if name in last:
            table.add_row(text, f"{first[name]:.3f}" if name in first else "", f"{last[name]:.3f}")
    console.print(table)
    if "reward" in last and "reward" not in first:
        console.print("There is no reward before: every evaluation is scored by the votes until then, on a new scale.")
    for warning in warnings(first, last, run.config):
        console.print(f"[yellow]{warning}[/]")
    if run.config.counts == "queries" or last["queries"]:
        console.print(f"images scored:  {last['queries']:,} in {last['seconds']:,.0f} s")
    if run.config.counts == "rounds":
        console.print(
            f"learned from:   {passed(last, run.config).removesuffix(' learned from')} in {last['seconds']:,.0f} s"
        )
    console.print(f"picture:        {run.path / PICTURE}")
    console.print(f"model:          {said_of_model(run.path / MODEL, run.config.model)}", markup=False)
    console.print(f"compare runs:   diffrl compare {run.path} RUN ...")
    console.print(f"TensorBoard:    tensorboard --logdir {run.path}")


def warnings(first: Mapping[str, Any], last: Mapping[str, Any], config: FinetuneConfig) -> list[str]:
    """Sentences on signs that the reward has been hacked, from the first and the last evaluation of a run.

    config: the run's; what is advised are options that its algorithm has.
    """
    found = []
    kl = "kl" in config.options() and config.eta > 0
    if last.get("class_accuracy", 1.0) < 0.8 * first.get("class_accuracy", 1.0):
        smaller = " or ".join(["--clip-nats"] * ("clip_nats" in config.options()) + ["--lr"])
        paid = "part of the reward was paid for with what the images are of"
        found.append(
            f"Class accuracy fell from {first['class_accuracy']:.2f} to {last['class_accuracy']:.2f}: "
            f"{paid if 'reward' in last else 'fewer images show what their prompt says'}. "
            f"A smaller {smaller}{', or --kl,' if kl else ''} holds them."
        )
    if last.get("diversity", 1.0) < 0.5 * first.get("diversity", 0.0):
        advice = "--kl, or stop earlier" if kl else "stop earlier"
        found.append(f"Images of one prompt are less than half as different as they were: {advice}.")
    if last.get("reference_error", 0.0) > 2 * first.get("reference_error", math.inf):
        found.append(
            "The pretrained model finds the images more than twice as odd as its own: they are leaving what it learned "
            "from data. Look at before_after.png."
        )
    if last.get("silent_rounds"):
        found.append(f"{last['silent_rounds']} of {last['round']} rounds made no update: their rewards said nothing.")
    if _change(first, last, "reward") > 0 > _change(first, last, "held_out"):
        found.append("The reward rose while the held-out one fell: what was gained is in the eye of that scorer.")
    return found


def _change(first: Mapping[str, float], last: Mapping[str, float], name: str) -> float:
    """By how much a measure differs from the first evaluation to the last; 0 where that is not more than `CHANCE`."""
    if name not in first or name not in last:
        return 0.0
    difference = last[name] - first[name]
    return difference if abs(difference) > CHANCE * max(abs(first[name]), abs(last[name])) else 0.0
