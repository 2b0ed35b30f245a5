"""What fine-tuning asks of an image model, and the network under training beside its frozen reference."""

import contextlib
import copy
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffrl.diffusion import Network, Prediction
from diffrl.diffusion.prediction import Clip
from diffrl.support.errors import UserError, closest, counted, listed
from diffrl.training.loop import DivergedError

Condition = dict[str, Tensor]
"""What a network is told beside x and t, an entry an argument, each with one row a sample (B, ...)."""


class ImageModel(Protocol):
    """A diffusion or flow model of images as the trainer sees it: pixel or latent space, U-Net or transformer.

    States x are (B, *shape), float32; images (B, 3 or 1, H, W) in [0, 1], of a video (B, F, 3, H, W). Everything is on
    `device`.
    """

    name: str
    device: torch.device
    prediction: Prediction
    """What the network predicts, and on which process. Its times t are the process's own; `network` translates them."""
    shape: tuple[int, ...]
    """The shape of one state: (C, H, W), of latents where the model has an autoencoder; of a video (F, C, H, W)."""
    clip: Clip | None
    """The bounds to which the model's own sampler clamps D(x, t); None: it does not clamp."""
    tuned: "Tuned"
    """The network under training."""
    extras: tuple[str, ...]
    """Which images the model takes beside prompts: "control", "reference"; most take none."""

    def times(self, steps: int) -> Tensor:
        """The steps + 1 decreasing times of sampling, ending at 0: the grid that the model's own pipeline uses."""

    def training_times(self, n: int, generator: torch.Generator) -> Tensor:
        """n random times t > 0 as the model was trained with, on its device."""

    def conditions(self, prompts: Sequence[str], extras: Mapping[str, Tensor] | None = None) -> Condition:
        """The prompts, encoded, one row each, without a graph.

        extras: images (B, 3, H, W) in [0, 1] beside the prompts, by what they are for. Raises UserError for a prompt
        that the model cannot take, and for extras that it has no use for or lacks.
        """

    def network(self, condition: Condition, *, reference: bool = False, guidance: float = 1.0) -> Network:
        """The raw network with `condition` bound: (x, t) -> what `prediction` says, t a scalar or one value a row.

        reference: the frozen one, without a graph. guidance: classifier-free, in one call of twice the batch; 1: none.
        """

    def decode(self, x0: Tensor) -> Tensor:
        """Clean states (B, *shape) as images in [0, 1]; differentiable."""

    def encode(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as clean states, without a graph: the inverse of `decode`, to the autoencoder's error."""

    def save(self, folder: Path) -> None:
        """Write what was trained into `folder` (it exists), so that plain diffusers or peft loads it."""


def loss_guidance(model: ImageModel, guidance: float) -> float:
    """The number that a denoising loss tells a model that is sampled with `guidance`.

    The same, where guidance is an input of the network (FLUX.1-dev), which is another model at each; else 1: the
    network's own answer is what classifier-free guidance is made of.
    """
    return guidance if getattr(model, "guidance_is_input", False) else 1.0


@torch.no_grad()
def image_shape(model: ImageModel) -> tuple[int, ...]:
    """The shape of one image that the model makes: (C, H, W); of a video (F, C, H, W)."""
    return tuple(model.decode(torch.zeros(1, *model.shape, device=model.device)).shape[1:])


class NotFinite(DivergedError):
    """Images with pixels that are no finite numbers: the model that makes them has no more to give."""


def decoded(model: ImageModel, x0: Tensor, number: int, updates: int) -> Tensor:
    """The images of clean states (B, *shape), which a model has made in round `number`, after so many updates.

    Raises NotFinite where a pixel is not finite: no reward is asked about it, as some would score it as good.
    """
    images = model.decode(x0)
    good = [torch.isfinite(values.detach()).flatten(1).all(1) for values in (x0, images)]
    bad = len(x0) - int((good[0] & good[1]).sum())
    if not bad:
        return images
    of = f"{bad} of {len(x0)} images sampled together have pixels that are no finite numbers"
    if updates == 0:
        raise NotFinite(f"Before any training {of}: the model's weights are damaged, or --precision is too low for it.")
    raise NotFinite(f"Round {number}: {of}. Training has diverged and stops; a lower --lr usually helps.")


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) by peft."""

    rank: int = 4
    alpha: int | None = None
    """The adapters' output is scaled by alpha / rank; None: alpha is the rank."""
    targets: tuple[str, ...] | None = None
    """Ends of the names of the layers that get one, or in which all get one, in whole parts between dots; "all": all
    Linear and Conv2d layers; None: all projections of attention, as DDPO has it."""
    named: bool = False
    """Whether a person named them: each must then be there."""
    source: str = field(default="", compare=False)
    """The file that the adapters are read from, where they are not new."""


class Origin(NamedTuple):
    """A built-in model's name, and the SHA-256 digest of the file of its weights."""

    name: str
    digest: str


class OtherModel(UserError):
    """A network that lacks what another one had. `difference`: a clause that says what."""

    def __init__(self, text: str, difference: str) -> None:
        super().__init__(text)
        self.difference = difference


def _difference(kind: str, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> str:
    """A clause on saved parameters whose names or shapes are not a network's own; kind: its class."""
    gone, new = (
        {
            name.partition(".lora_")[0] if ".lora_" in name else name.rpartition(".")[0] or name
            for name in one.keys() - other
        }
        for one, other in ((saved, own), (own, saved))
    )
    if gone:
        return f"the {kind} there now has no {_few(gone)}" + (f", but {_few(new)}" if new else "")
    if new:
        return f"the {kind} there now has {_few(new)} besides"
    name = next(name for name in own if own[name].shape != saved[name].shape)
    now, was = (" x ".join(map(str, of[name].shape)) for of in (own, saved))
    return f"the {kind} there now has {name} of {now}, before {was}"


def _few(layers: Collection[str]) -> str:
    """The first of some layers, and how many more there are."""
    first, more = min(layers), len(layers) - 1
    return f"{first} and {counted(more, 'more layers')}" if more else first


class Tuned:
    """A network under training beside its frozen reference: itself with its adapters off, or, trained whole, a copy.

    network: any module; it is put into evaluation mode (no dropout, so that ratios start at 1) and stays there.
    lora: adapters, or None to train all of it. Adapters begin at zero, so the network begins as its reference.
    seed: of the adapters' initial weights.
    trained: whether it is trained at all; a network that is not, without adapters, has no copy for a reference.
    precision: of the network's inner computation: fp32, or bf16 and fp16 by autocast (parameters under training stay
        float32; give a frozen network in half precision to save its memory too).

    Raises OtherModel where no layer has a name that ends as `lora.targets` says.
    """

    def __init__(
        self,
        network: nn.Module,
        lora: Lora | None = None,
        precision: str = "fp32",
        seed: int = 0,
        *,
        trained: bool = True,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.lora = lora
        self.precision = precision
        self.origin: Origin | None = None
        """The built-in model whose weights the network began with; adapters name it."""
        self._copy: nn.Module | None = None
        self._stand_in: dict[str, Tensor] | None = None
        if lora is None and trained:
            self._copy = copy.deepcopy(network)
            network.requires_grad_(True)
        elif lora is not None:
            with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
                torch.manual_seed(seed)
                _inject(network, lora)
        for parameter in self.parameters().values():
            parameter.data = parameter.data.float()

    def narrow(self, layers: Sequence[str]) -> None:
        """Train only the layers whose names end so, with all that is in them, of a network that is trained whole.

        The others are frozen, and the reference's copies of them are freed. Raises UserError, with names that there
        are, for one that no layer with weights has.
        """
        assert self._copy is not None, "adapters are on layers of their own"
        weighted = {name for name, layer in self.network.named_modules() if any(True for _ in layer.parameters())}
        for end in layers:
            _check_layer(self.network, end, weighted, "has no weights")
        copied = dict(self._copy.named_parameters())
        for name, parameter in self.parameters().items():
            if not _within(name.rpartition(".")[0], layers):
                parameter.requires_grad_(False)
                copied[name].data = parameter.data

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters under training, by name, in the network's order."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def __call__(self, *arguments: Any, reference: bool = False, **named: Any) -> Any:
        """Call the network, or its reference (without a graph)."""
        kind = next(self.network.parameters()).device.type
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision, torch.float32)
        with torch.autocast(kind, dtype, enabled=self.precision != "fp32"):
            if not reference and self._stand_in is None:
                return self.network(*arguments, **named)
            with torch.no_grad():
                if not reference:
                    return torch.func.functional_call(self.network, self._stand_in or {}, arguments, named)
                if self._copy is not None:
                    return self._copy(*arguments, **named)
                switch_adapters(self.network, on=False)
                try:
                    return self.network(*arguments, **named)
                finally:
                    switch_adapters(self.network, on=True)

    @contextlib.contextmanager
    def standing_in(self, parameters: dict[str, Tensor]) -> Iterator[None]:
        """Within it calls are made with these parameters, by name, in place of those under training; without a graph.

        The reference stays what it is. Graphs made outside are not touched.
        """
        before, self._stand_in = self._stand_in, parameters
        try:
            yield
        finally:
            self._stand_in = before

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the parameters under training, by name."""
        return {name: p.detach().clone() for name, p in self.parameters().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy a `state_dict` back. Raises OtherModel where names or shapes differ."""
        own = self.parameters()
        if {n: p.shape for n, p in own.items()} != {n: t.shape for n, t in state.items()}:
            difference = _difference(type(self.network).__name__, own, state)
            raise OtherModel(f"The saved parameters are another model's: {difference}.", difference)
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])


def switch_adapters(network: nn.Module, *, on: bool) -> None:
    """Turn all of a network's peft adapters on or off."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(on)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Without the warnings that libraries log when they are imported: of kernels for other processors, say."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""Projections of attention: the layers that get adapters by default."""


def _within(name: str, ends: Sequence[str]) -> bool:
    """Whether a layer of this dotted name is, or lies in, one whose name ends in whole parts so; all are in "all"."""
    return "all" in ends or any(outer == end or outer.endswith(f".{end}") for outer in _outer(name) for end in ends)


def _outer(name: str) -> Iterator[str]:
    """The dotted names of the layers that hold one, and its own."""
    parts = name.split(".")
    return (".".join(parts[: n + 1]) for n in range(len(parts)))


def _check_layer(network: nn.Module, end: str, known: Collection[str], fault: str) -> None:
    """Raise UserError where no layer of the `known` names ends so; `fault`: what is said of one that others have.

    Where no layer at all does it is an OtherModel: a run that goes on once had it.
    """
    if any(_within(name, [end]) for name in known):
        return
    kind = type(network).__name__
    if any(_within(name, [end]) for name, _ in network.named_modules()):
        raise UserError(f"--layers: {end} of {kind} {fault}.")
    last = {re.sub(r"^.*?([^.]+(\.\d+)?)$", r"\1", outer) for name in known for outer in _outer(name)} - {""}
    close = closest(end, last)
    named = [name for name in last if not re.search(r"\.\d+$", name) or name == "to_out.0"]
    meant = f"names end in {listed(named, 40)}." if close is None else f"did you mean {close}?"
    text = f"--layers: no layer of {kind} has a name that ends in {end}: {meant}"
    raise OtherModel(text, f"the {kind} there now has no {end}")


def _inject(network: nn.Module, lora: Lora) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    targets = ATTENTION if lora.targets is None else lora.targets
    adaptable = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    names = [name for name in adaptable if _within(name, targets)]
    if lora.named:
        for end in targets:
            _check_layer(network, end, adaptable, "takes no adapters: Linear and Conv2d layers do")
    if not names and lora.source:
        raise UserError(
            f"{lora.source} holds adapters of another model: they are on {targets[0]} and the like, and this model's "
            f"{type(network).__name__} has no such layers."
        )
    if not names:
        raise OtherModel(
            f"{type(network).__name__} has no layer whose name ends in {listed(targets, 4)}, so there is nothing to "
            "adapt: name others by --layers, or train the whole network (--lora 0).",
            f"the {type(network).__name__} there now has no {_few(targets)}",
        )
    alpha = lora.rank if lora.alpha is None else lora.alpha
    settings = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=names, init_lora_weights="gaussian")
    with unheard():  # peft imports torchao here, where it is installed
        inject_adapter_in_model(settings, network)
