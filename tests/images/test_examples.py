"""Examples: what is written comes back, pixel by pixel and in order; what is wrong is named by file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffrl.images.algorithms.dpo import FolderPairs
from diffrl.images.examples import Digits, Examples, ImagePairs, extras_of
from diffrl.images.lists import METADATA
from diffrl.support.errors import DataError, UserError
from tests.images.toy import Toy

pytest.importorskip("PIL")


def picture(file: Path, seed: int, size: tuple[int, int] = (6, 8)) -> Tensor:
    """Write random pixels (3, H, W) in [0, 1] as a PNG."""
    from PIL import Image

    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(file)
    return pixels.permute(2, 0, 1) / 255


def describe(folder: Path, *rows: dict[str, Any]) -> Path:
    (folder / METADATA).write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return folder


def test_images_prompts_and_extras_come_back_in_order(tmp_path: Path) -> None:
    written = [picture(tmp_path / f"a/{i}.png", i) for i in range(3)]
    controls = [picture(tmp_path / f"control{i}.png", 10 + i) for i in range(3)]
    texts = ["a", "b\u2028b", "c"]
    rows = [{"file_name": f"a/{i}.png", "text": texts[i], "control": f"control{i}.png"} for i in range(3)]
    examples = Examples(describe(tmp_path, *rows), (6, 8))
    images, prompts, extras = examples.batch(torch.tensor([2, 0]))
    assert len(examples) == 3
    assert examples.prompts == texts
    assert torch.equal(images, torch.stack([written[2], written[0]]))
    assert prompts == ["c", "a"]
    assert extras.keys() == {"control"}
    assert torch.equal(extras["control"], torch.stack([controls[2], controls[0]]))


def test_mixed_sizes_are_scaled_and_cropped_about_the_centre(tmp_path: Path) -> None:
    from PIL import Image

    wide = torch.zeros(4, 12, 3, dtype=torch.uint8)
    wide[:, 4:8] = 255  # the middle third is white, and is all that a square crop of the height keeps
    Image.fromarray(wide.numpy()).save(tmp_path / "wide.png")
    picture(tmp_path / "tall.png", 0, (20, 5))
    rows = [{"file_name": "wide.png", "text": ""}, {"file_name": "tall.png", "text": ""}]
    images = Examples(describe(tmp_path, *rows), (4, 4), channels=1).batch(torch.arange(2)).images
    assert images.shape == (2, 1, 4, 4)
    assert torch.equal(images[0], torch.ones(1, 4, 4))


def test_transparency_shows_white_and_the_camera_is_turned(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    turned = Image.new("RGB", (4, 2))
    turned.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise: the upper left pixel is then the upper right one
    turned.save(tmp_path / "turned.png", exif=exif)
    rows = [{"file_name": "clear.png", "text": ""}, {"file_name": "turned.png", "text": ""}]
    describe(tmp_path, *rows)
    assert torch.equal(Examples(tmp_path, (2, 2)).batch(torch.tensor([0])).images, torch.ones(1, 3, 2, 2))
    image = Examples(tmp_path, (4, 2)).batch(torch.tensor([1])).images
    assert image[0, 0, 0].tolist() == [0, 1]
    assert image.sum() == 3


def test_videos_have_their_frames_in_order_and_begin_at_their_reference(tmp_path: Path) -> None:
    frames = torch.stack([picture(tmp_path / f"{i}.png", i) for i in range(4)])
    rows = [{"frames": ["1.png", "0.png", "3.png"]}, {"frames": ["2.png", "3.png", "0.png"], "text": "falls"}]
    images, prompts, extras = Examples(describe(tmp_path, *rows), (6, 8), frames=2).batch(torch.arange(2))
    assert torch.equal(images, torch.stack([frames[[1, 0]], frames[[2, 3]]]))
    assert prompts == ["", "falls"]
    assert torch.equal(extras["reference"], frames[[1, 2]])


@pytest.mark.parametrize(("w", "l"), [("file_name_w", "file_name_l"), ("preferred", "rejected")])
def test_pairs_keep_their_sides(tmp_path: Path, w: str, l: str) -> None:  # noqa: E741
    images = [picture(tmp_path / f"{i}.png", i) for i in range(4)]
    rows = [{w: "0.png", l: "1.png", "text": "a"}, {w: "3.png", l: "2.png", "text": "b"}]
    pairs = ImagePairs(describe(tmp_path, *rows), (6, 8))
    batch = pairs.batch(torch.tensor([1, 0]))
    assert len(pairs) == 2
    assert batch.prompts == ["b", "a"]
    assert torch.equal(batch.images_w, torch.stack([images[3], images[0]]))
    assert torch.equal(batch.images_l, torch.stack([images[2], images[1]]))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("", "is empty"),
        ('{"file_name": "1.png", "text": "a"}\n\n{"file_name": ', "line 3: no JSON"),
        ('["1.png", "a"]', "line 1: expected an object"),
        ('{"file_name": "1.png", "texts": "a"}', "did you mean 'texts'"),
        ('{"text": "a"}', "line 1: no 'file_name'"),
        ('{"file_name": "2.png", "text": "a"}', "line 1: file_name names 2.png, and there is no such file"),
        ('{"file_name": 1, "text": "a"}', "must be the name of a file, got 1"),
        ('{"file_name": "1.png", "text": 1}', "text must be a string"),
        ('{"frames": ["1.png"], "text": "a"}', "this is a video"),
        (
            '{"file_name": "1.png", "text": "a"}\n{"file_name": "1.png", "text": "a", "control": "1.png"}',
            "1 of 2 examples have a 'control' image, line 2 for one",
        ),
    ],
)
def test_metadata_that_is_wrong_is_named_by_line(tmp_path: Path, lines: str, says: str) -> None:
    picture(tmp_path / "1.png", 0)
    (tmp_path / METADATA).write_text(lines)
    with pytest.raises(DataError, match=METADATA) as error:
        Examples(tmp_path, (6, 8))
    assert says in str(error.value)


def test_what_is_no_folder_of_examples_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        Examples(tmp_path / "missing", (8, 8))
    with pytest.raises(DataError, match=f"has no {METADATA}"):
        Examples(tmp_path, (8, 8))
    describe(tmp_path, {"frames": [METADATA], "text": ""})
    with pytest.raises(DataError, match="at least 2 file names"):
        Examples(tmp_path, (8, 8), frames=2)


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "text.png").write_text("no image")
    picture(tmp_path / "whole.png", 0, (64, 64))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    Image.new("I;16", (2, 2)).save(tmp_path / "deep.png")
    names = ("text.png", "cut.png", "deep.png")
    examples = Examples(describe(tmp_path, *({"file_name": name, "text": ""} for name in names)), (8, 8))
    for i, (name, says) in enumerate(zip(names, ("cannot be read", "cannot be read", "more than 8 bits"), strict=True)):
        with pytest.raises(DataError, match=f"{name}.* {says}"):
            examples.batch(torch.tensor([i]))


def test_digits_are_scikit_learns_and_enlarged_smoothly() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    index = torch.tensor([5, 1000])
    images, prompts, extras = Digits().batch(index)
    assert torch.equal(images[:, 0] * 16, torch.as_tensor(data.images[index.numpy()], dtype=torch.float32))
    assert prompts == [str(data.target[5]), str(data.target[1000])]
    assert not extras
    large = Digits((32, 32), channels=3)
    assert len(large) == 1797
    assert large.images.shape == (1797, 3, 32, 32)
    assert (F.avg_pool2d(large.images[:, :1], 4) - Digits().images).abs().mean() < 0.05


def test_metadata_of_a_prompt_that_names_no_file_is_said() -> None:
    with pytest.raises(DataError, match="'control' must be the name of an image file, got 5"):
        extras_of([{"control": 5}], ["control"], (8, 8))


def test_pairs_of_equal_images_teach_nothing(tmp_path: Path) -> None:
    """All of them: refused. One pair that differs is enough."""
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png", 0)
    picture(tmp_path / "c.png", 1)
    rows = [{"file_name_w": "a.png", "file_name_l": "b.png", "text": ""} for _ in range(2)]
    with pytest.raises(UserError, match="the two images of every pair are the same"):
        FolderPairs(Toy(), describe(tmp_path, *rows))
    FolderPairs(Toy(), describe(tmp_path, *rows, {**rows[0], "file_name_l": "c.png"}))
