"""What a run writes down as it goes: `metrics.csv`, TensorBoard events, `scores.json`, the learning curve."""

import contextlib
import csv
import math
import re
import textwrap
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from diffrl.support import folder, statistics
from diffrl.support.errors import UserError, counted, said_by
from diffrl.support.files import NotAFile, atomic_path, plain_file
from diffrl.support.plots import BLUE, GREY, finish, new_figure, save
from diffrl.training import checkpoint
from diffrl.training.sinks import CSV, TENSORBOARD, WANDB, Sink, WeightsAndBiases
from envs.task import Task, score_word

SHOWN = ("loss", "bc_loss", "critic_loss", "q", "episode_return", "kl", "accuracy")
"""Metrics that are shown while a run goes on."""
LEARNING_CURVE = "learning_curve.png"
"""The picture of a run's evaluations in its folder."""
UNCHANGED = "unchanged_until"
"""The last step, in scores.json, at which the policy has learned nothing in the run."""
DRAWN_EVERY = 10.0
"""Seconds between two pictures, at least: one takes as long as a short evaluation. The last is drawn at the end."""


class TensorBoard(Sink):
    """TensorBoard's events, in the folder `tensorboard` of the run; those after `step` are purged.

    The last one says when the run ended or was stopped, so that time after the last number counts as well.
    """

    name = "TensorBoard's events"

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer: Any = SummaryWriter(log_dir=str(run / "tensorboard"), purge_step=step + 1 if step else None)

    @override
    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    @override
    def close(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self._writer._get_file_writer().add_event(Event(session_log=SessionLog(status=SessionLog.STOP)))
        self._writer.close()


class MetricsLog:
    """`metrics.csv` (one row a logging point and seed) and TensorBoard events, which a resumed run continues.

    Rows after `step`, left by a run that was killed past its last checkpoint, are dropped. A file that is damaged is
    set aside. Where events cannot be written, training goes on without them: metrics.csv has the same numbers.

    to: what the numbers go to besides, in the words of `--log` (`sinks.checked`). about: what is said of the run there.
    """

    def __init__(
        self,
        run: Path,
        seeds: Sequence[int],
        step: int = 0,
        to: str = TENSORBOARD,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        written = 0
        self.seeds = list(seeds)
        self.path = run / "metrics.csv"
        self._columns: list[str] = []
        if self.path.exists() and (rows := self._read()):
            header, *rows = rows
            # A row may have been torn by a kill or a full disk.
            whole = [row for row in rows if len(row) == len(header) and _is_step(row[0])]
            written = max((int(row[0]) for row in whole), default=0)
            whole = [row for row in whole if int(row[0]) <= step]
            with atomic_path(self.path) as temporary, temporary.open("w", newline="") as file:
                csv.writer(file).writerows([header, *whole])
            self._columns = header
        self._except_hook = threading.excepthook
        threading.excepthook = self._quietly
        self._sinks: list[Sink] = []
        for name in to.split(","):
            with self._optional():
                if name == TENSORBOARD:
                    self._sinks.append(TensorBoard(run, step))
                elif name == WANDB:
                    self._sinks.append(WeightsAndBiases(run, written, about or {}))
                else:
                    assert name == CSV

    def _read(self) -> list[list[str]]:
        """The rows of metrics.csv, the header first; none where it is empty, or damaged and so set aside."""
        try:
            with plain_file(self.path).open(newline="") as file:
                rows = list(csv.reader(file))
            if not rows:
                return []
            if rows[0][:2] == ["step", "seed"] and len(set(rows[0])) == len(rows[0]):
                return rows
            why = "its header is not `step,seed,...`"
        except (NotAFile, csv.Error, UnicodeDecodeError) as error:
            why = str(error)
        aside = folder.set_aside(self.path)
        folder.say_once(f"{self.path} is damaged ({why}): it is kept as {aside.name}, and a new one begins.")
        return []

    @contextlib.contextmanager
    def _optional(self, sink: Sink | None = None) -> Iterator[None]:
        """Let a sink fail in the block, and say so: a full disk is the checkpoint's to report.

        An error of a sink's would hide the one that ends a run.
        """
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # OSError of TensorBoard's; of Weights & Biases whatever it makes of a network
            if sink is None:
                name = "TensorBoard's events" if isinstance(error, OSError) else "Some records of --log"
            else:
                name = sink.name
                self._sinks.remove(sink)
            reason = (isinstance(error, OSError) and error.strerror) or said_by(error)
            folder.say_once(f"{name} cannot be written: {reason}. metrics.csv has the same numbers.")

    def _quietly(self, failed: threading.ExceptHookArgs) -> None:
        """Show no traceback of the thread that writes TensorBoard's events where the disk refuses."""
        if not (isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard")):
            self._except_hook(failed)

    def write(self, step: int, metrics: Mapping[str, Sequence[float]]) -> None:
        """Append the metrics at `step`, each a list (S,): a row a seed, and TensorBoard events."""
        new = [name for name in metrics if name not in self._columns]
        if new or not self._columns:
            self._widen(new)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            for i, seed in enumerate(self.seeds):
                row = {name: f"{values[i]:.6g}" for name, values in metrics.items()}
                writer.writerow({"step": step, "seed": seed, **row})
        self._add(step, metrics)

    def mean(self, name: str, after: int) -> float | None:
        """The mean of a metric over what was written after the step `after`, by metrics.csv; None: no finite one is."""
        if name not in self._columns or not (rows := self._read()):
            return None
        step, column = rows[0].index("step"), rows[0].index(name)
        values = [float(row[column]) for row in rows[1:] if int(row[step]) > after and row[column]]
        return sum(values) / len(values) if values and math.isfinite(sum(values)) else None

    def _widen(self, names: Sequence[str]) -> None:
        """Append columns, empty in the rows there are: at first all, later those of metrics that begin on the way."""
        rows: list[list[str]] = []
        if self.path.exists():
            with plain_file(self.path).open(newline="") as file:
                rows = list(csv.reader(file))[1:]
        self._columns = [*(self._columns or ["step", "seed"]), *names]
        with atomic_path(self.path) as temporary, temporary.open("w", newline="") as file:
            csv.writer(file).writerows([self._columns, *([*row, *[""] * len(names)] for row in rows)])

    def scalars(self, name: str, step: int, values: Sequence[float]) -> None:
        """Write a number of each seed, (S,), to the sinks, such as TensorBoard, and not to metrics.csv."""
        self._add(step, {name: values})

    def _add(self, step: int, metrics: Mapping[str, Sequence[float]]) -> None:
        numbers = {
            f"{name}/seed{seed}": float(value)
            for name, values in metrics.items()
            for seed, value in zip(self.seeds, values, strict=True)
        }
        for sink in [*self._sinks]:
            with self._optional(sink):
                sink.add(step, numbers)

    def close(self) -> None:
        """Write what the sinks have not written yet, and close their files."""
        for sink in [*self._sinks]:
            with self._optional(sink):
                sink.close()
        if threading.excepthook == self._quietly:
            threading.excepthook = self._except_hook


def _is_step(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19


class Scores:
    """All evaluations of a run, kept in `scores.json`.

    An evaluation holds `step`, `returns` (a list a seed, an entry an episode), `mean_return`, where the environment
    tells of success `successes` (1 or 0 an episode), and, where references exist or success is scored, `score`, the
    mean score x100, one a seed like `mean_return`; `error` is the standard error of the mean over
    seeds (null for a single episode). A seed is judged by its score, else by its mean return.

    Where the file says `unchanged_until`, a step, the policies of evaluations up to that step have learned nothing in
    the run, and none of them is a best while there are others.
    """

    def __init__(self, run: Path, about: Mapping[str, Any], steps: Container[int] | None = None) -> None:
        """Read the evaluations that the folder `run` has; with `steps`, only those made at these steps.

        A damaged file counts as having none, which is said; the next evaluation sets it aside.

        about: what else the file says of the run.
        """
        self.path = run / "scores.json"
        self.about = dict(about)
        self.evaluations: list[dict[str, Any]] = []
        self.damaged = False
        self.unchanged_until = int(self.about.get(UNCHANGED, -1))
        if self.path.exists():
            try:
                content = read_scores(run)
                stored = content["evaluations"]
                if UNCHANGED not in self.about and isinstance(found := content.get(UNCHANGED), int):
                    self.unchanged_until = found
            except folder.Damaged as error:
                self.damaged, stored = True, []
                folder.say_once(f"{error.file} {error.why}. {folder.mends_scores(run)}")
            self.evaluations = [e for e in stored if steps is None or e["step"] in steps]

    def add(
        self,
        step: int,
        outcomes: NDArray[np.float64],
        normalise: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None,
    ) -> dict[str, Any]:
        """Write down an evaluation after `step` steps; give its entry.

        outcomes: returns (S, E), or returns and successes (S, E, 2). normalise: outcomes to scores (S, E), where there
        are any.
        """
        returns = returns_of(outcomes)
        entry: dict[str, Any] = {"step": step, "returns": np.round(returns, 4).tolist()}
        if outcomes.ndim == 3:
            entry["successes"] = outcomes[..., 1].astype(int).tolist()
        entry["mean_return"] = [float(v) for v in returns.mean(1)]
        if normalise is not None:
            entry["score"] = [float(v) for v in normalise(outcomes).mean(1)]
        error = statistics.estimate(returns if normalise is None else normalise(outcomes)).error
        entry["error"] = None if math.isnan(error) else error
        self.evaluations = [e for e in self.evaluations if e["step"] != step] + [entry]
        self._write()
        return entry

    def mark(self, **about: Any) -> None:
        """Say more about the run in the file, where it has one."""
        self.about |= about
        if self.evaluations:
            self._write()

    def _write(self) -> None:
        if self.damaged:
            folder.set_aside(self.path)
            self.damaged = False
        folder.write_json(self.path, {**self.about, "best": self.best(), "evaluations": self.evaluations})

    def best(self, of_all: bool = False) -> list[dict[str, Any]]:
        """The best evaluation of each seed: its step and what it was judged by.

        Of those whose policy has learned, where there are any. of_all: of all.
        """
        if not self.evaluations:
            return []
        learned = [e for e in self.evaluations if of_all or e["step"] > self.unchanged_until]
        judged = [(e["step"], e.get("score", e["mean_return"])) for e in learned or self.evaluations]
        n_seeds = len(judged[0][1])
        result = []
        for i in range(n_seeds):
            step, values = max(judged, key=lambda item: -math.inf if math.isnan(item[1][i]) else item[1][i])
            result.append({"step": step, "value": values[i]})
        return result

    def best_steps(self) -> set[int]:
        """The step of each seed's best evaluation."""
        return {int(best["step"]) for best in self.best()}

    def kept_steps(self) -> set[int]:
        """The steps whose checkpoints are kept: each seed's best, and its best of all, learned or not."""
        return self.best_steps() | {int(best["step"]) for best in self.best(of_all=True)}

    def all_equal(self) -> str:
        """A sentence where each seed has one value in all its evaluations, so that none is the best; else ""."""
        judged = [e.get("score", e["mean_return"]) for e in self.evaluations]
        if len(judged) < 2 or any(values != judged[0] for values in judged):
            return ""
        what = "score" if "score" in self.evaluations[0] else "mean return"
        return f"All {len(judged)} evaluations of a seed have the same {what}: the best of them is only the first."


@dataclass
class ScoreBook:
    """What a run's evaluations leave behind: scores.json, TensorBoard's curve, a line for the user, the picture."""

    run: Path
    task: Task
    scores: Scores
    log: MetricsLog
    say: Callable[[str], None]
    """Hears the line for the user."""
    _drawn: float = field(default_factory=time.monotonic, init=False)
    _stale: bool = field(default=False, init=False)

    def add(self, step: int, outcomes: NDArray[np.float64]) -> None:
        """Write down the evaluation of a step: returns (S, E), or returns and successes (S, E, 2)."""
        reference = self.task.reference
        entry = self.scores.add(step, outcomes, self.task.score if reference else None)
        self.log.scalars("score" if reference else "return", step, entry.get("score", entry["mean_return"]))
        self.say(evaluation_line(step, entry, outcomes.shape[1]))
        self._stale = True
        if time.monotonic() - self._drawn > DRAWN_EVERY:
            self.draw()

    def draw(self) -> None:
        """Draw the picture, where it lacks an evaluation."""
        if self._stale:
            with contextlib.suppress(OSError):  # a full disk is the next checkpoint's to report
                learning_curve(self.scores, self.run.name, self.run / LEARNING_CURVE)
            self._drawn, self._stale = time.monotonic(), False

    def kept_steps(self) -> set[int]:
        """The steps whose checkpoints are kept."""
        return self.scores.kept_steps()


def silent_share(run: Path) -> float:
    """Which share of a run's updates had nothing to learn from, by `no_signal` in metrics.csv; 0 where none is told of.

    Of several seeds, that of the seed which had most of them.
    """
    shares: dict[str, list[float]] = {}
    with contextlib.suppress(OSError, ValueError, csv.Error), plain_file(run / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            shares.setdefault(str(row["seed"]), []).append(float(row.get("no_signal") or 0))
    return max((sum(values) / len(values) for values in shares.values()), default=0.0)


def tidy(run: Path) -> None:
    """Do what a kill after a run's last write has left undone: drop checkpoints that none needs, draw the picture."""
    scores, picture = Scores(run, {}), run / LEARNING_CURVE
    checkpoint.prune(run, scores.kept_steps())
    if scores.evaluations and (not picture.exists() or picture.stat().st_mtime_ns < scores.path.stat().st_mtime_ns):
        with contextlib.suppress(OSError):
            learning_curve(Scores(run, read_scores(run)), run.name, picture)


def evaluation_line(step: int, entry: dict[str, Any], episodes: int) -> str:
    """One evaluation as a line: score or return with its standard error, each seed's where there are several."""
    kind, values = ("score", entry["score"]) if "score" in entry else ("return", entry["mean_return"])
    each = f"  (seeds: {', '.join(f'{v:z.1f}' for v in values)})" if len(values) > 1 else ""
    returns = f", mean return {np.mean(entry['mean_return']):z.1f}" if kind == "score" else ""
    score = f"[bold]{np.mean(values):z.1f}[/]{plus_minus(entry)}"
    return f"step {step:>9,}  {kind} {score}{each}{returns}, {counted(episodes, 'episodes')} a seed"


def plus_minus(entry: dict[str, Any]) -> str:
    """What stands behind the mean of an evaluation: its standard error, or that a single episode has none."""
    return statistics.plus_minus(entry["error"])


def read_scores(run: Path) -> dict[str, Any]:
    """A run's `scores.json`. Raises Damaged where it is not as `Scores` writes it."""
    path = run / "scores.json"
    content = folder.read_json(path)
    try:
        sizes = {_seeds_of(entry) for entry in content["evaluations"]}
    except (KeyError, TypeError) as error:
        raise folder.Damaged(path, f"is damaged: it is no record of evaluations ({error})") from error
    if len(sizes) > 1:
        raise folder.Damaged(path, "is damaged: its evaluations are of different numbers of seeds")
    return dict(content)


def outcomes_of(entry: Mapping[str, Any]) -> NDArray[np.float64]:
    """The outcomes of an evaluation as `Scores.add` took them: returns (S, E), or with successes behind (S, E, 2).

    entry: one of `scores.json`, or of what `diffrl.runs.policy.evaluate` gives.
    """
    returns = np.asarray(entry["returns"], np.float64)
    if "successes" not in entry:
        return returns
    return np.stack([returns, np.asarray(entry["successes"], np.float64)], axis=-1)


def returns_of(outcomes: NDArray[np.float64]) -> NDArray[np.float64]:
    """The returns (S, E) in outcomes (S, E) or (S, E, 2)."""
    return outcomes[..., 0] if outcomes.ndim == 3 else outcomes


def _seeds_of(entry: Mapping[str, Any]) -> int:
    """How many seeds an evaluation is of. Raises KeyError or TypeError unless it has what `Scores.add` writes."""
    if type(entry["step"]) is not int or not isinstance(entry["error"], float | int | None):
        raise TypeError("a step or an error is no number")
    judged = entry["mean_return"], entry.get("score", entry["mean_return"])
    if [len(each) for each in entry.get("successes", entry["returns"])] != [len(each) for each in entry["returns"]]:
        raise TypeError("it has successes of other episodes than its returns")
    for values in (*entry["returns"], *judged):
        if not values or not all(isinstance(value, float | int) for value in values):
            raise TypeError("a list of numbers is none")
    n = len(entry["returns"])
    if any(len(values) != n for values in judged):
        raise TypeError("an evaluation has different numbers of seeds")
    return n


def kind_of_run(about: Mapping[str, Any]) -> str:
    """What scores.json says that a run is: the algorithm that fine-tuned it, online, distil; "": trained from data."""
    tuned = about.get("finetune", {}).get("algo", "")
    return str(tuned or next((word for word in ("online", "distil") if about.get(word)), ""))


def learning_curve(scores: Scores, label: str, path: Path) -> Path:
    """Draw a run's evaluations over training steps, as PNG: a thick line and the standard error about it as a band.

    The error is that in `scores.json`: over seeds where there are several, which get thin lines, else over episodes.
    """
    from matplotlib.ticker import StrMethodFormatter

    figure, ax = new_figure(7, 4)
    about, entries = scores.about, sorted(scores.evaluations, key=lambda entry: int(entry["step"]))
    steps = np.array([entry["step"] for entry in entries])
    values = np.array([entry.get("score", entry["mean_return"]) for entry in entries])
    error = np.array([entry["error"] or 0.0 for entry in entries])
    mean, several, known = values.mean(1), values.shape[1] > 1, error.any()
    dot = 3 if len(steps) > 1 else 6
    if several:
        of_seeds = ax.plot(steps, values, color=BLUE, alpha=0.35, linewidth=1, marker="o", markersize=dot / 2)
        of_seeds[0].set_label("each seed")
    if known and len(steps) > 1:
        ax.fill_between(steps, mean - error, mean + error, color=BLUE, alpha=0.15, linewidth=0)
    elif known:  # of one point a band is nothing
        ax.errorbar(steps, mean, error, color=BLUE, alpha=0.5, capsize=4)
    if steps.min() <= scores.unchanged_until > 0:
        said = "untrained" if kind_of_run(about) == "" else "the policy that it started with"
        ax.axvspan(0, scores.unchanged_until, color=GREY, alpha=0.15, linewidth=0, label=said)
    of = counted(values.shape[1], "seeds") if several else counted(len(entries[-1]["returns"][0]), "episodes")
    average = f"mean of {of}{' ± standard error' if known else ''}"
    ax.plot(steps, mean, color=BLUE, linewidth=2, label=average, marker="o", markersize=dot)
    tuned = about.get("finetune", {})
    acted = tuned.get("algo") == "dppo" or tuned.get("advantages") == "environment"
    dataset = str(about["dataset"])
    file = Path(dataset) if dataset.endswith((".hdf5", ".h5", ".npz")) else None
    shown = dataset.replace("/", "-").replace(":", "-") if file is None else file.stem
    named = re.fullmatch(rf".+-{re.escape(shown)}-\d{{8}}-\d{{6}}(-\d+)?", label)  # a name of ours has it
    agent = str(about.get("agent", ""))  # scores of older versions have none
    kind = kind_of_run(about)
    by = f"{agent}{kind and f' {kind}'} on " if agent else ""
    title = textwrap.fill(label if named else f"{label}: {by}{dataset if file is None else file.name}", 64)
    elsewhere = "" if dataset in (about["env"], about["reference"]) else f"\nevaluated in {about['env']}"
    ax.set(
        xlabel="environment steps" if about.get("online") or acted else "training steps",
        ylabel=score_word(about["reference"]) if about["reference"] else "return",
        title=title + elsewhere,
    )
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    # From nothing on: a swing between 100 and 140 should not look like one between failure and success.
    ax.set_xlim(left=0)
    if about["reference"]:
        ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    finish(ax)
    return save(figure, path)
