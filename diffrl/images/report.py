"""What a fine-tuning run says: a line an evaluation, and the table at its end."""

import math
from typing import Any

from diffrl.images.config import FinetuneConfig
from diffrl.images.run import FinetuneRun
from diffrl.support.console import console

SAID: dict[str, str] = {
    "reward": "reward",
    "held_out": "held-out reward",
    "class_accuracy": "class accuracy",
    "kl": "KL to the reference, nats an image",
    "diversity": "diversity, RMS distance",
    "class_entropy": "class entropy, nats",
    "reference_error": "the reference's error on the images",
}
"""The measures, as the table names them."""


def evaluation_line(entry: dict[str, Any], config: FinetuneConfig) -> str:
    """One evaluation."""
    names = ("reward", "held_out", "class_accuracy", "kl", "diversity")
    shown = "  ".join(f"{name.replace('_', ' ')} [bold]{entry[name]:.3f}[/]" for name in names if name in entry)
    return f"round {entry['round']:>4}  {entry['queries']:>6,} images scored  {shown}"


def print_run(run: FinetuneRun) -> None:
    """The measures before and after, what they warn of, where everything is, and what to do next."""
    from rich.table import Table

    first, last = run.history[0], run.history[-1]
    table = Table(title=f"{run.config.eval_samples} images of the same prompts and noise", title_justify="left")
    for name, justify in (("", "left"), ("before", "right"), ("after", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    parts = {name: f"  {name.removeprefix('reward: ')}" for name in last if name.startswith("reward: ")}
    for name, text in {"reward": SAID["reward"], **parts, **SAID}.items():
        if name in last:
            table.add_row(text, f"{first[name]:.3f}" if name in first else "", f"{last[name]:.3f}")
    console.print(table)
    for warning in warnings(first, last):
        console.print(f"[yellow]{warning}[/]")
    console.print(f"images scored:  {last['queries']:,} in {last['seconds']:,.0f} s")
    console.print(f"picture:        {run.path / 'before_after.png'}")
    console.print(f"what was trained: {run.path / 'model'} (diffusers' format)")
    console.print(f"compare runs:   diffrl compare {run.path} RUN ...")
    console.print(f"TensorBoard:    tensorboard --logdir {run.path}")


def warnings(first: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """Signs that the reward has been hacked, in words."""
    found = []
    if last.get("class_accuracy", 1.0) < 0.8 * first.get("class_accuracy", 1.0):
        found.append(
            f"Class accuracy fell from {first['class_accuracy']:.2f} to {last['class_accuracy']:.2f}: part of the "
            "reward was paid for with what the images are of. A smaller --clip-nats or --lr, or --kl, holds them."
        )
    if last.get("diversity", 1.0) < 0.5 * first.get("diversity", 0.0):
        found.append("Images of one prompt are less than half as different as they were: --kl, or stop earlier.")
    if last.get("reference_error", 0.0) > 2 * first.get("reference_error", math.inf):
        found.append(
            "The pretrained model finds the images more than twice as odd as its own: they are leaving what it learned "
            "from data. Look at before_after.png."
        )
    both = "held_out" in last and "reward" in last
    if both and last["reward"] > first["reward"] and last["held_out"] < first["held_out"]:
        found.append("The reward rose while the held-out one fell: what was gained is in the eye of that scorer.")
    return found
