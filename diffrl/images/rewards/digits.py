"""Rewards on handwritten digits: does the image look like a given one? For `tiny-digits`, and to see rewards hacked.

scikit-learn's 1,797 digits of 8x8 pixels, in [0, 1] (grey levels / 16), in a fixed random order: the first 750 train
`digit`, the next 750 train `digit-held-out`, both together the digit classifier, and the last 297 test all three. What
a run gains on `digit` and not on the others is not likeness but error of one network (over-optimisation).

Accuracy on the 297, as measured: digit .976 (three layers of 3x3 convolutions), digit-held-out .970 (patches of 4x4,
then dense layers), the digit classifier .987 (a support vector machine: no network, no gradient).
"""

import functools
from collections.abc import Callable, Sequence

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from diffrl.images.models.digits import digits
from diffrl.images.rewards.arguments import named_digit
from diffrl.images.rewards.base import Metadata
from diffrl.support.errors import UserError
from diffrl.support.files import atomic_path, cache_directory, plain_file
from diffrl.support.folder import say_once
from diffrl.support.machine import usual_torch
from diffrl.support.seeds import undrawn

HALF = 750
"""Digits in either half that trains; the rest, 297, is the test."""
STEPS = {False: 700, True: 1500}
"""Steps of training by whether the classifier is held out: `digit`, `digit-held-out`."""
BATCH, LR = 48, 2e-3
NOISE = 0.1
"""Deviation of the Gaussian noise on images in training: samples are never as clean as scans."""

Classify = Callable[[Tensor], Tensor]
"""Images (B, 3 or 1, H, W) in [0, 1] -> probabilities (B, 10)."""


class Digit:
    """The probability that a classifier gives the digit that is wanted, in [0, 1]; differentiable.

    digit: which; None: the one that the prompt names.
    held_out: ask the other classifier, of another architecture and another half of the data.
    """

    differentiable = True

    def __init__(self, digit: int | None = None, *, held_out: bool = False, device: str | torch.device = "cpu") -> None:
        self.name = ("digit-held-out" if held_out else "digit") + ("" if digit is None else f":{digit}")
        self.digit = digit
        self.classifier = classifier(held_out).to(device)
        self.device = torch.device(device)
        self._told = False

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image. Of images in colour it is said once how they are seen."""
        self._tell(images)
        wanted = self._wanted(prompts, len(images))
        probabilities: Tensor = self.classifier(to_8x8(images).to(self.device)).softmax(-1)
        return probabilities.gather(1, torch.tensor(wanted, device=self.device)[:, None])[:, 0].to(images.device)

    def _tell(self, images: Tensor) -> None:
        """Say once that colours are not seen: such images may be of another kind, whose values would mean nothing."""
        if not self._told and images.ndim == 4 and min(images.shape[2:]) >= 8 and images.shape[1] != 1:
            self._told = True
            shape = "x".join(map(str, images.shape[1:]))
            say_once(f"{self.name} is for handwritten digits: it sees images of {shape} in grey, averaged to 1x8x8.")

    def check_prompts(self, prompts: Sequence[str], metadata: Metadata) -> None:
        """Raise UserError for a prompt that names no digit, where no other one is asked for."""
        self._wanted(prompts, len(prompts))

    def _wanted(self, prompts: Sequence[str], n: int) -> list[int]:
        """The digit that each of n images is to be."""
        return [named_digit(p) for p in prompts] if self.digit is None else [self.digit] * n


def to_8x8(images: Tensor) -> Tensor:
    """Images (B, 3 or 1, H, W) as (B, 1, 8, 8): the channels' mean, averaged over areas.

    Raises UserError for another shape, or a smaller image.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or min(images.shape[2:]) < 8:
        raise UserError(f"images of shape {tuple(images.shape)}; digits are (B, 3 or 1, H, W), 8x8 or larger")
    gray = images.float().mean(1, keepdim=True)
    return gray if gray.shape[2:] == (8, 8) else interpolate(gray, size=(8, 8), mode="area")


@functools.cache
def shuffled() -> tuple[Tensor, Tensor]:
    """All digits, (1797, 1, 8, 8) in [0, 1], and their labels (1797,), in the order of the split."""
    images, labels = digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


def unseen() -> tuple[Tensor, Tensor]:
    """The 297 digits that train none of the classifiers, and their labels."""
    images, labels = shuffled()
    return images[2 * HALF :], labels[2 * HALF :]


def _network(held_out: bool) -> nn.Module:
    """Maps (B, 1, 8, 8) to logits (B, 10)."""
    if held_out:
        return nn.Sequential(
            nn.Conv2d(1, 64, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(1024, 128),
            nn.SiLU(),
            nn.Linear(128, 10),
        )
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )


@usual_torch()
def classifier(held_out: bool = False) -> nn.Module:
    """The trained network, frozen; trained at first use (seconds) and kept in the cache folder, `models/`.

    The same on every call on a machine. A file that cannot be read, is another version's, or is not in float32, as a
    caller's default type once made it, is made again.
    """
    path = cache_directory() / "models" / ("digit-held-out-1.safetensors" if held_out else "digit-1.safetensors")
    with undrawn():
        network = _network(held_out)
    try:
        state = safetensors.torch.load_file(plain_file(path))
        network.load_state_dict(state)
        usable = all(tensor.dtype == torch.float32 for tensor in state.values())
    except (OSError, SafetensorError, RuntimeError):
        usable = False
    if not usable:
        network = train(held_out)
        with atomic_path(path) as temporary:
            safetensors.torch.save_file(network.state_dict(), temporary)
    return network.eval().requires_grad_(False)


def train(held_out: bool) -> nn.Module:
    """A network on its half of the digits: Adam with a cosine, shifts by up to a pixel, noise. One seed, one result."""
    images, labels = (half[HALF : 2 * HALF] if held_out else half[:HALF] for half in shuffled())
    steps, generator = STEPS[held_out], torch.Generator().manual_seed(1 + held_out)
    with torch.random.fork_rng(devices=[]):  # layers draw their weights from the global generator
        torch.manual_seed(1 + held_out)
        network = _network(held_out)
    optimiser = torch.optim.Adam(network.parameters(), LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(images), (BATCH,), generator=generator)
            y, x = torch.randint(3, (2,), generator=generator).tolist()
            shifted = padded[rows, :, y : y + 8, x : x + 8]
            noise = NOISE * torch.randn(shifted.shape, generator=generator)
            loss = cross_entropy(network(shifted + noise), labels[rows], label_smoothing=0.02)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    return network


@functools.cache
def digit_classifier() -> Classify:
    """The classifier for the measures of fidelity: support vectors on both halves, with Platt's sigmoids.

    Fitted at use, in a fraction of a second; nothing is kept on disk. No reward: nothing is ever optimised against it.
    """
    images, labels = (part[: 2 * HALF] for part in shuffled())  # scikit-learn's, which is there after this
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.svm import SVC

    machine = CalibratedClassifierCV(SVC(gamma=0.1, C=10.0, random_state=0), ensemble=False)
    machine.fit(images.flatten(1).numpy(), labels.numpy())

    def classify(images: Tensor) -> Tensor:
        probabilities = machine.predict_proba(to_8x8(images.detach()).cpu().flatten(1).numpy())
        return torch.from_numpy(probabilities).to(images.device, torch.float32)

    return classify


def accuracy(classify: Classify) -> float:
    """The share of the test digits that a classifier takes for what they are."""
    images, labels = unseen()
    return (classify(images).argmax(-1) == labels).float().mean().item()
