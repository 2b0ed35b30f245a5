"""Rewards on pretrained models, against transformers' own processors and models on the same image."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from diffrl.images.rewards import ask, parse, preprocess, pretrained
from diffrl.images.rewards.base import check_prompts
from diffrl.images.rewards.clip import read_head
from diffrl.images.rewards.codecs import to_uint8
from diffrl.support.errors import UserError
from tests.images.rewards.reward_cases import images, pictures

PROMPTS = ["a cat", "dogs", "a very long prompt indeed"]


def outside(folder: Path, batch: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
    """transformers' own pipeline: Pillow's processor, tokenizer, CLIPModel's forward; cosines and logits."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures(batch), return_tensors="pt")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompts, padding="max_length", max_length=12, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = CLIPModel.from_pretrained(folder).eval()(**pixels, **tokens)
    cosines = (output.image_embeds * output.text_embeds).sum(-1)
    return {"cos": cosines, "logits": output.logits_per_image.diagonal(), "u": output.image_embeds}


@pytest.mark.parametrize(
    ("kind", "key", "scale"), [("clip", "cos", 100), ("hps", "cos", 1), ("pickscore", "logits", 1)]
)
def test_clip_scores_are_transformers(kind: str, key: str, scale: float, clip_folder: Path) -> None:
    batch = images(3, 3, 16, 16)
    reward = parse(f"{kind}:{clip_folder}")
    expected = scale * outside(clip_folder, batch, PROMPTS)[key]
    assert expected.std() > 1e-2 * expected.abs().mean()
    torch.testing.assert_close(ask(reward, batch, PROMPTS), expected, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(ask(reward, batch[1:2], PROMPTS[1:2]), expected[1:2], rtol=1e-4, atol=1e-5 * scale)


def test_repeated_prompts_are_their_own(clip_folder: Path) -> None:
    reward = parse(f"clip:{clip_folder}")
    batch = images(3, 3, 16, 16)
    mixed = ask(reward, batch, ["b", "a", "b"])
    for i, prompt in enumerate(["b", "a", "b"]):
        torch.testing.assert_close(mixed[i], ask(reward, batch[i : i + 1], [prompt])[0], rtol=1e-4, atol=1e-4)


def test_clip_is_differentiable(clip_folder: Path) -> None:
    """The gradient is that of finite differences, through resizing and cropping too."""
    reward = parse(f"clip:{clip_folder}")
    assert reward.differentiable
    x = (0.2 + 0.6 * images(1, 3, 24, 20)).requires_grad_()
    (gradient,) = torch.autograd.grad(ask(reward, x, ["cat"]).sum(), x)
    along = gradient / gradient.norm()
    step = 0.05
    difference = ask(reward, x + step * along, ["cat"]) - ask(reward, x - step * along, ["cat"])
    torch.testing.assert_close(difference[0].detach() / (2 * step), gradient.norm(), rtol=0.02, atol=0)


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 40, 24), (1, 21, 33), (3, 10, 12)])
@pytest.mark.parametrize("kind", ["clip", "square"])
def test_preprocessing_is_pillows(shape: tuple[int, int, int], kind: str, tmp_path: Path) -> None:
    """Exactly, where nothing is resampled; else within what Pillow rounds to bytes between and after its two passes."""
    from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

    processor = (
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 14, "width": 14})
        if kind == "clip"
        else ViTImageProcessorPil(size={"height": 12, "width": 18}, image_std=[0.4, 0.5, 0.6])
    )
    processor.save_pretrained(tmp_path)
    batch = images(4, *shape)
    expected = processor(pictures(batch), return_tensors="pt")["pixel_values"]
    mine = preprocess.read(tmp_path, "test")
    got = mine(batch)
    assert got.shape == expected.shape
    error = ((got - expected) * torch.tensor(mine.std)[:, None, None]).abs() * 255
    if kind == "clip" and shape[1:] == (16, 16):
        assert error.max() < 1e-3
    else:
        assert error.max() < 1.5
        assert error.mean() < 0.5


@pytest.mark.parametrize("kind", preprocess.PLAIN)
def test_every_processor_that_is_taken_is_transformers_own(kind: str, tmp_path: Path) -> None:
    """By its defaults, on an image that is resized and cut; within what Pillow rounds to bytes."""
    import transformers

    try:
        processor = getattr(transformers, f"{kind}ImageProcessorPil")()
    except ImportError as error:  # Segformer's, in transformers 5.18
        if "Torchvision" not in str(error):
            raise
        pytest.skip(f"{kind}'s own processor needs torchvision in this transformers.")
    processor.save_pretrained(tmp_path)
    batch = images(1, 3, 240, 300)
    expected = processor(pictures(batch), return_tensors="pt")["pixel_values"]
    mine = preprocess.read(tmp_path, "test")
    got = mine(batch)
    assert got.shape == expected.shape
    assert (((got - expected) * torch.tensor(mine.std)[:, None, None]).abs() * 255).max() < 1.5


def test_convnext_is_taken_where_it_cuts_nothing(tmp_path: Path) -> None:
    """From 384 pixels on, its processor makes any image square; below, it enlarges by crop_pct and cuts."""
    from transformers import ConvNextImageProcessorPil

    processor = ConvNextImageProcessorPil(size={"shortest_edge": 384})
    processor.save_pretrained(tmp_path)
    batch = images(1, 3, 240, 300)
    expected = processor(pictures(batch), return_tensors="pt")["pixel_values"]
    mine = preprocess.read(tmp_path, "test")
    assert mine(batch).shape == expected.shape
    assert (((mine(batch) - expected) * torch.tensor(mine.std)[:, None, None]).abs() * 255).max() < 1.5
    ConvNextImageProcessorPil(size={"shortest_edge": 224}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="crop_pct is 0"):
        preprocess.read(tmp_path, "test")


@pytest.mark.parametrize("ending", ["", "Fast", "Pil"])
@pytest.mark.parametrize("kind", ["Levit", "EfficientNet", "Perceiver", "DeepseekOcr2"])
def test_a_processor_that_does_more_is_refused(kind: str, ending: str, tmp_path: Path) -> None:
    """Levit enlarges first, EfficientNet divides by the deviations twice, Perceiver cuts before it scales."""
    import transformers

    getattr(transformers, f"{kind}ImageProcessorPil")().save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    content = json.loads(file.read_text()) | {"image_processor_type": f"{kind}ImageProcessor{ending}"}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"not understood .*({kind}|include_top|do_pad)"):
        preprocess.read(tmp_path, "test")


@pytest.mark.parametrize("step", ["include_top", "rescale_offset", "do_flip_channel_order"])
def test_a_further_step_is_refused_whoever_asks_for_it(step: str, tmp_path: Path) -> None:
    plain = {"size": 16, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3], step: False}
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(plain))
    preprocess.read(tmp_path, "test")
    file.write_text(json.dumps(plain | {step: True}))
    with pytest.raises(UserError, match=f"{step} is True"):
        preprocess.read(tmp_path, "test")


def test_old_and_new_files_say_the_same(tmp_path: Path) -> None:
    """A number for CLIP's sizes, as before transformers 4.2x; the nested file of transformers 5."""
    old = {"size": 16, "crop_size": 14, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({**old, "feature_extractor_type": "CLIPFeatureExtractor"})
    )
    clip = preprocess.read(tmp_path, "test")
    assert (clip.size, clip.crop, clip.mode) == (16, (14, 14), "bicubic")
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({**old, "feature_extractor_type": "ViTFeatureExtractor"})
    )
    vit = preprocess.read(tmp_path, "test")
    assert (vit.size, vit.crop, vit.mode) == ((16, 16), None, "bilinear")
    nested = {"image_processor": {**old, "image_processor_type": "CLIPImageProcessor"}}
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert preprocess.read(tmp_path, "test") == clip
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {**old, "crop_pct": 0.9}}))
    with pytest.raises(UserError, match="not understood"):
        preprocess.read(tmp_path, "test")


def test_a_crop_larger_than_the_image_is_named() -> None:
    cut = preprocess.Preprocess(None, "bilinear", (8, 8), (0.0,) * 3, (1.0,) * 3)
    with pytest.raises(UserError, match="7x9 pixels are smaller"):
        cut(torch.zeros(1, 3, 7, 9))


HEAD = {
    "layers.0.weight": torch.randn(8, 24, generator=torch.Generator().manual_seed(1)),
    "layers.0.bias": torch.randn(8, generator=torch.Generator().manual_seed(2)),
    "layers.10.weight": torch.randn(1, 5, generator=torch.Generator().manual_seed(3)),
    "layers.10.bias": torch.randn(1, generator=torch.Generator().manual_seed(4)),
    "layers.2.weight": torch.randn(5, 8, generator=torch.Generator().manual_seed(5)),
    "layers.2.bias": torch.randn(5, generator=torch.Generator().manual_seed(6)),
}


def test_aesthetic_is_the_head_on_the_embedding(clip_folder: Path, tmp_path: Path) -> None:
    """Layers by their number, not by their name: 10 comes after 2."""
    safetensors.torch.save_file(HEAD, tmp_path / "head.safetensors")
    batch = images(3, 3, 16, 16)
    u = outside(clip_folder, batch, PROMPTS)["u"]
    expected = u
    for n in (0, 2, 10):
        expected = expected @ HEAD[f"layers.{n}.weight"].T + HEAD[f"layers.{n}.bias"]
    reward = parse(f"aesthetic:{clip_folder}#{tmp_path / 'head.safetensors'}")
    assert reward.differentiable
    torch.testing.assert_close(ask(reward, batch, PROMPTS), expected[:, 0], rtol=1e-4, atol=1e-4)
    linear = {"weight": HEAD["layers.0.weight"][:1].clone(), "bias": HEAD["layers.0.bias"][:1].clone()}
    folder = tmp_path / "whole"
    shutil.copytree(clip_folder, folder)
    safetensors.torch.save_file(linear, folder / "aesthetic.safetensors")
    expected = u @ linear["weight"][0] + linear["bias"]
    torch.testing.assert_close(ask(parse(f"aesthetic:{folder}"), batch, PROMPTS), expected, rtol=1e-4, atol=1e-4)


def test_heads_that_do_not_fit_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no chain of linear layers"):
        read_head({"weight": torch.zeros(2, 24), "bias": torch.zeros(2)}, tmp_path, "test")
    with pytest.raises(UserError, match="no chain of linear layers"):
        read_head({"0.weight": torch.zeros(1, 24)}, tmp_path, "test")
    safetensors.torch.save_file({"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, tmp_path / "h.safetensors")
    with pytest.raises(UserError, match="takes 7 numbers"):
        parse(f"aesthetic:{clip_folder}#{tmp_path / 'h.safetensors'}")


def test_a_pickled_head_is_refused_and_its_conversion_told(clip_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "aesthetic"
    shutil.copytree(clip_folder, folder)
    torch.save(HEAD, folder / "sac+logos+ava1-l14-linearMSE.pth")
    with pytest.raises(UserError) as caught:
        parse(f"aesthetic:{folder}")
    said = str(caught.value)
    command = said[said.index('-c "') + 4 : -1]
    assert "pickle" in said
    exec(command)
    parse(f"aesthetic:{folder}")
    with pytest.raises(UserError, match="no safetensors file"):
        parse(f"aesthetic:{clip_folder}#{folder / 'sac+logos+ava1-l14-linearMSE.pth'}")


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("vit")
    labels = {0: "cat", 1: "dog", 2: "tabby, tabby cat"}
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4,
        id2label=labels, label2id={name: i for i, name in labels.items()},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTForImageClassification(config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_classifier_is_transformers(classifier_folder: Path) -> None:
    from transformers import AutoModelForImageClassification, ViTImageProcessorPil

    batch = images(3, 3, 16, 16)
    pixels = ViTImageProcessorPil.from_pretrained(classifier_folder)(pictures(batch), return_tensors="pt")
    with torch.no_grad():
        logits = AutoModelForImageClassification.from_pretrained(classifier_folder).eval()(**pixels).logits
    expected = logits.log_softmax(-1)
    assert expected.exp().std(0).min() > 0.005
    for i, label in enumerate(["cat", "dog", "tabby, tabby cat"]):
        for spec in (f"classifier:{classifier_folder}#{label}", f"classifier:{classifier_folder}#{i}"):
            torch.testing.assert_close(ask(parse(spec), batch, [""] * 3), expected[:, i], rtol=1e-4, atol=1e-5)
    p = parse(f"classifier-probability:{classifier_folder}#dog")
    torch.testing.assert_close(ask(p, batch, [""] * 3), expected.exp()[:, 1], rtol=1e-4, atol=1e-5)
    named = ask(parse(f"classifier:{classifier_folder}"), batch, ["dog", "cat", "2"])
    torch.testing.assert_close(named, expected[[0, 1, 2], [1, 0, 2]], rtol=1e-4, atol=1e-5)
    x = batch.clone().requires_grad_()
    assert torch.autograd.grad(ask(p, x, [""] * 3).sum(), x)[0].abs().min() > 0
    with pytest.raises(UserError, match="no label 'dogg'; did you mean 'dog'"):
        parse(f"classifier:{classifier_folder}#dogg")


def test_missing_weights_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    """As where a text encoder was saved by another major version: transformers would leave it random."""
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    renamed = {k.replace("text_model.encoder", "text.encoder"): v for k, v in state.items()}
    safetensors.torch.save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lack text_model\.encoder\.layers\.0.* would stay random"):
        parse(f"clip:{folder}")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors\.$"):
        parse(f"clip:{folder}")
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="Convert it once"):
        parse(f"clip:{folder}")
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="does not load as a CLIPModel"):
        parse(f"clip:{folder}")


def test_what_else_a_folder_lacks_is_named(clip_folder: Path, classifier_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        parse(f"clip:{tmp_path}")
    with pytest.raises(UserError, match="of type 'vit'; expected 'clip'"):
        parse(f"pickscore:{classifier_folder}")
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    for file in ("tokenizer.json", "vocab.json"):
        (folder / file).unlink(missing_ok=True)
    with pytest.raises(UserError, match="has no tokenizer"):
        parse(f"pickscore:{folder}")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"has no preprocessor_config\.json"):
        parse(f"clip:{folder}")


def test_a_hub_id_without_a_network_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="hub did not give it") as caught:
        pretrained.folder("nobody/no-such-model", "clip:nobody/no-such-model")
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_reward_reads_is_fetched_of_a_hub_id(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the hub's own rule for patterns: aesthetic's head, and the chat template that HPSv3 needs."""
    import huggingface_hub

    whole, fetched = tmp_path / "whole", tmp_path / "fetched"
    shutil.copytree(clip_folder, whole)
    head = {"weight": HEAD["layers.0.weight"][:1].clone(), "bias": HEAD["layers.0.bias"][:1].clone()}
    safetensors.torch.save_file(head, whole / "aesthetic.safetensors")
    others = ("HPSv3.safetensors", "chat_template.jinja", "instruction.txt", "pytorch_model.bin", "tf_model.h5")
    for name in others:
        (whole / name).write_text("")

    def snapshot_download(name: str, *, allow_patterns: list[str]) -> str:
        assert name == "somebody/model"
        shutil.rmtree(fetched, ignore_errors=True)
        fetched.mkdir()
        names = [path.name for path in whole.iterdir()]
        for kept in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(whole / kept, fetched / kept)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    batch = images(2, 3, 16, 16)
    hub, local = (ask(parse(f"aesthetic:{name}"), batch, PROMPTS[:2]) for name in ("somebody/model", whole))
    assert torch.equal(hub, local)
    assert not {"HPSv3.safetensors", "pytorch_model.bin", "tf_model.h5"} & {path.name for path in fetched.iterdir()}
    with pytest.raises(UserError, match="a 'clip' model; expected 'qwen2_vl'"):
        parse("hpsv3:somebody/model")
    assert {"HPSv3.safetensors", "chat_template.jinja", "instruction.txt"} <= {p.name for p in fetched.iterdir()}


def test_uint8_is_what_pillow_was_given() -> None:
    batch = images(2, 3, 9, 7)
    assert np.array_equal(np.asarray(pictures(batch)[1]), to_uint8(batch)[1])


def test_a_classifier_refuses_a_prompt_that_is_none_of_its_labels(classifier_folder: Path) -> None:
    built = parse(f"classifier:{classifier_folder}")
    label = next(iter(built.classes))
    check_prompts(built, [label], [{}])
    with pytest.raises(UserError, match="the classifier has no label 'nothing'"):
        check_prompts(built, [label, "nothing"], [{}, {}])
    check_prompts(parse(f"classifier:{classifier_folder}#{label}"), ["nothing"], [{}])


def test_a_label_of_two_classes_is_named_by_its_number(classifier_folder: Path, tmp_path: Path) -> None:
    """As "crane" of ImageNet, a bird and a machine: neither is taken for the other."""
    folder = tmp_path / "vit"
    shutil.copytree(classifier_folder, folder)
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["id2label"] = {"0": "crane", "1": "ox", "2": "crane"}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="'crane' is the label of 2 classes, 0, 2; name one by its number"):
        parse(f"classifier:{folder}#crane")
    with pytest.raises(UserError, match="'crane' is the label of 2 classes"):
        check_prompts(parse(f"classifier:{folder}"), ["ox", "crane"], [{}, {}])
    batch = images(3, 3, 16, 16)
    expected = ask(parse(f"classifier:{classifier_folder}#2"), batch, [])
    assert torch.equal(ask(parse(f"classifier:{folder}#2"), batch, []), expected)
