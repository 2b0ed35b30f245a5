"""ImageReward on a tiny random BLIP, against transformers' BlipForImageTextRetrieval and the head written out."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from diffrl.images.rewards import ask, parse
from diffrl.images.rewards.imagereward import translate
from diffrl.support.errors import UserError
from tests.images.rewards.reward_cases import images, pictures

PROMPTS = ["cat", "a dog", "cab"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", *"abcdegot", *(f"##{c}" for c in "abcdegot")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertTokenizer, BlipConfig, BlipForImageTextRetrieval, CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BlipConfig(
        vision_config={**layers, "image_size": 16, "patch_size": 4},
        text_config={**layers, "vocab_size": len(WORDS), "encoder_hidden_size": 32, "max_position_embeddings": 40},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BlipForImageTextRetrieval(config)
        for parameter in model.parameters():
            parameter.data += 0.15 * torch.randn_like(parameter)
        head = [torch.nn.Linear(32, 6), torch.nn.Linear(6, 1)]
    model.save_pretrained(folder)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    for n, layer in zip((0, 7), head, strict=True):
        state |= {f"mlp.layers.{n}.{k}": v for k, v in layer.state_dict().items()}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_it_is_blip_and_its_head(folder: Path) -> None:
    """The paper's value: (head(state at [CLS]) - mean)/std; padded to 35 tokens, as published."""
    from transformers import BertTokenizer, BlipForImageTextRetrieval, CLIPImageProcessorPil

    batch = images(3, 3, 16, 16)
    model = BlipForImageTextRetrieval.from_pretrained(folder).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder)(pictures(batch), return_tensors="pt")
    tokens = BertTokenizer.from_pretrained(folder)(PROMPTS, padding="max_length", max_length=35, return_tensors="pt")
    assert tokens["input_ids"][:, 0].tolist() == [2, 2, 2]
    with torch.no_grad():
        states = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], **pixels).question_embeds
    state = safetensors.torch.load_file(folder / "model.safetensors")
    h = states[:, 0] @ state["mlp.layers.0.weight"].T + state["mlp.layers.0.bias"]
    h = h @ state["mlp.layers.7.weight"].T + state["mlp.layers.7.bias"]
    expected = (h[:, 0] - 0.16717362830052426) / 1.0333394966054072
    assert expected.std() > 1e-2
    reward = parse(f"imagereward:{folder}")
    torch.testing.assert_close(ask(reward, batch, PROMPTS), expected, rtol=1e-4, atol=1e-5)
    x = batch.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ask(reward, x, PROMPTS).sum(), x)
    assert gradient.flatten(1).norm(dim=1).min() > 1e-4
    assert (ask(reward, batch, PROMPTS) - ask(reward, batch, PROMPTS[1:] + PROMPTS[:1])).abs().max() > 1e-3


def published(name: str) -> str:
    """A key of the original file, from transformers' name: BLIP's vision transformer is timm's there."""
    for ours, theirs in (
        ("vision_model.post_layernorm.", "blip.visual_encoder.norm."),
        ("vision_model.embeddings.patch_embedding.", "blip.visual_encoder.patch_embed.proj."),
        ("vision_model.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
        ("vision_model.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
        ("vision_model.encoder.layers.", "blip.visual_encoder.blocks."),
        ("self_attn.projection.", "attn.proj."),
        ("self_attn.", "attn."),
        ("layer_norm", "norm"),
        ("text_encoder.", "blip.text_encoder."),
    ):
        if ours.startswith(("vision", "text")) or name.startswith("blip.visual"):
            name = name.replace(ours, theirs)
    return name


def test_published_names_are_translated(folder: Path, tmp_path: Path) -> None:
    state = safetensors.torch.load_file(folder / "model.safetensors")
    original = {published(k): v for k, v in state.items() if not k.startswith(("vision_proj", "text_proj", "itm_head"))}
    assert {"blip.visual_encoder.blocks.1.attn.qkv.weight", "blip.visual_encoder.blocks.0.mlp.fc1.bias"} <= set(
        original
    )
    assert not [k for k in original if k.startswith("vision_model")]
    back = translate(original)
    assert all(torch.equal(back[k], state[k]) for k in back)
    assert len(back) == len(original)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    original["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    safetensors.torch.save_file(original, tmp_path / "model.safetensors")
    batch = images(3, 3, 16, 16)
    got = ask(parse(f"imagereward:{tmp_path}"), batch, PROMPTS)
    torch.testing.assert_close(got, ask(parse(f"imagereward:{folder}"), batch, PROMPTS), rtol=0, atol=0)


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = safetensors.torch.load_file(folder / "model.safetensors")
    del state["text_encoder.encoder.layer.1.crossattention.self.key.weight"]
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"lack encoder\.layer\.1\.crossattention\.self\.key\.weight"):
        parse(f"imagereward:{tmp_path}")
    without = {
        k: v for k, v in safetensors.torch.load_file(folder / "model.safetensors").items() if "mlp.layers" not in k
    }
    safetensors.torch.save_file(without, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="no chain of linear layers"):
        parse(f"imagereward:{tmp_path}")
    (tmp_path / "model.safetensors").rename(tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match="Convert it once"):
        parse(f"imagereward:{tmp_path}")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UserError, match="'clip' model; expected 'blip'"):
        parse(f"imagereward:{tmp_path}")
