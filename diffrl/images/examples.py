"""What a run reads: examples (images with prompts, control or reference images beside them), videos, pairs, prompts.

A folder is laid out as Hugging Face's imagefolder: files, and a `metadata.jsonl` beside them with a line an example:

    {"file_name": "a/1.png", "text": "a red cube", "control": "a/1-edges.png", "reference": "a/0.png"}
    {"frames": ["b/0.png", "b/1.png"], "text": "a cube falls"}                       a video, frame by frame
    {"file_name_w": "c/1.png", "file_name_l": "c/2.png", "text": "a red cube"}       a pair: the preferred, the other

`control` and `reference`, of pairs too, are optional, but either all examples of a folder have one or none has; a model
reads those that it has a use for. Names are relative to the folder. In place of file_name_w and file_name_l,
`preferred` and `rejected` are understood. Images of any size are scaled and cropped, about their centre, to the size
that is asked for; transparency shows white.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from diffrl.images.lists import METADATA, metadata_rows
from diffrl.images.model import ImageModel, image_shape
from diffrl.images.models.digits import digits
from diffrl.images.models.loading import images_extra
from diffrl.support.errors import DataError, UserError, first_line, nearest
from diffrl.support.files import plain_file

EXTRAS = ("control", "reference")
"""The images that may stand beside an example's own, by their keys in a folder's metadata and in a batch."""
_PAIR_KEYS = {"file_name_w": "preferred", "file_name_l": "rejected"}


class ImageBatch(NamedTuple):
    """B examples: images (B, C, H, W), of videos (B, F, C, H, W), in [0, 1], their prompts and extras."""

    images: Tensor
    prompts: list[str]
    extras: dict[str, Tensor]
    """The images beside them, by name, each (B, C, H, W) in [0, 1]."""


class ImagePairBatch(NamedTuple):
    """B pairs of one prompt each: the preferred images and the others, (B, C, H, W) in [0, 1], and extras."""

    images_w: Tensor
    images_l: Tensor
    prompts: list[str]
    extras: dict[str, Tensor]
    """The images beside a pair, by name, each (B, C, H, W) in [0, 1]."""


class ImageSource(Protocol):
    """Examples that are drawn by their number: what supervised fine-tuning learns from."""

    @property
    def prompts(self) -> Sequence[str]:
        """The prompts of all examples, in their order."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> ImageBatch:
        """The examples of an index (B,) of integers; float32, on the CPU."""


class Examples:
    """Examples of a folder, read when they are asked for.

    folder: with a metadata.jsonl, see the top of this file.
    size: (H, W) of the images given, in pixels.
    channels: 3 or 1, of images and extras alike.
    frames: F for videos, the first F of each example's; 0: images.
    reference: whether videos go on from a reference image, by default their first frame, and need no prompt.
    extras: which of the images beside an example's own are read, where there are some; a folder may have more.

    Raises DataError, which names the file and the line: no such folder or file, no metadata, a line that is no JSON
    object, keys that are missing, no examples; and, from `batch`, an image that cannot be read.
    """

    def __init__(
        self,
        folder: Path | str,
        size: tuple[int, int],
        *,
        channels: int = 3,
        frames: int = 0,
        reference: bool = True,
        extras: Sequence[str] = EXTRAS,
    ) -> None:
        self.folder, self.size, self.channels, self.frames = Path(folder), size, channels, frames
        _check_format(size, channels)
        self._images: list[list[Path]] = []
        self.prompts: list[str] = []
        self._extras: dict[str, list[Path]] = {}
        named: dict[str, list[int]] = {}
        for line, row in metadata_rows(self.folder):
            where = f"{self.folder / METADATA}, line {line}"
            self._images.append(self._files(row, where))
            self.prompts.append(_text(row, where, required=frames == 0 or not reference))
            _add_extras(self._extras, named, self.folder, row, extras, line)
        _check_extras(named, self.folder, len(self))
        if frames > 0 and reference:
            self._extras.setdefault("reference", [files[0] for files in self._images])

    def _files(self, row: Mapping[str, Any], where: str) -> list[Path]:
        if self.frames == 0:
            if "file_name" not in row and "frames" in row:
                raise DataError(
                    f"{where}: this is a video, by its frames; the model makes images and needs file_name. Wan makes "
                    "videos with --frames N."
                )
            return [_file(self.folder, _value(row, "file_name", where), "file_name", where)]
        names = _value(row, "frames", where)
        if not isinstance(names, list) or len(names) < self.frames:
            got = f"{len(names)} names" if isinstance(names, list) else repr(names)
            raise DataError(f"{where}: frames must list at least {self.frames} file names, in order; got {got}.")
        return [_file(self.folder, name, "frames", where) for name in names[: self.frames]]

    def __len__(self) -> int:
        return len(self._images)

    @property
    def metadata(self) -> list[dict[str, str]]:
        """The files of what stands beside each example, as `extras_of` reads them."""
        return _metadata(self._extras, len(self))

    def batch(self, index: Tensor) -> ImageBatch:
        """The examples of an index (B,) of integers; float32, on the CPU."""
        chosen = index.tolist()
        images = torch.stack([torch.stack([self._read(file) for file in self._images[i]]) for i in chosen])
        if self.frames == 0:
            images = images[:, 0]
        extras = {name: torch.stack([self._read(files[i]) for i in chosen]) for name, files in self._extras.items()}
        return ImageBatch(images, [self.prompts[i] for i in chosen], extras)

    def _read(self, file: Path) -> Tensor:
        return read_image(file, self.size, self.channels)


class ImagePairs:
    """Preference pairs of a folder, for offline Diffusion-DPO; arguments and errors are those of `Examples`."""

    def __init__(
        self, folder: Path | str, size: tuple[int, int], *, channels: int = 3, extras: Sequence[str] = EXTRAS
    ) -> None:
        self.folder, self.size, self.channels = Path(folder), size, channels
        _check_format(size, channels)
        self._files: list[tuple[Path, Path]] = []
        self.prompts: list[str] = []
        self._extras: dict[str, list[Path]] = {}
        named: dict[str, list[int]] = {}
        for line, row in metadata_rows(self.folder):
            where = f"{self.folder / METADATA}, line {line}"
            w, l = (  # noqa: E741
                _file(self.folder, _value(row, other if other in row else key, where), key, where)
                for key, other in _PAIR_KEYS.items()
            )
            self._files.append((w, l))
            self.prompts.append(_text(row, where, required=True))
            _add_extras(self._extras, named, self.folder, row, extras, line)
        _check_extras(named, self.folder, len(self))

    def __len__(self) -> int:
        return len(self._files)

    @property
    def metadata(self) -> list[dict[str, str]]:
        """The files of what stands beside each pair, as `extras_of` reads them."""
        return _metadata(self._extras, len(self))

    def batch(self, index: Tensor) -> ImagePairBatch:
        """The pairs of an index (B,) of integers; float32, on the CPU."""
        chosen = index.tolist()
        w, l = (  # noqa: E741
            torch.stack([read_image(self._files[i][side], self.size, self.channels) for i in chosen]) for side in (0, 1)
        )
        extras = {
            name: torch.stack([read_image(files[i], self.size, self.channels) for i in chosen])
            for name, files in self._extras.items()
        }
        return ImagePairBatch(w, l, [self.prompts[i] for i in chosen], extras)


class Digits:
    """scikit-learn's 1,797 handwritten digits of 8x8, prompts "0" to "9": examples that need no file.

    size: enlarged to (H, W) by bicubic interpolation. channels: 1, or 3 alike.
    """

    def __init__(self, size: tuple[int, int] = (8, 8), *, channels: int = 1) -> None:
        _check_format(size, channels)
        images, classes = digits()
        if size != (8, 8):
            images = F.interpolate(images, size, mode="bicubic").clamp(0, 1)
        self.images = images.expand(-1, channels, -1, -1)
        """All images, (1797, C, H, W)."""
        self.prompts = [str(label) for label in classes.tolist()]

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, index: Tensor) -> ImageBatch:
        """The examples of an index (B,) of integers; float32, on the CPU."""
        return ImageBatch(self.images[index.cpu()], [self.prompts[i] for i in index.tolist()], {})


def examples_of(data: str | None, model: ImageModel) -> ImageSource:
    """The examples that `--data` names, "digits" or a folder, at the model's size. Raises UserError for None."""
    if data is None:
        raise UserError("Which images? --data FOLDER, with a metadata.jsonl: one {file_name, text} a line.")
    *_, c, h, w = image_shape(model)
    return Digits((h, w), channels=c) if data == "digits" else folder_examples(data, model)


def folder_examples(folder: str, model: ImageModel) -> Examples:
    """The examples of a folder at the model's size; for a video model, with as many frames as it makes."""
    *frames, c, h, w = image_shape(model)
    reference = "reference" in model.extras
    n = frames[0] if frames else 0
    return Examples(folder, (h, w), channels=c, frames=n, reference=reference, extras=model.extras)


def folder_pairs(folder: Path, model: ImageModel) -> ImagePairs:
    """The pairs of a folder at the model's size, with the images beside them that the model takes.

    Raises DataError where these are missing.
    """
    *_, c, h, w = image_shape(model)
    pairs = ImagePairs(folder, (h, w), channels=c, extras=model.extras)
    for name in model.extras:
        if not all(name in of for of in pairs.metadata):
            raise DataError(
                f"{folder / METADATA} names no {name!r} images, and the model needs one beside each pair: lines "
                f'such as {{"file_name_w": "1.png", "file_name_l": "2.png", "text": "a cat", "{name}": "3.png"}}.'
            )
    return pairs


def extras_of(
    metadata: Sequence[Mapping[str, Any]], names: Sequence[str], size: tuple[int, int], channels: int = 3
) -> dict[str, Tensor]:
    """The images whose files the metadata of some prompts give under `names`: (B, C, H, W) each.

    Raises DataError where some prompts have one and some do not, and as `read_image` does.
    """
    extras = {}
    for name in names:
        files = [_path(entry[name], name) for entry in metadata if entry.get(name) is not None]
        if files and len(files) < len(metadata):
            raise DataError(f"{len(files)} of {len(metadata)} prompts have a {name!r} image: give all one, or none.")
        if files:
            extras[name] = torch.stack([read_image(file, size, channels) for file in files])
    return extras


def _path(name: Any, key: str) -> Path:
    if not isinstance(name, str):
        raise DataError(f"a prompt's {key!r} must be the name of an image file, got {name!r}.")
    return Path(name)


def read_image(file: Path, size: tuple[int, int], channels: int = 3) -> Tensor:
    """An image file, (C, H, W) in [0, 1], scaled and cropped about its centre to size (H, W).

    Turned as its EXIF data says. Raises DataError where it cannot be read, or has more than 8 bits a channel.
    """
    with images_extra():
        import numpy as np
        from PIL import Image, ImageOps
    try:
        with Image.open(plain_file(file)) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as an image: {first_line(error)}") from error
    if image.mode.startswith(("I", "F")):
        raise DataError(f"{file} has more than 8 bits a channel (PIL's mode {image.mode}); save it with 8.")
    if "A" in image.getbands() or "transparency" in image.info:
        above = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", above.size, "white"), above)
    image = image.convert("RGB" if channels == 3 else "L")
    image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image)).reshape(*size, channels)
    return pixels.permute(2, 0, 1).float() / 255


def _check_format(size: tuple[int, int], channels: int) -> None:
    if channels not in (1, 3) or min(size) < 1:
        raise ValueError(f"need a size of at least 1x1 and 1 or 3 channels, got {size} and {channels}")


def _add_extras(
    files: dict[str, list[Path]],
    lines: dict[str, list[int]],
    folder: Path,
    row: Mapping[str, Any],
    names: Sequence[str],
    line: int,
) -> None:
    """Add the files that a row names under `names` to those of each name, and the row's line to `lines`."""
    for name in names:
        if row.get(name) is not None:
            where = f"{folder / METADATA}, line {line}"
            files.setdefault(name, []).append(_file(folder, row[name], name, where))
            lines.setdefault(name, []).append(line)


def _check_extras(lines: Mapping[str, list[int]], folder: Path, n: int) -> None:
    """Raise DataError where some of n examples have an image beside them, in these lines, and some have not."""
    for name, having in lines.items():
        if len(having) < n:
            raise DataError(
                f"{folder / METADATA}: {len(having)} of {n} examples have a {name!r} image, line {having[0]} for one; "
                "give it to all of them or to none."
            )


def _metadata(extras: Mapping[str, Sequence[Path]], n: int) -> list[dict[str, str]]:
    """The files beside each of n examples, by name."""
    return [{name: str(files[i]) for name, files in extras.items()} for i in range(n)]


def _value(row: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise DataError(f"{where}: no {key!r}; it has {', '.join(map(repr, row)) or 'nothing'}.")
    return row[key]


def _text(row: Mapping[str, Any], where: str, *, required: bool) -> str:
    if not required and "text" not in row:
        return ""
    if "text" not in row:
        raise DataError(f"{where}: no 'text', the prompt; {nearest('text', row)}")
    if not isinstance(row["text"], str):
        raise DataError(f"{where}: text must be a string, got {row['text']!r}.")
    return row["text"]


def _file(folder: Path, name: Any, key: str, where: str) -> Path:
    if not isinstance(name, str) or not name:
        raise DataError(f"{where}: {key} must be the name of a file, got {name!r}.")
    file = folder / name
    if not file.is_file():
        raise DataError(f"{where}: {key} names {name}, and there is no such file in {folder}.")
    return file
