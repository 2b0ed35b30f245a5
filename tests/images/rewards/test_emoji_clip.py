"""The two towers of emoji-clip: unit vectors, one a prompt; they find tiny-emoji's own samples by their prompts."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from diffrl.images.config import FinetuneConfig
from diffrl.images.emoji_words import COLOURS, OBJECTS, PROMPTS
from diffrl.images.job import finetune
from diffrl.images.models import load_model
from diffrl.images.rewards import RewardError, ask, emoji_clip, parse
from diffrl.images.rewards.registry import companion
from diffrl.images.samples import RunState, Setup, chain_of, plain, roll_out
from diffrl.support.errors import UserError
from diffrl.support.folder import Damaged

EPS = torch.finfo(torch.float32).eps


def images(n: int = 4, size: int = 32) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def samples() -> torch.Tensor:
    """One sample of tiny-emoji for each of the 84 prompts."""
    model = load_model("tiny-emoji", lora=None)
    config = FinetuneConfig(model="tiny-emoji", eval_samples=len(PROMPTS))
    setup = Setup(config, model, chain_of(model, config), plain(PROMPTS), None)
    return roll_out(setup, RunState(), torch.arange(len(PROMPTS)), setup.noise_path(0)).images


def test_embeddings_are_unit_vectors_and_the_score_their_cosine() -> None:
    towers, x = emoji_clip.towers(), images()
    seen, said = towers.images(x), towers.prompts(emoji_clip.tokens_of(PROMPTS[:4]))
    for vectors in (seen, said):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(4), rtol=0, atol=16 * EPS)
    expected = [100 * float(torch.dot(a, b)) for a, b in zip(seen, said, strict=True)]
    assert ask(parse("emoji-clip"), x, PROMPTS[:4]).tolist() == pytest.approx(expected, abs=100 * 64 * EPS)
    one = ask(parse("emoji-clip:blue heart"), x, [""] * 4)
    assert torch.equal(one, ask(parse("emoji-clip"), x, ["a blue heart"] * 4))


def test_words_are_numbered_once() -> None:
    """84 prompts, 84 pairs of numbers, objects and colours in ranges of their own; 0 is no colour."""
    tokens = emoji_clip.tokens_of(PROMPTS)
    assert len({tuple(row) for row in tokens.tolist()}) == len(PROMPTS)
    assert set(tokens[:, 0].tolist()) == set(range(1, 1 + len(OBJECTS)))
    assert set(tokens[:, 1].tolist()) == {0, *range(1 + len(OBJECTS), 1 + len(OBJECTS) + len(COLOURS))}
    said = emoji_clip.towers().prompts(tokens)
    apart = (said @ said.T).fill_diagonal_(-1)
    assert apart.max() < 0.99
    with pytest.raises(RewardError, match=r"which object\? Name one for all, 'emoji-clip:blue heart'"):
        ask(parse("emoji-clip"), images(1), ["7"])
    with pytest.raises(UserError, match="knows no 'hart'"):
        parse("emoji-clip:blue hart")


def test_samples_are_found_by_their_prompts(samples: torch.Tensor) -> None:
    """Of 84 prompts the nearest is the sample's own: by chance 1 of 84; no drawing of this typeface was seen.

    On 1,680 drawings of it .836 were right; of 84 samples at least .6, six standard deviations below.
    """
    towers = emoji_clip.towers()
    cosines = towers.images(samples) @ towers.prompts(emoji_clip.tokens_of(PROMPTS)).T
    own = torch.arange(len(PROMPTS))
    assert float((cosines.argmax(1) == own).float().mean()) >= 0.836 - 6 * math.sqrt(0.836 * 0.164 / 84)
    assert float((cosines.argmax(0) == own).float().mean()) >= 0.6
    reward = parse("emoji-clip")
    right = ask(reward, samples, list(PROMPTS)).mean()
    wrong = ask(reward, samples, [*PROMPTS[7:], *PROMPTS[:7]]).mean()  # the next object in the same colour
    assert right > wrong + 30


def test_the_file_is_small_and_as_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert emoji_clip.FILE.stat().st_size < 1_000_000
    shutil.copytree(emoji_clip.WEIGHTS, tmp_path / "weights")
    file = tmp_path / "weights" / emoji_clip.FILE.name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr(emoji_clip, "FILE", file)
    with pytest.raises(Damaged):
        parse("emoji-clip")


@pytest.mark.long
def test_a_run_is_tuned_on_it_and_watched_by_emoji(tmp_path: Path) -> None:
    """By its gradient, in a few updates: the score of the same prompts and noise rises."""
    assert companion("emoji-clip:cat") == "emoji:cat"
    given = {"reward": "emoji-clip", "algo": "draft", "queries": 64, "batch": 16, "updates": 1, "eval_samples": 24}
    run = finetune(FinetuneConfig(**given, warm_up=0, lr=3e-4, steps=5, out=tmp_path / "run"), quiet=True)
    history = json.loads((run / "evaluations.json").read_text())
    assert history[-1]["reward"] > history[0]["reward"]
    assert 0 <= history[0]["held_out"] <= 1
