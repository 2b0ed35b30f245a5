"""A reward that is learned from preferences: an ensemble of score networks, and what it says of a data set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffrl.alignment.preferences import bradley_terry_loss, calibration_error, log_likelihood, preference_accuracy
from diffrl.augment import streams
from diffrl.augment.flow_to_better.config import RewardConfig
from diffrl.data.offline import Ints, OfflineDataset
from diffrl.data.preferences import Preferences, draw_pairs, segment_starts
from diffrl.nets import MLP, Adam
from diffrl.support import schema
from diffrl.support.errors import UserError, counted, first_line
from diffrl.support.folder import Damaged, read_json, read_tensors, seal, sealed, write, write_json
from diffrl.support.seeds import generator_at, mix

WEIGHTS, ABOUT = "reward_model.safetensors", "reward_model.json"
"""The files of a reward model in a folder."""
FORMAT = "diffrl-reward-model-1"
"""The entry `format` of `ABOUT`."""
_ROWS = 2**13
"""Rows that are scored at once: a layer of five members takes 40 MB."""
_FEW = 10
"""Fewer preferences than this are pointed out: published are 15 pairs."""
_COIN = 0.6
"""An accuracy below which a reward model has hardly learned anything."""
_LOW = 0.01
"""The quantile of the data's scores that becomes the reward 0."""


@dataclass(frozen=True)
class RewardReport:
    """What a reward model learned from, and how well it foretells preferences that it has not seen.

    Each member is asked about the pairs that it holds out, and all their answers are taken together. None where no such
    pair is held out.
    """

    pairs: int
    """Pairs with a preference."""
    equal: int
    """Pairs of which neither was preferred."""
    segment: int
    """H, the rows of a segment."""
    held_out: int
    """Pairs that each member holds out."""
    train_accuracy: float
    """Share of the preferences that the ensemble's mean score foretells; most of them its members were trained on."""
    accuracy: float | None
    """Share of the held-out preferences that members foretell (`preference_accuracy`)."""
    accuracies: tuple[float | None, ...]
    """The same, member by member."""
    calibration: float | None
    """The expected calibration error of the held-out probabilities (`calibration_error`)."""
    log_likelihood: float | None
    """The mean log-likelihood of held-out labels, in nats; a coin's is -.693."""
    disagreement: float
    """The standard deviation of the members' probabilities, a mean over all pairs."""

    def lines(self, members: int) -> Iterator[str]:
        """What is printed of a reward model of so many networks."""
        if self.accuracy is None or self.calibration is None:
            yield f"Reward:      {members} networks; no preference is held out: nothing is known of how good they are."
            return
        yield (
            f"Reward:      {members} networks foretell {self.accuracy:.1%} of the preferences that they hold out "
            f"(of {self.pairs:,}; {self.equal:,} pairs are equal), "
            f"{self.train_accuracy:.1%} of all; their probabilities are off by {self.calibration:.3f} (calibration)."
        )
        if self.pairs < _FEW:
            yield f"[yellow]{counted(self.pairs, 'preferences')} say little of how good it is: give more pairs.[/]"
        if self.accuracy < _COIN:
            yield "[yellow]That is hardly better than a coin: give more pairs, or look at the labels.[/]"


class RewardModel(nn.Module):
    """An ensemble of M networks that each give a transition (s, a) a score; a segment's score is its steps' mean.

    Preferences tell a member's scores up to a shift, since only differences enter. `rewards` settles it: the members'
    mean score, such that 1 % of the data's rows lie below 0 and their deviation is 1. So of two episodes of equal steps
    the longer one is better, as where an agent is rewarded for not falling.
    """

    mean: Tensor
    std: Tensor
    low: Tensor
    scale: Tensor

    def __init__(self, config: RewardConfig, observation_size: int, action_size: int, seed: int) -> None:
        super().__init__()
        self.config, self.seed = config, seed
        self.observation_size, self.action_size = observation_size, action_size
        size = observation_size + action_size
        generators = [generator_at(seed, member, streams.REWARD_MEMBER) for member in range(config.members)]
        self.network = MLP(
            (config.members,), size, 1, generators, width=config.width, layers=config.layers, activation=torch.relu
        )
        for name, value in {"mean": torch.zeros(size), "std": torch.ones(size)}.items():
            self.register_buffer(name, value)
        for name, number in {"low": 0.0, "scale": 1.0}.items():
            self.register_buffer(name, torch.tensor(number, dtype=torch.float64))

    @property
    def members(self) -> int:
        """M, the networks of the ensemble."""
        return self.config.members

    def step_scores(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Every member's scores (M, *shape) of steps: observations (*shape, O), actions (*shape, A), in their units."""
        rows = torch.cat([observations, actions], -1)
        x = self.standardised(rows.reshape(1, -1, rows.shape[-1]))
        return self.scores(x.expand(self.members, -1, -1)).view(self.members, *rows.shape[:-1])

    def segment_scores(self, observations: Tensor, actions: Tensor, mask: Tensor | None = None) -> Tensor:
        """Every member's scores (M, *shape) of segments: observations (*shape, H, O), actions (*shape, H, A).

        mask: (*shape, H), 1 where a row counts in the mean, else 0; None: all do.
        """
        scores = self.step_scores(observations, actions)
        return scores.mean(-1) if mask is None else (scores * mask).sum(-1) / mask.sum(-1)

    def rewards(self, observations: Tensor, actions: Tensor) -> Tensor:
        """The learned reward (*shape) of steps: observations (*shape, O), actions (*shape, A), in their units."""
        return (self.step_scores(observations, actions).mean(0) - self.low.float()) / self.scale.float()

    def standardised(self, rows: Tensor) -> Tensor:
        """Rows (..., O + A) as the networks take them."""
        return (rows - self.mean) / self.std

    def scores(self, x: Tensor) -> Tensor:
        """Scores (M, B) of standardised rows (M, B, O + A), a set for each member."""
        out: Tensor = self.network(x)
        return out.squeeze(-1)

    # --- a whole data set, on the host ---

    def row_scores(self, dataset: OfflineDataset) -> NDArray[np.float32]:
        """Every member's scores (M, N) of the rows of a data set. Raises UserError for other sizes of rows."""
        sizes = dataset.observation_size, dataset.action_size
        if sizes != (self.observation_size, self.action_size):
            raise UserError(
                f"The reward model scores observations of {self.observation_size} and actions of {self.action_size} "
                f"dimensions; the data have {sizes[0]} and {sizes[1]}."
            )
        parts = []
        with torch.no_grad():
            for start in range(0, len(dataset), _ROWS):
                block = slice(start, start + _ROWS)
                columns = (torch.from_numpy(values[block]) for values in (dataset.observations, dataset.actions))
                observations, actions = (column.to(self.mean.device) for column in columns)
                parts.append(self.step_scores(observations, actions).cpu().numpy())
        return np.concatenate(parts, 1)

    def row_rewards(self, dataset: OfflineDataset) -> NDArray[np.float64]:
        """The learned rewards (N,) of the rows of a data set: see `rewards`."""
        scores = self.row_scores(dataset).mean(0, dtype=np.float64)
        rewards: NDArray[np.float64] = (scores - float(self.low)) / float(self.scale)
        return rewards

    def episode_returns(self, dataset: OfflineDataset) -> NDArray[np.float64]:
        """The predicted returns (E,) of all episodes of a data set: sums of learned rewards."""
        starts = dataset.episodes()[:, 0]
        return np.add.reduceat(self.row_rewards(dataset), starts)

    def probabilities(self, dataset: OfflineDataset, pairs: Ints, segment: int) -> NDArray[np.float64]:
        """Every member's probability (M, n) that the second segment of a pair is preferred. pairs: (n, 2) ids."""
        sums = np.cumsum(self.row_scores(dataset), 1, dtype=np.float64)
        sums = np.concatenate([np.zeros((self.members, 1)), sums], 1)
        z = (sums[:, pairs + segment] - sums[:, pairs]) / segment
        # (1 + tanh(x / 2)) / 2 is the logistic function, and overflows nowhere.
        p: NDArray[np.float64] = (1 + np.tanh((z[..., 1] - z[..., 0]) / 2)) / 2
        return p

    # --- files ---

    def save(self, folder: Path, report: RewardReport, learned_from: Mapping[str, Any] | None = None) -> None:
        """Write the model to a folder, in which the caller is alone (`support.folder.held`), with checksums.

        learned_from: what data and preferences it comes from, as JSON holds it, for `is_of`.
        """
        about = {
            "format": FORMAT,
            "observation_size": self.observation_size,
            "action_size": self.action_size,
            "seed": self.seed,
            "config": dataclasses.asdict(self.config),
            "report": dataclasses.asdict(report),
            "learned_from": dict(learned_from or {}),
        }
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ABOUT).unlink(missing_ok=True)  # a kill must not leave another model's beside these weights
        write(folder / WEIGHTS, safetensors.torch.save(state))
        write_json(folder / ABOUT, about)
        if not sealed(folder):
            seal(folder, [WEIGHTS, ABOUT])

    @staticmethod
    def is_of(folder: Path, wanted: Mapping[str, Any]) -> bool:
        """Whether the model in a folder is whole and says of itself what `wanted` does, entry by entry of `ABOUT`."""
        try:
            about: Any = read_json(folder / ABOUT)
            read_tensors(folder / WEIGHTS)
            return all(about[name] == json.loads(json.dumps(value)) for name, value in wanted.items())
        except (Damaged, KeyError, TypeError):
            return False

    @classmethod
    def load(cls, folder: Path, device: torch.device | str = "cpu") -> tuple[RewardModel, RewardReport]:
        """The model in a folder and its report. Raises UserError where there is none, Damaged where it is damaged."""
        path = folder / ABOUT
        if not path.is_file():
            raise UserError(f"{folder} holds no reward model: it has no {ABOUT}.")
        about: Any = read_json(path)
        tensors = read_tensors(folder / WEIGHTS)
        try:
            if about["format"] != FORMAT:
                raise Damaged(path, f"has the format {str(about['format'])[:60]}; expected {FORMAT}", "")
            config = schema.read(RewardConfig, about["config"], str(path))
            report = schema.read(RewardReport, about["report"], str(path))
            model = cls(config, int(about["observation_size"]), int(about["action_size"]), int(about["seed"]))
            model.load_state_dict(tensors)
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise Damaged(path, f"does not describe the reward model beside it: {first_line(error)[:200]}") from error
        return model.to(device), report


def fit_reward_model(
    dataset: OfflineDataset,
    preferences: Preferences,
    config: RewardConfig,
    seed: int,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[RewardModel, RewardReport]:
    """Train a reward model on preferences by Bradley-Terry's loss on the difference of both segments' scores.

    dataset: standardises what the networks see, and settles the scale of `rewards`; the segments may be of other data.
    on_progress: hears of the steps done, of so many. The same seed gives the same model. Raises UserError where the
    sizes of the segments' rows are not the data's, or nothing is preferred.
    """
    preferences.check_sizes(dataset.observation_size, dataset.action_size, "The file of preferences")
    preferences.check_preferred("the preferences")
    model = RewardModel(config, dataset.observation_size, dataset.action_size, seed)
    rows = np.concatenate([dataset.observations, dataset.actions], 1)
    model.mean.copy_(torch.from_numpy(rows.mean(0, dtype=np.float64)))
    model.std.copy_(torch.from_numpy(rows.std(0, dtype=np.float64) + 1e-3))
    model.to(device)

    segments = _segments(preferences, model)
    labels = torch.from_numpy(np.where(preferences.equal, 0.5, 0.0)).float().to(device)
    out, own = _split(len(preferences), config, seed)
    generator = generator_at(seed, streams.REWARD_TRAINING, device=torch.device(device))
    optimiser = Adam(model.network, config.learning_rate, decay_steps=config.steps)
    own, batch = own.to(device), min(config.batch_size, own.shape[1])
    for step in range(config.steps):
        columns = torch.randint(own.shape[1], (config.members, batch), generator=generator, device=device)
        drawn = own.gather(1, columns)
        x = _some_rows(segments, drawn, config.rows, generator)
        first, second = _means(model, x).unbind(-1)
        optimiser.step(bradley_terry_loss(first, second, labels[drawn]) + config.weight_decay / 2 * _squares(model))
        if on_progress is not None:
            on_progress(step + 1, config.steps)

    scores = model.row_scores(dataset).mean(0, dtype=np.float64)
    model.low.fill_(float(np.quantile(scores, _LOW)))
    model.scale.fill_(max(float(scores.std()), 1e-12))
    return model, _report(model, preferences, segments, labels, out.to(device))


def _segments(preferences: Preferences, model: RewardModel) -> Tensor:
    """The rows (N, 2, H, O + A) of both segments of each pair, standardised, the preferred one first."""
    sides = [
        np.concatenate([getattr(preferences, f"{kind}_{side}") for kind in ("observations", "actions")], -1)
        for side in "wl"
    ]
    return model.standardised(torch.from_numpy(np.stack(sides, 1)).to(model.mean.device))


def _split(pairs: int, config: RewardConfig, seed: int) -> tuple[Tensor, Tensor]:
    """The numbers of the pairs that each member holds out (M, n), and of those that it sees (M, N - n).

    What is held out goes round: no pair is held out twice before every one is once.
    """
    n = 0 if config.held_out == 0 else min(max(round(config.held_out * pairs), 1), pairs - 1)
    order = torch.randperm(pairs, generator=generator_at(seed, streams.REWARD_HELD_OUT))
    turned = torch.stack([order.roll(-member * n) for member in range(config.members)])
    return turned[:, :n], turned[:, n:]


def _some_rows(segments: Tensor, drawn: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Of the pairs drawn (M, B) all rows (M, B, 2, H, D), or one drawn from each of R equal parts: (M, B, 2, R, D)."""
    H = segments.shape[2]
    if rows >= H:
        return segments[drawn]
    u = torch.rand(*drawn.shape, 2, rows, generator=generator, device=segments.device)
    parts = torch.arange(rows, device=segments.device)
    row = ((parts + u) * (H / rows)).long().clamp(max=H - 1)
    side = torch.arange(2, device=segments.device)[:, None]
    return segments[drawn[..., None, None], side, row]


def _means(model: RewardModel, x: Tensor) -> Tensor:
    """Each member's mean scores (M, B, 2) of its own rows (M, B, 2, R, D)."""
    return model.scores(x.flatten(1, 3)).view(x.shape[:-1]).mean(-1)


def _squares(model: RewardModel) -> Tensor:
    """The sum (M,) of the squares of each member's weights."""
    weights = (value for name, value in model.network.named_parameters() if name.endswith("weight"))
    return torch.stack([weight.square().sum((1, 2)) for weight in weights]).sum(0)


@torch.no_grad()
def _report(
    model: RewardModel, preferences: Preferences, segments: Tensor, labels: Tensor, held_out: Tensor
) -> RewardReport:
    """What the trained model says of the pairs, and of those that its members hold out (M, n)."""
    at_once = max(_ROWS // (2 * segments.shape[2]), 1)
    each = (part.expand(model.members, *part.shape) for part in torch.split(segments, at_once))
    every = torch.cat([_means(model, part) for part in each], 1)
    first, second = every.unbind(-1)
    one, two, y = first.gather(1, held_out), second.gather(1, held_out), labels[held_out]
    flat = one.flatten(), two.flatten(), y.flatten()
    return RewardReport(
        pairs=int((~preferences.equal).sum()),
        equal=int(preferences.equal.sum()),
        segment=preferences.horizon,
        held_out=held_out.shape[1],
        train_accuracy=float(preference_accuracy(first.mean(0), second.mean(0), labels)),
        accuracy=_number(preference_accuracy(*flat)),
        accuracies=tuple(_number(each) for each in preference_accuracy(one, two, y)),
        calibration=_number(calibration_error(*flat)),
        log_likelihood=_number(log_likelihood(*flat)),
        disagreement=float(torch.sigmoid(second - first).std(0, correction=0).mean()),
    )


def _number(value: Tensor) -> float | None:
    """A number, None for NaN, which is the mean of nothing."""
    return None if value.isnan() else float(value)


def disagreement(model: RewardModel, dataset: OfflineDataset, pairs: Ints, segment: int) -> NDArray[np.float64]:
    """How far the members disagree about pairs (n, 2) of segments: the deviation (n,) of their probabilities."""
    deviations: NDArray[np.float64] = model.probabilities(dataset, pairs, segment).std(0)
    return deviations


def choose_pairs(
    model: RewardModel,
    dataset: OfflineDataset,
    segment: int,
    pairs: int,
    seed: int,
    *,
    beside: Ints | None = None,
    candidates: int = 1000,
) -> Ints:
    """The pairs (n, 2) of segments to label next: those of `candidates` random ones that the members disagree on most.

    beside: (m, 2) pairs that are labelled already, which do not come again; with their number other candidates are
    drawn. The first is disagreed on most. Raises UserError where there are not so many pairs.
    """
    starts = segment_starts(dataset, segment)
    known = np.zeros((0, 2), np.int64) if beside is None else beside
    possible = len(starts) * (len(starts) - 1) // 2 - len(np.unique(np.sort(known, 1), axis=0))
    rng = np.random.default_rng(mix((seed, len(known), streams.REWARD_CANDIDATES)))
    drawn = draw_pairs(starts, max(pairs, min(candidates, possible)), rng, known)
    order = np.argsort(-disagreement(model, dataset, drawn, segment), kind="stable")
    return drawn[order[:pairs]]


def relabelled(dataset: OfflineDataset, model: RewardModel) -> OfflineDataset:
    """The data set with the learned rewards in place of its own, for agents that learn values.

    Its metadata say so. What they told of the old rewards, and the checksum of the file, is left out.
    """
    metadata = {key: value for key, value in dataset.metadata.items() if key not in ("sha256", "return_range")}
    return replace(
        dataset,
        rewards=model.row_rewards(dataset).astype(np.float32),
        metadata=metadata | {"reward_source": f"learned from preferences (diffrl, {model.members} networks)"},
    )
