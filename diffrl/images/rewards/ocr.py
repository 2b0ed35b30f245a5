"""Is the text in the image? Optical character recognition by RapidOCR, whose wheel holds the networks (PP-OCRv4).

The reward of Flow-GRPO (Liu et al. 2025, arXiv 2505.05470, section 4.1): 1 - d / n, d the edit distance between the n
letters wanted and what is read, at most n; 1 where the text stands anywhere in what is read. Blanks and case do not
count.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffrl.images.rewards.base import Metadata, RewardError
from diffrl.images.rewards.codecs import Pixels, to_uint8
from diffrl.support.errors import UserError

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”|„([^“”]+)[“”]')
"""The text that a prompt wants to be written, as in: a shop sign that says "OPEN"."""


class OCR:
    """How well `text` can be read in an image, in [0, 1]; not differentiable.

    text: "" for each prompt's own: what its metadata call "text", else what stands in quotation marks in it.

    Raises UserError where RapidOCR is not installed; a call raises RewardError for a prompt that wants no text.
    """

    differentiable = False

    def __init__(self, text: str = "") -> None:
        self.name = f"ocr:{text}" if text else "ocr"
        self.text = text
        if text and not letters(text):
            raise UserError(f"ocr:{text}: the argument is the text to be read")
        try:
            from rapidfuzz.distance import Levenshtein
            from rapidocr_onnxruntime import RapidOCR
        except ModuleNotFoundError as error:
            raise UserError(
                f"The reward ocr needs {error.name}, which is not installed: pip install 'diffrl[ocr]' brings it."
            ) from error
        self._distance = Levenshtein.distance
        self._reader = RapidOCR(intra_op_num_threads=torch.get_num_threads())

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Tensor:
        """The reward's values (B,), one an image."""
        wanted = self._all_wanted(prompts, metadata)
        found = [self.read(pixels) for pixels in to_uint8(images)]
        values = [self.value(text, read) for text, read in zip(wanted, found, strict=True)]
        return torch.tensor(values, dtype=torch.float32, device=images.device)

    def read(self, pixels: Pixels) -> str:
        """The text in an image, its lines joined; "" where there is none."""
        lines, _ = self._reader(pixels[:, :, ::-1].copy())  # OpenCV's order of colours
        return "".join(line[1] for line in lines or [])

    def value(self, wanted: str, read: str) -> float:
        """The reward for `read` where `wanted` was to be read."""
        wanted, read = letters(wanted), letters(read)
        if wanted in read:
            return 1.0
        return 1 - min(int(self._distance(wanted, read)), len(wanted)) / len(wanted)

    def check_prompts(self, prompts: Sequence[str], metadata: Metadata) -> None:
        """Raise RewardError for a prompt that wants no text."""
        self._all_wanted(prompts, metadata)

    def _all_wanted(self, prompts: Sequence[str], metadata: Metadata) -> list[str]:
        """The text that each prompt wants."""
        return [self._wanted(prompt, row) for prompt, row in zip(prompts, metadata, strict=True)]

    def _wanted(self, prompt: str, row: Mapping[str, Any]) -> str:
        if self.text:
            return self.text
        quoted = QUOTED.search(prompt)
        text = row.get("text") or (next(filter(None, quoted.groups())) if quoted else "")
        if not isinstance(text, str) or not letters(text):
            raise RewardError(
                f'{self.name}: which text is to be read? The prompt {prompt!r} has none in "quotation marks", and no '
                '"text" beside it; or give ocr:TEXT.'
            )
        return text


def letters(text: str) -> str:
    """What counts of a text: without blanks, in lower case."""
    return "".join(text.split()).lower()
