"""Flow-to-Better as an augmenter: preferences, a learned reward, blocks, a diffuser, and trajectories that flow."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from diffrl.augment import streams
from diffrl.augment.augmenter import Augmenter, RealData
from diffrl.augment.columns import as_columns
from diffrl.augment.config import Request, requested
from diffrl.augment.fidelity.measures import CLIPPED_MARGIN, UNIT
from diffrl.augment.flow_to_better import generate
from diffrl.augment.flow_to_better.blocks import BlockPairs, make_blocks
from diffrl.augment.flow_to_better.config import (
    TRAJECTORIES,
    BlockConfig,
    DiffuserConfig,
    FlowConfig,
    PreferenceConfig,
    RewardConfig,
)
from diffrl.augment.flow_to_better.counts import Counts, parts
from diffrl.augment.flow_to_better.diffuser import (
    PairSource,
    TrajectoryCodec,
    TrajectoryDiffuser,
    TrajectoryPair,
    trajectories,
)
from diffrl.augment.flow_to_better.reward_model import (
    ABOUT,
    RewardModel,
    RewardReport,
    fit_reward_model,
    relabelled,
)
from diffrl.augment.flow_to_better.windows import (
    best_episodes,
    horizon_of,
    rows_held_out,
    thinned,
    window_returns,
    windows_of,
)
from diffrl.augment.job import augment
from diffrl.augment.target import Target
from diffrl.data import d4rl
from diffrl.data.offline import Floats, OfflineDataset
from diffrl.data.preferences import Preferences, read_preferences, teach
from diffrl.data.segments import SegmentSource, Windows
from diffrl.data.transitions import Transitions
from diffrl.support import schema
from diffrl.support.console import console, work
from diffrl.support.errors import UserError, counted
from diffrl.support.files import regular_file, sha256
from diffrl.support.seeds import generator_at, mix
from diffrl.training.loop import Trainer
from diffrl.training.stack import StackTrainer
from envs.datasets import made_from

PREFERENCES = tuple(field.name for field in dataclasses.fields(PreferenceConfig))
"""The settings of preferences."""
SEGMENT = 100
"""Rows of a segment that the synthetic teacher labels, as published."""
LEARNED = "Rewards are the learned ones: that they differ from the simulator's is no fault."
"""What is said where rows are compared whose rewards are learned."""
RELABELLED = "relabelled.hdf5"
"""The data set with the learned reward, in the model's folder."""
_HELD_OUT_PAIRS = 128
"""Pairs that the held-out loss is taken over, at most."""


def flow_to_better(
    dataset: str,
    out: str | Path,
    preferences: PreferenceConfig | str | int,
    *,
    diffuser: DiffuserConfig | None = None,
    flow: FlowConfig | None = None,
    reward: RewardConfig | None = None,
    blocks: BlockConfig | None = None,
    max_dynamics_error: float | None = None,
    relabel: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Path:
    """Improve a data set's best trajectories by preferences, and write them; give the path of the new data set.

    preferences: a file, or a number of pairs that the synthetic teacher labels. max_dynamics_error, relabel: see
    `FlowToBetter`. dataset, out, options: the fields of `Request`. The same call again goes on where it was cut, and
    gives the same file: see `augment`.
    """
    schema.held(quiet, bool, "quiet")
    if not isinstance(preferences, PreferenceConfig):
        preferences = PreferenceConfig(str(preferences))
    augmenter = FlowToBetter(
        preferences, diffuser, flow, reward, blocks, max_dynamics_error=max_dynamics_error, relabel=relabel, quiet=quiet
    )
    request = requested(flow_to_better, dataset, out, options)
    if relabel and not request.force:
        _refuse_late_relabelling(request)
    return augment(request, augmenter, quiet=quiet)


def _refuse_late_relabelling(request: Request) -> None:
    """Raise UserError where the generated data set is there already and the relabelled one is not."""
    target = Target(dataclasses.replace(request, force=True), FlowToBetter.verb)
    if target.exists and not (target.folder / RELABELLED).exists():
        raise UserError(
            f"{request.out} exists, without {target.folder / RELABELLED}: add --force to make both. The trained models "
            "are kept, and the same rows are generated once more."
        )


class FlowToBetter(Augmenter):
    """Trajectories better than the data's, by preferences (Zhang et al. 2024, ICLR).

    A reward is learned from preferences between segments. The data's windows are put into blocks by their predicted
    returns, a diffuser learns to make a trajectory of each block from one of the block below, and the windows of the
    best episodes, or all, flow on from there, as long as their predicted return rises.

    Generated rows have the learned reward and are never terminal: windows lie within episodes, so an end is nothing
    that the diffuser has seen. A trajectory of H rows gives H - 1 transitions, the last of which is cut off.

    max_dynamics_error: rows whose s' misses the simulator's by more, in standard deviations of the data, are left out.
    relabel: write the data set itself, with the learned reward, to the model's folder. quiet: print nothing.
    """

    name, verb, paper = "Flow-to-Better", "flow-to-better", "Zhang et al. 2024, ICLR"
    rows_version = 1
    later_settings: ClassVar[Mapping[str, Any]] = {"same_start": False, "windows": "all"}
    agent = "bc"
    steered = True
    described = "in trajectories, each better than the one of the data it comes from by its predicted return"

    def __init__(
        self,
        preferences: PreferenceConfig,
        diffuser: DiffuserConfig | None = None,
        flow: FlowConfig | None = None,
        reward: RewardConfig | None = None,
        blocks: BlockConfig | None = None,
        *,
        max_dynamics_error: float | None = None,
        relabel: bool = False,
        quiet: bool = False,
    ) -> None:
        schema.held(max_dynamics_error, schema.NotNegative | None, "--max-dynamics-error")
        self.preferences, self.diffuser = preferences, schema.group(diffuser, DiffuserConfig, "diffuser")
        self.flow, self.reward = schema.group(flow, FlowConfig, "flow"), schema.group(reward, RewardConfig, "reward")
        self.blocks = schema.group(blocks, BlockConfig, "blocks")
        self._bound, self._relabel, self._quiet = max_dynamics_error, relabel, quiet
        self.steps = self.diffuser.steps
        source = "teacher"
        if preferences.pairs is None:
            advice = "Give a file of `diffrl augment label`, or a number of pairs for the synthetic teacher."
            source = sha256(regular_file(preferences.preferences, "a file of preferences", advice))
        self.model_settings = {
            "preferences": source,
            **{name: getattr(preferences, name) for name in PREFERENCES[1:]},
            "pairs": preferences.pairs,
            **dataclasses.asdict(self.diffuser),
            **{f"reward_{key}": value for key, value in dataclasses.asdict(self.reward).items()},
            **dataclasses.asdict(self.blocks),
        }
        self.sampling_settings = dataclasses.asdict(self.flow)

    # --- the data --------------------------------------------------------------------------------------------------

    @override
    def open(self, data: RealData, held_out: float, seed: int, device: str) -> None:
        self._data, self._seed, self._device = data, seed, device
        dataset = data.dataset
        self._pairs, self._about = self._read(dataset, seed)
        episodes = dataset.episodes()
        horizon = self.diffuser.horizon or horizon_of(dataset, self._pairs.horizon)
        if horizon < 2:
            raise UserError(f"--horizon is {horizon}; expected 2 or more, so that a row has one that follows.")
        longest = int(dataset.episode_lengths().max(initial=0))
        if 1 < longest < horizon:
            raise UserError(
                f"Windows have {horizon:,} rows, and the longest episode has {longest:,}: ask for --horizon {longest}, "
                "or fewer."
            )
        windows = thinned(windows_of(episodes, horizon, self.diffuser.windows))
        out = rows_held_out(dataset, windows, held_out, mix((seed, streams.HELD_OUT)))
        self._out = out
        self._windows, self._windows_out = (
            Windows(windows.starts[which], windows.lasts[which], horizon)
            for which in (~out[windows.starts], out[windows.starts])
        )
        self._require_blocks()
        self._dynamics, why = data.dynamics()
        if self._dynamics is None and self._bound is not None:
            raise UserError(
                f"--max-dynamics-error needs the simulator: {why or 'no environment is known, give --env.'}"
            )
        self.together = horizon - 1
        self.samples = TRAJECTORIES * self.together
        self.chunk = generate.CHUNK.get(torch.device(device).type, generate.CHUNK["cuda"]) * self.together
        self._split(data.transitions)

    def _require_blocks(self) -> None:
        """Raise UserError where fewer windows are learned from than there are blocks, before anything is learned."""
        n, blocks = len(self._windows), self.blocks.blocks
        if n < blocks:
            more = "--windows all" if self.diffuser.windows == "first" else "a smaller --horizon"
            raise UserError(
                f"{blocks} blocks take as many trajectories or more to learn from, and these data have {n:,}, of "
                f"{self._windows.horizon:,} rows: ask for {f'--blocks {n}, or ' if n > 1 else ''}{more}."
            )

    def _read(self, dataset: OfflineDataset, seed: int) -> tuple[Preferences, dict[str, Any]]:
        """The preferences, and where they come from, as JSON holds it."""
        asked = self.preferences
        if asked.pairs is None:
            found = read_preferences(asked.preferences, dataset)
            text = f"{asked.preferences}, {counted(len(found), 'pairs')} of segments of {found.horizon} rows."
            about: dict[str, Any] = {"source": "file", "file": Path(asked.preferences).name}
        else:
            segment = asked.segment or SEGMENT
            labelled = teach(dataset, asked.pairs, segment, seed, noise=asked.label_noise, ties=asked.ties)
            found = labelled.segments(dataset)
            text = (
                f"{counted(asked.pairs, 'pairs')} of segments of {segment} rows, labelled by the synthetic teacher by "
                f"the data's own rewards ({labelled.about['turned round']} labels turned round, "
                f"{labelled.about['equal']} equal). Nothing else looks at these."
            )
            about = {"source": "synthetic teacher", **labelled.about}
        least = self.reward.members if self.reward.held_out else 1
        if len(found) < least:
            raise UserError(
                f"{len(found)} labelled pairs are too few: the {least} networks of the reward are each judged by a "
                f"pair that they have not learned from, which takes at least {least} (--reward.members; published: 15)."
            )
        if not self._quiet:
            console.print(f"Preferences: {text}", markup=False)
        return found, about | {"pairs": len(found), "segment": found.horizon, "equal": int(found.equal.sum())}

    def _split(self, transitions: Transitions) -> None:
        """Set the rows that are learned from and those held out."""
        out = torch.from_numpy(self._out[self._data.dataset.successors()[1]])
        self.train, self.held_out = (
            dataclasses.replace(transitions, rows=transitions.rows[which]) for which in (~out, out)
        )

    @override
    def real(self, data: RealData) -> RealData:
        return dataclasses.replace(data, dataset=self._relabelled, transitions=self._transitions)

    # --- training --------------------------------------------------------------------------------------------------

    @override
    def trainer(self, folder: Path, begun: bool) -> Trainer:
        dataset = self._data.dataset
        self._folder = folder
        self._reward, self._report = self._reward_model(folder, begun)
        self._relabelled = relabelled(dataset, self._reward)
        self._transitions = Transitions.from_dataset(self._relabelled)
        self._split(self._transitions)

        rows = torch.from_numpy(np.concatenate([dataset.observations, dataset.actions], 1)).to(self._device)
        codec = TrajectoryCodec.fit(
            rows, dataset.observation_size, self._data.action_bounds, self._data.observation_bounds
        )
        rewards = torch.from_numpy(self._relabelled.rewards).to(self._device)
        self._segments, out = (
            SegmentSource(rows, rewards, dataset.observation_size, windows)
            for windows in (self._windows, self._windows_out)
        )
        self._returns = window_returns(self._relabelled.rewards, self._windows)
        self._deviation = float(self._returns.std())
        self._blocks = make_blocks(self._returns, self.blocks, self._seed)
        episodes = dataset.episodes()
        returns = self._relabelled.episode_returns()
        seen = ~np.logical_and.reduceat(self._out, episodes[:, 0])  # an episode that is held out is no start
        horizon, which = self._windows.horizon, self.diffuser.windows
        best = best_episodes(episodes[seen], returns[seen], horizon, self.flow.top, which)
        self._starts = SegmentSource(rows, rewards, dataset.observation_size, best)
        self._model = TrajectoryDiffuser(self.diffuser, codec, (self._seed,), self._device)
        self._sampler = self._model.sampler(self.flow)
        self._unseen = self._held_out_pairs(out, codec)
        self._say_blocks()
        generator = generator_at(self._seed, streams.TRAINING, device=self._model.device)
        pairs = BlockPairs(self._blocks, self._device)
        return StackTrainer(self._model, PairSource(self._segments, pairs, codec), self.diffuser.batch_size, generator)

    @functools.cached_property
    def _fingerprint(self) -> str:
        return d4rl.fingerprint(self._data.dataset)

    def _reward_model(self, folder: Path, begun: bool) -> tuple[RewardModel, RewardReport]:
        """The reward model of the folder, or where there is none that fits, a new one, which is written there.

        Where training has not begun, what is there may be of a start with other settings: it fits if those that it
        comes from are the same.
        """
        comes_from = {
            "data": self._fingerprint,
            **{name: self.model_settings[name] for name in (*PREFERENCES, "pairs")},
        }
        wanted = {"learned_from": comes_from, "config": dataclasses.asdict(self.reward), "seed": self._seed}
        if (folder / ABOUT).is_file() and (begun or RewardModel.is_of(folder, wanted)):
            model, report = RewardModel.load(folder, self._device)
        else:
            with work("Learning the reward", "steps", self._quiet) as on_progress:
                model, report = fit_reward_model(
                    self._data.dataset, self._pairs, self.reward, self._seed, self._device, on_progress
                )
            model.save(folder, report, comes_from)
        if not self._quiet:
            for line in report.lines(model.members):
                console.print(line)
        return model, report

    def _held_out_pairs(self, out: SegmentSource, codec: TrajectoryCodec) -> TrajectoryPair:
        """Held-out windows, each with one of the block below that is trained on; always the same."""
        rng = np.random.default_rng(mix((self._seed, 1, streams.HELD_OUT)))
        returns = window_returns(self._relabelled.rewards, self._windows_out)
        of = np.abs(returns[:, None] - self._blocks.centres).argmin(1)
        numbers, source = np.flatnonzero(of > 0), out
        if not len(numbers):  # all that is held out is of the lowest block
            numbers, source, of = np.flatnonzero(self._blocks.of > 0), self._segments, self._blocks.of
        numbers = rng.choice(numbers, min(_HELD_OUT_PAIRS, len(numbers)), replace=False)
        below = np.array([rng.choice(self._blocks.members(block - 1)) for block in of[numbers]])
        return TrajectoryPair(
            *(
                trajectories(segments, torch.from_numpy(which).to(self._device)[None], codec)
                for segments, which in ((self._segments, below), (source, numbers))
            )
        )

    def _say_blocks(self) -> None:
        if self._quiet:
            return
        sizes, centres = self._blocks.sizes(), self._blocks.centres
        where = " that lie end to end in" if self.diffuser.windows == "all" else ", the first windows of"
        console.print(
            f"Blocks:      {len(sizes)} of {sizes.min():,} to {sizes.max():,} windows of {self._windows.horizon} rows, "
            f"mean predicted returns {centres[0]:.3g} to {centres[-1]:.3g}. The flow starts from "
            f"{len(self._starts):,}{where} {'all' if self.flow.top == 1 else 'the best'} episodes."
        )

    @override
    def held_out_loss(self) -> list[float]:
        return self._model.held_out_loss(self._unseen)

    @override
    def load(self, learner: Mapping[str, Tensor]) -> None:
        self._model.load_state_dict(dict(learner))

    # --- generating ------------------------------------------------------------------------------------------------

    @property
    @override
    def columns(self) -> int:
        return super().columns + generate.EXTRA

    @override
    @torch.no_grad()
    def sample(self, generator: torch.Generator) -> NDArray[np.float32]:
        model, size = self._model, self._data.dataset.observation_size
        codec = model.codec
        numbers = self._draw_starts(self.chunk // self.together, generator)

        def rewards(x: Tensor) -> Tensor:
            """(B, H) of x (1, B, H, D)."""
            rows = codec.decode(x)[0]
            return self._reward.rewards(rows[..., :size], rows[..., size:])

        found = generate.flow(
            trajectories(self._starts, numbers[None], codec),
            lambda x: model.sample(x, generator, self._sampler, self.flow.guidance),
            lambda x: rewards(x).sum(-1),
            self.flow,
            self._deviation,
        )
        rows = generate.transitions(codec.decode(found.x)[0], rewards(found.x), size).cpu().numpy()
        tried = torch.full_like(found.returns, found.tried)
        each = torch.stack([numbers.float(), tried, found.kept, found.start_returns, found.returns], -1).cpu().numpy()
        told = np.repeat(each.astype(np.float32)[:, None], self.together, 1).reshape(-1, each.shape[-1])
        flat = rows.reshape(-1, rows.shape[-1])
        errors = np.full((len(flat), 1), np.nan, np.float32)
        improved = told[:, 2] > 0
        errors[improved, 0] = self._dynamics_errors(flat[improved])
        return np.concatenate([flat, told, errors], 1)

    def _draw_starts(self, n: int, generator: torch.Generator) -> Tensor:
        """The numbers (n,) of starts: none comes again before all have come."""
        k, device = len(self._starts), self._starts.device
        orders = [torch.randperm(k, generator=generator, device=device) for _ in range(-(-n // k))]
        return torch.cat(orders)[:n]

    def _dynamics_errors(self, rows: Floats) -> Floats:
        """(n,) of transitions (n, D): see `generate.Columns`. Infinite where the simulator breaks down."""
        errors = np.full(len(rows), np.nan, np.float32)
        if self._dynamics is None or not len(rows):
            return errors
        o, a = self._data.dataset.observation_size, self._data.dataset.action_size
        told = self._dynamics.reproducible(rows[:, :o], CLIPPED_MARGIN)
        following, _, _ = self._dynamics.step(rows[told, :o], rows[told, o : o + a])
        scale = self._model.codec.scale.scale[:o].cpu().numpy()
        missed = np.sqrt((((following - rows[told, o + a : -2]) / scale) ** 2).mean(1))
        errors[told] = np.where(np.isfinite(missed), missed, np.inf)
        return errors

    # --- writing ---------------------------------------------------------------------------------------------------

    @override
    def table(self, rows: Floats) -> dict[str, NDArray[Any]]:
        made, told = generate.split(rows)
        keep, ends = generate.written(told, self.together, self._bound)
        columns = as_columns(made, self._data.dataset.observation_size, self._data.dataset.action_size)
        columns["timeouts"] = ends
        return {name: values[keep] for name, values in columns.items()}

    @override
    def ends(self, generated: Floats) -> bool:
        return False

    @override
    def look(self, generated: Floats) -> int:
        counts = Counts(self.together)
        for part in parts(generated, self.together):
            counts.add(generate.split(part)[1], self._bound)
        self._counts = counts
        if not counts.rows:
            raise UserError(self._nothing(counts))
        if not self._quiet:
            for line in counts.lines(self._returns):
                console.print(line)
        if self._relabel:
            path = d4rl.write(self._folder / RELABELLED, self._with_source(), force=True)
            if not self._quiet:
                console.print(f"Relabelled:  {path}, the data set itself with the learned reward.")
        return counts.rows

    @override
    def fewer(self) -> str:
        return self._counts.fewer()

    def _nothing(self, counts: Counts) -> str:
        if counts.improved:
            return (
                f"All rows of the {counts.improved:,} improved trajectories miss the simulator by more than "
                f"--max-dynamics-error {self._bound:g} {UNIT} (half of them by {counts.median_error:.3g}): nothing is "
                "left to write. Raise it, or train longer: more --steps (a model of other settings needs another "
                "--folder)."
            )
        return (
            f"None of {counts.trajectories:,} trajectories was improved by the flow: nothing is left to write. What is "
            "trained and generated is kept. Train longer (--steps), or ask for a smaller --improvement."
        )

    def _with_source(self) -> OfflineDataset:
        """The relabelled data, with where they come from, whose preferences, and their environment."""
        dataset, spec = self._data.dataset, self._data.task.spec
        more = {
            **made_from(dataset, str(dataset.metadata["dataset"])),
            "source_sha256": self._fingerprint,
            "preferences": self._about,
            "reward_model": self._of_reward_model(),
            "action_low": self._data.action_bounds[0],
            "action_high": self._data.action_bounds[1],
            **({} if spec is None else spec.metadata()),
        }
        return dataclasses.replace(self._relabelled, metadata=self._relabelled.metadata | more)

    def _of_reward_model(self) -> dict[str, Any]:
        """How good the reward model is, and its settings, as JSON holds them."""
        return {**dataclasses.asdict(self._report), "settings": dataclasses.asdict(self.reward)}

    @override
    def provenance(self) -> dict[str, Any]:
        return {
            "preferences": self._about,
            "reward_source": self._relabelled.metadata["reward_source"],
            "reward_model": self._of_reward_model(),
            "blocks": {"sizes": self._blocks.sizes().tolist(), "mean_returns": self._blocks.centres.tolist()},
            "model": self.model_settings | {"horizon": self._windows.horizon},
            "sampling": self.sampling_settings,
            "flow": self._counts.as_json(self._bound),
        }

    @override
    def warning(self) -> str:
        slow = torch.device(self._device).type == "cpu" and self.diffuser.width * max(self.diffuser.multipliers) > 512
        return "On a CPU the published size takes days; the default size takes minutes." if slow else ""

    @override
    def remark(self) -> str:
        return LEARNED
