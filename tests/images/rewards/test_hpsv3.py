"""HPSv3 on a tiny random Qwen2-VL, against transformers' own model in a padded batch and the head written out."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from diffrl.images.rewards import ask, parse
from diffrl.images.rewards.hpsv3 import HPSv3, smart_size, translate
from diffrl.support.errors import UserError
from tests.images.newer import qwen_tokenizer
from tests.images.rewards.reward_cases import images, pictures
from tests.images.tiny import ROUNDINGS
from tests.rounding import assert_equal_to_rounding

PROMPTS = ["a cat", "the dog, longer"]
TEXT = "How good is this image? Prompt: {text_prompt}\nRating: <|Reward|> END"
VISION = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OLD = {"model.visual.": "visual.", "model.language_model.": "model."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published layout: old names of weights, a token added, a language head that is not used."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("hpsv3")
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(VISION)}, replace_extra_special_tokens=False)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    tokens = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(word)
        for name, word in zip(("vision_start", "image", "vision_end"), VISION, strict=True)
    }
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2},
        **tokens,
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2VLForConditionalGeneration(config)
        model.resize_token_embeddings(len(tokenizer) + 1)  # one for <|Reward|>
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        head = [torch.nn.Linear(16, 1024), torch.nn.Linear(1024, 16), torch.nn.Linear(16, 2)]
    state = {}
    for name, value in model.state_dict().items():
        for now, old in OLD.items():
            name = old + name.removeprefix(now) if name.startswith(now) else name
        state[name] = value.clone()
    for n, layer in zip((0, 3, 5), head, strict=True):
        state |= {f"rm_head.{n}.{k}": 3 * v.clone() for k, v in layer.state_dict().items()}
    assert "visual.patch_embed.proj.weight" in state
    assert "model.layers.0.self_attn.q_proj.weight" in state
    safetensors.torch.save_file(state, folder / "HPSv3.safetensors")
    (folder / "instruction.txt").write_text(TEXT)
    return folder


def expected(folder: Path, batch: Tensor) -> Tensor:
    """The published value: both prompts in one batch, padded on the right, plain positions, the head's first output."""
    from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLImageProcessorPil, Qwen2VLModel

    state = safetensors.torch.load_file(folder / "HPSv3.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]}, replace_extra_special_tokens=False)
    config: Any = Qwen2VLConfig.from_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer)
    model = Qwen2VLModel(config).eval()
    model.load_state_dict({k.removeprefix("model."): v for k, v in translate(state).items() if "rm_head" not in k})
    processor = Qwen2VLImageProcessorPil(min_pixels=256 * 28 * 28, max_pixels=256 * 28 * 28)
    seen = processor(pictures(batch), return_tensors="pt")
    rows = []
    for prompt, grid in zip(PROMPTS, seen["image_grid_thw"], strict=True):
        text = TEXT.format(text_prompt=prompt)
        said = f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * int(grid.prod() // 4)}<|vision_end|>{text}"
        rows.append(f"{said}<|im_end|>\n<|im_start|>assistant\n")
    tokens = tokenizer(rows, padding=True, padding_side="right", return_tensors="pt")
    places = (tokens["attention_mask"].cumsum(-1) - 1).clamp_min(0).expand(3, -1, -1)
    with torch.no_grad():
        features = model.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output
        words = model.language_model.embed_tokens(tokens["input_ids"])
        words[tokens["input_ids"] == config.image_token_id] = features
        states = model.language_model(
            inputs_embeds=words, attention_mask=tokens["attention_mask"], position_ids=places
        ).last_hidden_state
        h = states[tokens["input_ids"] == tokenizer.convert_tokens_to_ids("<|Reward|>")]
    for n, rectified in ((0, True), (3, True), (5, False)):
        h = h @ state[f"rm_head.{n}.weight"].T + state[f"rm_head.{n}.bias"]
        h = h.relu() if rectified else h
    return h[:, 0]


def test_it_is_qwen2_vl_and_its_head(folder: Path) -> None:
    """448 x 448 pixels are 256 x 28 x 28: nothing is resampled. Prompts of two lengths, padded there and alone here."""
    batch = images(2, 3, 448, 448)
    reward = parse(f"hpsv3:{folder}")
    values, wanted = ask(reward, batch, PROMPTS), expected(folder, batch)
    assert (wanted[0] - wanted[1]).abs() > 1e-3
    assert_equal_to_rounding(values, wanted, 16 * ROUNDINGS)
    assert (ask(reward, batch, PROMPTS[::-1]) - values).abs().max() > 1e-4
    x = batch[:1].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ask(reward, x, PROMPTS[:1]).sum(), x)
    assert gradient.abs().max() > 0


def test_patches_are_the_processors(folder: Path) -> None:
    """Of another size, up to Pillow's rounding to bytes when it resizes; in the processor's order."""
    from transformers import Qwen2VLImageProcessorPil

    batch = images(1, 3, 200, 120)
    processor = Qwen2VLImageProcessorPil(min_pixels=256 * 28 * 28, max_pixels=256 * 28 * 28)
    wanted = processor(pictures(batch), return_tensors="pt")
    reward = parse(f"hpsv3:{folder}")
    assert isinstance(reward, HPSv3)
    patches, rows, columns = reward.patches(batch)
    assert [1, rows, columns] == wanted["image_grid_thw"][0].tolist()
    assert (patches - wanted["pixel_values"]).abs().max() < 1.5 / 255 / 0.26


def test_sizes_are_transformers_own() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for height, width in ((448, 448), (512, 512), (1024, 768), (100, 30), (28, 28), (447, 449), (2000, 28)):
        wanted = smart_resize(height, width, 28, 256 * 28 * 28, 256 * 28 * 28)
        assert smart_size(height, width, 28) == wanted


def test_what_is_missing_is_said(folder: Path, tmp_path: Path) -> None:
    def changed(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    broken = changed("a")
    (broken / "instruction.txt").unlink()
    with pytest.raises(UserError, match=r"instruction.txt is missing: the instruction that the model was trained with"):
        parse(f"hpsv3:{broken}")
    (broken / "instruction.txt").write_text("{text_prompt}")
    with pytest.raises(UserError, match=r"has <\|Reward\|> 0 times; expected it once"):
        parse(f"hpsv3:{broken}")
    broken = changed("b")
    (broken / "HPSv3.safetensors").rename(broken / "HPSv3.pth")
    with pytest.raises(UserError, match=r"there is no .*HPSv3.safetensors"):
        parse(f"hpsv3:{broken}")
    broken = changed("c")
    state = safetensors.torch.load_file(folder / "HPSv3.safetensors")
    del state["rm_head.5.bias"]
    safetensors.torch.save_file(state, broken / "HPSv3.safetensors")
    with pytest.raises(UserError, match=r"lack 5.bias"):
        parse(f"hpsv3:{broken}")
    state = safetensors.torch.load_file(folder / "HPSv3.safetensors")
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:-1].contiguous()
    safetensors.torch.save_file(state, broken / "HPSv3.safetensors")
    with pytest.raises(UserError, match=r"the tokenizer in .* is another model's"):
        parse(f"hpsv3:{broken}")
    content = json.loads((folder / "config.json").read_text())
    (changed("d") / "config.json").write_text(json.dumps(content | {"model_type": "blip"}))
    with pytest.raises(UserError, match="expected 'qwen2_vl'"):
        parse(f"hpsv3:{tmp_path / 'd'}")


def test_an_older_transformers_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose vision tower has another constructor and another output: 4.57, which the package allows."""
    from transformers.models.qwen2_vl import modeling_qwen2_vl

    monkeypatch.delattr(modeling_qwen2_vl, "Qwen2VLVisionRotaryEmbedding")
    with pytest.raises(UserError, match="hpsv3:nowhere needs a newer transformers than"):
        HPSv3("nowhere")
