"""Rich feedback: records written here byte by byte in RichHF-18K's format, and by TensorBoard's writer; the model."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c as outside_crc
from tensorboard.summary.writer.record_writer import RecordWriter

from diffrl.images.rewards import ask, parse
from diffrl.images.rewards.richhf import RichConfig, RichModel
from diffrl.images.rewards.richhf_records import MAPS, SCORES, Feedback, crc32c, example, frames, masked_crc32c, read
from diffrl.support.errors import DataError, UserError
from tests.images.rewards.reward_cases import images


def varint(n: int) -> bytes:
    """Protobuf's numbers: seven bits a byte, the lowest first."""
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def message(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


def feature(value: bytes | float | int, *, packed: bool = True) -> bytes:
    if isinstance(value, bytes):
        return message(1, message(1, value))
    if isinstance(value, float):
        number = struct.pack("<f", value)
        return message(2, message(1, number) if packed else varint(1 << 3 | 5) + number)
    number = varint(value % (1 << 64))
    return message(3, message(1, number) if packed else varint(1 << 3) + number)


def serialise(features: dict[str, bytes | float | int], *, packed: bool = True) -> bytes:
    """A tf.train.Example."""
    entries = [message(1, name.encode()) + message(2, feature(v, packed=packed)) for name, v in features.items()]
    return message(1, b"".join(message(1, entry) for entry in entries))


def heatmap(rows: int, columns: int, seed: int) -> tuple[np.ndarray, bytes]:
    pixels = np.random.default_rng(seed).integers(0, 256, (rows, columns), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return pixels, file.getvalue()


def record(seed: int) -> tuple[dict[str, bytes | float | int], tuple[np.ndarray, np.ndarray]]:
    artifact, misalignment = heatmap(12, 10, seed), heatmap(12, 10, seed + 100)
    scores = np.random.default_rng(seed).random(4, dtype=np.float32)
    return {
        "filename": f"train/{seed}.png".encode(),
        **{name: float(score) for name, score in zip(SCORES, scores, strict=True)},
        "artifact_map": artifact[1],
        "misalignment_map": misalignment[1],
        "prompt_misalignment_label": b"1 0 1",
    }, (artifact[0], misalignment[0])


def write(path: Path, data: list[bytes]) -> Path:
    with path.open("wb") as file:
        writer = RecordWriter(file)
        for one in data:
            writer.write(one)
        writer.flush()
    return path


def test_checksums_are_castagnolis() -> None:
    """The check value of CRC-32C, RFC 3720's 32 zero bytes, and TensorBoard's masked sums."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    for data in (b"", b"a", bytes(range(256)) * 3):
        assert masked_crc32c(data) == outside_crc(data)


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    records = [record(i) for i in range(3)]
    path = write(tmp_path / "dev.tfrecord", [serialise(features) for features, _ in records])
    found = list(read(path))
    assert len(found) == 3
    for i, (feedback, (features, maps)) in enumerate(zip(found, records, strict=True)):
        assert feedback.filename == f"train/{i}.png"
        assert feedback.scores.tolist() == [features[name] for name in SCORES]
        for got, pixels in zip((feedback.artifact_map, feedback.misalignment_map), maps, strict=True):
            assert torch.equal(got, torch.from_numpy(pixels) / 255)
        assert feedback.aligned == (True, False, True)


@pytest.mark.parametrize("packed", [True, False])
def test_examples_in_any_order_and_packing(packed: bool) -> None:
    features: dict[str, bytes | float | int] = {"é": b"\x00\xff", "x": -0.25, "n": -3, "m": 1 << 40, "": b""}
    expected = {name: [value] for name, value in features.items()}
    assert example(serialise(features, packed=packed)) == expected
    assert example(serialise(dict(reversed(features.items())), packed=packed)) == expected
    assert example(b"") == {}
    two = message(1, message(1, message(1, b"x") + message(2, message(2, message(1, struct.pack("<2f", 1.0, 2.5))))))
    assert example(two) == {"x": [1.0, 2.5]}
    unknown = message(1, message(1, varint(9 << 3) + b"\x05" + message(1, b"x") + message(2, feature(1.0))))
    assert example(unknown + varint(3 << 3 | 1) + bytes(8)) == {"x": [1.0]}, "fields of a later version are skipped"


def test_damaged_files_are_named(tmp_path: Path) -> None:
    data = serialise(record(0)[0])
    whole = write(tmp_path / "whole.tfrecord", [data, data]).read_bytes()
    path = tmp_path / "bad.tfrecord"

    def said(content: bytes) -> str:
        path.write_bytes(content)
        with pytest.raises(DataError) as caught:
            list(frames(path))
        return str(caught.value)

    flipped = bytearray(whole)
    flipped[len(whole) // 2 + 50] ^= 1
    assert "record 1: its checksum does not fit" in said(bytes(flipped))
    assert len(list(frames(path, verify=False))) == 2
    flipped = bytearray(whole)
    flipped[3] ^= 1
    assert "record 0: no length; it is cut, damaged" in said(bytes(flipped))
    assert "record 1: the file ends within it" in said(whole[:-1])
    assert "record 1: no length" in said(whole[: len(whole) // 2 + 5])
    assert "git lfs pull" in said(b"version https://git-lfs.github.com/spec/v1\noid sha256:...\n")
    with pytest.raises(DataError, match="there is no file"):
        list(frames(tmp_path / "none.tfrecord"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"artifact_map": b"GIF"}, "artifact_map is no image file"),
        ({"overall_score": b"high"}, "overall_score is text"),
        ({"overall_score": float("nan")}, "scores"),
        ({"prompt_misalignment_label": b"1 2"}, "expected 0 and 1"),
        ({"filename": 3}, "filename is a number"),
    ],
)
def test_records_of_another_form_are_named(
    change: dict[str, bytes | float | int], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "odd.tfrecord", [serialise(record(0)[0]), serialise(record(1)[0] | change)])
    with pytest.raises(DataError, match=f"record 1: .*{message}"):
        list(read(path))


def test_what_is_no_example_is_named(tmp_path: Path) -> None:
    for odd in (b"\xff" * 20, b"hello world, this is text", serialise({"label": 3}), b"\x0a\x50\x00", b"\x08\x01"):
        with pytest.raises(DataError, match="record 0: "):
            list(read(write(tmp_path / "odd.tfrecord", [odd])))


def model(backbone: Path | None = None, spread: float = 0.3) -> RichModel:
    """A model as it begins, its parameters spread so that no part of it is constant."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rich = RichModel(RichConfig(None if backbone is None else str(backbone), width=8))
        for parameter in rich.parameters():
            parameter.data += spread * torch.randn_like(parameter)
    return rich


def test_the_reward_is_the_overall_score_less_the_artifacts(tmp_path: Path) -> None:
    rich = model()
    rich.save(tmp_path / "rich")
    batch = images(3, 3, 16, 12)
    with torch.no_grad():
        scores, maps = rich(batch, [""] * 3)
    assert scores.shape == (3, 4)
    assert maps.shape == (3, 2, 16, 12)
    for weight in (1.0, 0.0, -2.5):
        expected = scores[:, SCORES.index("overall_score")] - weight * maps[:, MAPS.index("artifact_map")].mean((1, 2))
        got = ask(parse(f"richhf:{tmp_path / 'rich'}#{weight}"), batch, [""] * 3)
        torch.testing.assert_close(got, expected)
    plain = parse(f"richhf:{tmp_path / 'rich'}")
    x = batch.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ask(plain, x, [""] * 3)[1], x)
    assert gradient[1].abs().max() > 0
    assert (gradient[[0, 2]] == 0).all(), "per sample"


def test_the_loss_is_the_squared_errors() -> None:
    rich, batch = model(), images(2, 1, 8, 8)
    truth = [Feedback("", torch.rand(4), torch.rand(8, 8), torch.rand(8, 8), ()) for _ in range(2)]
    scores, maps = rich(batch, ["", ""])
    of_scores = sum(((scores[i] - truth[i].scores) ** 2).sum() for i in range(2)) / 8
    of_maps = sum(
        ((maps[i, 0] - t.artifact_map) ** 2).sum() + ((maps[i, 1] - t.misalignment_map) ** 2).sum()
        for i, t in enumerate(truth)
    ) / (2 * 2 * 64)
    torch.testing.assert_close(rich.loss(batch, ["", ""], truth, map_weight=3.0), of_scores + 3 * of_maps)
    with pytest.raises(ValueError, match="need one each"):
        rich.loss(batch, [""], truth)


def test_it_learns_where_the_artifacts_are(tmp_path: Path) -> None:
    """Images with a bright square that people dislike, in records of the format: found, and the reward knows it."""
    generator = torch.Generator().manual_seed(0)
    batch, data = 0.3 * torch.rand(32, 1, 16, 16, generator=generator), []
    for i in range(32):
        features, _ = record(i)
        square = np.zeros((16, 16), dtype=np.uint8)
        if i % 2:
            y, x = torch.randint(11, (2,), generator=generator).tolist()
            square[y : y + 5, x : x + 5] = 255
            batch[i, 0, y : y + 5, x : x + 5] += 0.6
        file = io.BytesIO()
        Image.fromarray(square).save(file, "PNG")
        bad: dict[str, bytes | float | int] = {"artifact_map": file.getvalue(), "misalignment_map": file.getvalue()}
        scores = dict.fromkeys(SCORES, 0.25 if i % 2 else 0.75)
        data.append(serialise(features | bad | scores))
    feedback = list(read(write(tmp_path / "train.tfrecord", data)))
    rich = model(spread=0.0)
    optimiser = torch.optim.Adam(rich.parameters(), 5e-3)
    losses = []
    for _ in range(200):
        loss = rich.loss(batch, [""] * 32, feedback)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    rich.save(tmp_path / "rich")
    values = ask(parse(f"richhf:{tmp_path / 'rich'}"), batch, [""] * 32)
    assert values[1::2].max() < values[::2].min()
    with torch.no_grad():
        maps = rich(batch, [""] * 32).maps[:, 0]
    truth = torch.stack([f.artifact_map for f in feedback])
    assert maps[truth == 1].mean() > 0.6 > 0.15 > maps[truth == 0].mean()


def test_on_clip_it_reads_image_and_prompt(clip_folder: Path, tmp_path: Path) -> None:
    rich = model(clip_folder)
    assert not [name for name in rich.state_dict() if "clip" in name], "the backbone stays where it is"
    rich.save(tmp_path)
    loaded = RichModel.load(str(tmp_path))
    batch = images(2, 3, 20, 16)
    scores, maps = loaded(batch, ["cat", "dog"])
    torch.testing.assert_close(scores, rich(batch, ["cat", "dog"]).scores)
    assert maps.shape == (2, 2, 20, 16)
    assert (loaded(batch, ["dog", "cat"]).scores - scores).abs().max() > 1e-4
    assert {p.requires_grad for p in rich.parameters()} == {True}


@torch.no_grad()
def test_a_map_lies_where_its_patch_is(clip_folder: Path) -> None:
    """Written out: the feature in row r and column c is of token 1 + 4 r + c, after the class token; plus the text."""
    rich, x = model(clip_folder), images(1, 3, 16, 16)
    clip = rich._clip
    assert clip is not None
    hidden = clip.model.vision_model(pixel_values=clip.preprocess(x)).last_hidden_state[0]
    features = rich._encode(x, ["cat"])[0]
    weight, bias = rich.features.weight[:, :, 0, 0], rich.features.bias
    text = rich.text(clip.embed_prompts(["cat"]))[0]
    for r in range(4):
        for c in range(4):
            expected = weight @ hidden[1 + 4 * r + c] + bias + text
            torch.testing.assert_close(features[:, r, c], expected, rtol=1e-4, atol=1e-4)


def test_folders_that_do_not_fit(tmp_path: Path, clip_folder: Path) -> None:
    with pytest.raises(UserError, match="expected 'diffrl-richhf'"):
        parse(f"richhf:{clip_folder}")
    model().save(tmp_path)
    with pytest.raises(UserError, match="a number"):
        parse(f"richhf:{tmp_path}#much")
    (tmp_path / "config.json").write_text('{"model_type": "diffrl-richhf", "width": 9, "backbone": null}')
    with pytest.raises(UserError, match="does not fit its model"):
        parse(f"richhf:{tmp_path}")
