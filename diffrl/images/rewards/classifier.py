"""The reward of a transformers image classifier: how probable it holds a label to be."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffrl.images.models.loading import images_extra
from diffrl.images.rewards import preprocess, pretrained
from diffrl.images.rewards.base import Metadata
from diffrl.support.errors import UserError, nearest


class Classifier:
    """log p(label | image), or p, of an AutoModelForImageClassification; differentiable.

    argument: PATH#LABEL: a folder or hub id, and a label's name or number; without #LABEL, the prompt names the label.
    log: the logarithm, which still has a gradient where the probability is next to nothing.

    Images are prepared as the model's preprocessor_config.json says (`preprocess`). Raises UserError for a model that
    cannot be loaded, and for a label it does not have.
    """

    differentiable = True

    def __init__(self, argument: str, *, log: bool = True, device: str | torch.device = "cpu") -> None:
        path, _, label = argument.partition("#")
        self.name = f"{'classifier' if log else 'classifier-probability'}:{argument}"
        self.log, self.device = log, torch.device(device)
        with images_extra(self.name):
            from transformers import AutoModelForImageClassification
        folder = pretrained.folder(path, self.name)
        self.preprocess = preprocess.read(folder, self.name)
        self.model = pretrained.load(AutoModelForImageClassification, folder, self.name, device)
        self.classes: dict[str, list[int]] = {}  # of each label: one class, as a rule
        for index, name in self.model.config.id2label.items():
            self.classes.setdefault(str(name), []).append(int(index))
        self.label = self.index(label) if label else None

    def index(self, label: str) -> int:
        """The number of a label, given by its name or as a number. Raises UserError where there is none such, or more
        than one."""
        if label in self.classes:
            classes = self.classes[label]
            if len(classes) > 1:
                raise UserError(
                    f"{self.name}: {label!r} is the label of {len(classes)} classes, "
                    f"{', '.join(map(str, classes))}; name one by its number."
                )
            return classes[0]
        if label.isdecimal() and int(label) < self.model.config.num_labels:
            return int(label)
        raise UserError(f"{self.name}: the classifier has no label {label!r}; {nearest(label, self.classes)}")

    def check_prompts(self, prompts: Sequence[str], metadata: Metadata) -> None:
        """Raise UserError for a prompt that is no label, where no other one is asked for."""
        self._wanted(prompts, len(prompts))

    def _wanted(self, prompts: Sequence[str], n: int) -> list[int]:
        """The number of the label that each of n images is to have."""
        return [self.index(p.strip()) for p in prompts] if self.label is None else [self.label] * n

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image."""
        wanted = self._wanted(prompts, len(images))
        logits: Tensor = self.model(pixel_values=self.preprocess(images.to(self.device))).logits
        values = logits.float().log_softmax(-1).gather(1, torch.tensor(wanted, device=self.device)[:, None])[:, 0]
        return (values if self.log else values.exp()).to(images.device)
