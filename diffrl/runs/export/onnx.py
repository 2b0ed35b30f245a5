"""A policy as an ONNX graph, from observations and noise to actions, both in the environment's units.

What is random in acting is an input of the graph, so that the graph is a function, which can be compared with the
policy's own to rounding. Any number of observations is taken at once.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agents.base import Agent
from agents.bc import DiffusionBCAgent
from agents.critic import CandidateNoise
from agents.diffusion_ql import QWeightedAgent
from agents.fql import FQLAgent
from agents.idql import IDQLAgent
from agents.planning import Planner
from agents.qam import QAMAgent
from diffrl.data.observations import Part
from diffrl.data.preprocessing import Preprocessing
from diffrl.support.errors import UserError, said_by

_PLAIN = DiffusionBCAgent | FQLAgent | QAMAgent
"""Agents that act by their own noise alone, `act_from(observations, noise)`."""
OPSET = 18
"""The version of ONNX's operators, of 2022: what onnxruntime has run since 1.14."""
_TRACED = 13
"""Rows with which the graph is traced: a number that no size of a network is likely to be mistaken for."""


@dataclass(frozen=True)
class Input:
    """One input of the graph, float32."""

    name: str
    shape: tuple[int, ...]
    """Its further dimensions: the first one is the number of observations."""
    words: str
    """What it is, and its units or its distribution."""

    @property
    def text(self) -> str:
        """The shape in words, such as `(batch, 4)`."""
        return f"({', '.join(['batch', *map(str, self.shape)])})"


@dataclass(frozen=True)
class Graph:
    """An ONNX graph and how it is called."""

    data: bytes
    """The model, in ONNX's own format."""
    inputs: tuple[Input, ...]
    action_size: int


class Acting(nn.Module):
    """An agent of one seed as a function of tensors: observations (B, O) and noise -> actions (B, A).

    inputs: what it takes, in order; which ones, depends on the agent. Raises UserError for an agent whose acting is no
    such function.
    """

    observations_shift: Tensor
    observations_scale: Tensor
    actions_shift: Tensor
    actions_scale: Tensor

    def __init__(self, agent: Agent, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.agent = agent
        self.networks = nn.ModuleDict(agent.networks)
        for name, tensor in preprocessing.state_dict().items():
            self.register_buffer(name.replace(".", "_"), tensor)
        self.lead: tuple[int, ...] = ()
        """The dimensions of the policy's noise that stand before the seeds': its steps, where it has some."""
        self.candidates = 1
        sizes = agent.observation_size, agent.action_size
        inputs = [Input("observation", sizes[:1], "as the environment gives it, in its units")]
        deterministic = agent.config.policy_kind == "deterministic"
        if isinstance(agent, QWeightedAgent | IDQLAgent):
            self.candidates = agent.config.act_candidates
        elif isinstance(agent, Planner) or not (
            deterministic or isinstance(agent, DiffusionBCAgent | FQLAgent | QAMAgent)
        ):
            raise UserError(_refusal(agent))
        self.deterministic = deterministic
        if not self.deterministic:
            zeros = torch.zeros(1, 1, sizes[0])
            self.lead = tuple(agent.policy.sampling_noise(zeros, torch.Generator(), self.candidates).shape[:-3])
            shape = (*self.lead, *self._each, sizes[1])
            inputs.append(Input("noise", shape, "drawn anew for each call from the standard normal distribution"))
        if self.chooses and bool(getattr(agent.config, "act_temperature", 0)):
            words = "drawn anew for each call from the standard Gumbel distribution (`numpy.random.Generator.gumbel`)"
            inputs.append(Input("gumbel", (self.candidates,), words))
        self.inputs = tuple(inputs)

    @property
    def chooses(self) -> bool:
        """Whether critics choose between several actions."""
        return self.candidates > 1

    @property
    def _each(self) -> tuple[int, ...]:
        """The dimension of the candidates, where there are several."""
        return (self.candidates,) if self.chooses else ()

    def forward(self, observation: Tensor, noise: Tensor | None = None, gumbel: Tensor | None = None) -> Tensor:
        """Actions (B, A), from the inputs that `inputs` names."""
        B, K = observation.shape[0], self.candidates
        z = ((observation - self.observations_shift) / self.observations_scale).unsqueeze(0)
        if noise is None:
            actions = self.agent.act(z, torch.Generator())
        else:
            # (B, ..., K, A), a row an observation -> the policy's own (..., S, B K, A).
            drawn = noise.reshape(B, *self.lead, K, self.agent.action_size).movedim(0, -3)
            drawn = drawn.reshape(*self.lead, 1, B * K, self.agent.action_size)
            actions = self._act(z, drawn, gumbel)
        return (actions * self.actions_scale + self.actions_shift)[0]

    def _act(self, z: Tensor, noise: Tensor, gumbel: Tensor | None) -> Tensor:
        if isinstance(self.agent, QWeightedAgent | IDQLAgent):
            shape = (1, z.shape[1], self.candidates)
            choice = z.new_zeros(shape) if gumbel is None else gumbel.reshape(shape)
            return self.agent.act_from(z, CandidateNoise(noise, choice))
        assert isinstance(self.agent, _PLAIN)
        return self.agent.act_from(z, noise)


def _refusal(agent: Agent) -> str:
    name = agent.config.name
    if isinstance(agent, Planner):
        why = "follows plans from call to call, and a graph has no memory"
    elif name == "q_guidance":
        why = "takes gradients of its critics as it acts"
    else:
        why = "does not act by a plain function of tensors that is known here"
    return _refused(agent, f"it {why}")


def _refused(agent: Agent, why: str) -> str:
    return f"The agent {agent.config.name} cannot be exported as ONNX: {why}. Without --onnx it can be exported."


def _reason(error: BaseException) -> str:
    """The first sentence of what lies below the exporter's error, which itself says in colours where reports go."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = re.sub(r"\x1b\[[0-9;]*m", "", said_by(error))
    return re.split(r"(?<=[.!?])\s", line, maxsplit=1)[0].rstrip(".")


def write_graph(agent: Agent, preprocessing: Preprocessing) -> Graph:
    """The graph of an agent of one seed, on the CPU, with the scales of observations and actions within.

    Raises UserError where the agent cannot be exported, or the extra `onnx` is not installed.
    """
    acting = Acting(agent, preprocessing).eval()
    try:
        import onnx
        import onnxscript as _  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"--onnx needs {error.name}, which is not installed: pip install 'diffrl[onnx]' brings it."
        ) from error
    examples = tuple(torch.zeros(_TRACED, *given.shape) for given in acting.inputs)
    batch = torch.export.Dim("batch", min=1)
    try:
        with _quietly(), torch.no_grad():
            program = torch.onnx.export(
                acting,
                examples,
                dynamo=True,
                opset_version=OPSET,
                input_names=[given.name for given in acting.inputs],
                output_names=["action"],
                dynamic_shapes=tuple({0: batch} for _ in examples),
                verbose=False,
            )
            assert program is not None
            model = program.model_proto
    except Exception as error:  # whatever the exporter makes of an agent of another package
        raise UserError(_refused(agent, _reason(error))) from error
    model.producer_name, model.doc_string = "diffrl", f"{agent.config.name}, seed {agent.seeds[0]}"
    del model.metadata_props[:]
    for node in model.graph.node:  # the exporter notes down where in which file each comes from
        del node.metadata_props[:]
        node.doc_string = ""
    onnx.checker.check_model(model, full_check=True)
    return Graph(model.SerializeToString(), acting.inputs, agent.action_size)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """In the block the exporter says nothing of itself."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def usage(graph: Graph, parts: Sequence[Part] = ()) -> str:
    """How the graph is called, in Markdown: names, shapes and units of what it takes and gives, and an example.

    parts: the arrays that the environment gives as an observation, which the graph takes as one vector; (): it gives
    that vector.
    """
    rows = ["| input | shape (float32) | what it is |", "| --- | --- | --- |"]
    rows += [f"| `{given.name}` | {given.text} | {_words(given, parts)} |" for given in graph.inputs]
    return "\n".join(
        [
            "`policy.onnx` is the same policy as a graph, for onnxruntime and others; scaling is within.",
            "",
            *rows,
            "",
            f"It gives `action`, (batch, {graph.action_size}), in the environment's units. It checks nothing: of an "
            "observation that is not finite, which `load_policy` refuses, it makes an action that is not, or means "
            "nothing.",
            "",
            "```python",
            "import numpy as np",
            "import onnxruntime",
            "",
            'session, rng = onnxruntime.InferenceSession("policy.onnx"), np.random.default_rng()',
            *_example(graph.inputs, parts),
            "```",
        ]
    )


def _words(given: Input, parts: Sequence[Part]) -> str:
    if given.name != "observation" or not parts:
        return given.words
    if not parts[0].path:
        return f"flattened: `observation.reshape(-1)` of the environment's {parts[0].shape}, in its units"
    return f"the environment's parts, flattened and joined in this order: {', '.join(map(str, parts))}, in its units"


def _example(inputs: Sequence[Input], parts: Sequence[Part]) -> Iterator[str]:
    vector = "observation"
    if parts:
        each = ["observation" + "".join(f"[{key!r}]" for key in part.path) for part in parts]
        vector = f"np.concatenate([{', '.join(f'np.ravel({one})' for one in each)}])"
    yield "inputs = {"
    yield f'    "observation": {vector}[None].astype(np.float32),'
    for given in inputs[1:]:
        draw = "standard_normal" if given.name == "noise" else "gumbel"
        size = f"{(1, *given.shape)}"
        drawn = f"rng.gumbel(size={size})" if draw == "gumbel" else f"rng.standard_normal({size})"
        yield f'    "{given.name}": {drawn}.astype(np.float32),'
    yield "}"
    yield '(action,) = session.run(["action"], inputs)[0]'
