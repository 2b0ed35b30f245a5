"""Tiny pretrained models of random weights, saved by transformers as users have them, and one cache for the session."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffrl.images.rewards import posting

VOCABULARY = [
    "<|startoftext|>",
    "<|endoftext|>",
    *"abcdefghijklmnopqrstuvwxyz ",
    *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz"),
]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`$DIFFRL_CACHE` of the session, so that no test touches the user's and classifiers are trained once."""
    before = os.environ.get("DIFFRL_CACHE")
    folder = tmp_path_factory.mktemp("cache")
    os.environ["DIFFRL_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["DIFFRL_CACHE"]
    else:
        os.environ["DIFFRL_CACHE"] = before


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, in seconds, which are over at once: the clock of waits goes on by each."""
    waited: list[float] = []
    passed = 0.0

    def wait(seconds: float, *given: object) -> bool:
        nonlocal passed
        waited.append(seconds)
        passed += seconds
        return True

    monkeypatch.setattr(posting, "wait", wait)
    monkeypatch.setattr(posting, "now", lambda: time.monotonic() + passed)
    return waited


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of 16x16 pixels and a vocabulary of letters, whole, as the hub has them."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(VOCABULARY)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={**layers, **ends, "vocab_size": len(VOCABULARY), "max_position_embeddings": 12},
        vision_config={**layers, "image_size": 16, "patch_size": 4},
        projection_dim=24,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
        for parameter in model.parameters():  # of the usual deviation, .02, all embeddings would be nearly the same
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.logit_scale.data.fill_(3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder
