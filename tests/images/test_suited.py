"""Rewards that cannot tell what they are asked for are refused, in one line, before anything is loaded."""

import dataclasses
import random
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from diffrl.cli import main
from diffrl.images import finetune, job, suited
from diffrl.images.config import DDPOISConfig, DRaFTConfig, FinetuneConfig, NFTConfig
from diffrl.images.job import resume
from diffrl.images.lists import line_of, read_prompts
from diffrl.images.models import latents, model_of, pipelines
from diffrl.images.rewards import parse
from diffrl.images.rewards.base import GradientError
from diffrl.images.run import FinetuneRun
from diffrl.images.samples import plain
from diffrl.support.errors import UserError
from diffrl.support.folder import write_json, write_yaml
from tests.images.test_command import SMALL, fails

RANK = """
def rank(images, prompts, metadata):
    return images.flatten(1).sum(1).argsort().argsort() / max(1, len(images) - 1)

rank.grouped = True

def narrow(images):
    return images
"""
NEEDS_GROUPS = "compares images of one prompt, and a round of"


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded."""

    def load(*given: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(job, "model_of", load)


def test_a_person_votes_by_default_where_rounds_have_groups() -> None:
    """--reward human is nft's, of groups of 8; an algorithm that is named is kept, and other rewards have ddpo's."""
    for reward in ("human", "human:2", "human + jpeg"):
        config = FinetuneConfig(reward=reward)
        assert isinstance(config, NFTConfig)
        assert config.group == 8
    assert isinstance(FinetuneConfig(reward="human", algo="ddpo-is"), DDPOISConfig)
    assert isinstance(FinetuneConfig(reward="jpeg"), DDPOISConfig)
    assert isinstance(FinetuneConfig(reward="human:votes.json"), DDPOISConfig), "votes that are kept score each alone"
    assert isinstance(FinetuneConfig(), DRaFTConfig)


def test_help_says_which_algorithm_a_person_gets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["finetune", "--reward", "human", "--help"])
    assert "The options below are those of --algo nft" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    "words", [["--algo", "ddpo-is"], ["--algo", "rwr"], ["--algo", "nft", "--group", "1"], ["--algo", "dpok"]]
)
@pytest.mark.parametrize("reward", ["human", "jpeg + human:2", "jpeg + python:mine.py#rank"])
def test_what_compares_images_of_a_prompt_needs_groups(
    reward: str, words: list[str], quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line and in Python, and without a word of torch where names are enough."""
    Path("mine.py").write_text(RANK)
    options = ["--model", "tiny-emoji", "--queries", "64", "--updates", "1"]
    said = fails([*options, *words, "--reward", reward], capsys)
    assert NEEDS_GROUPS in said
    assert "--algo grpo or nft or d3po, with a --group of 2 or more" in said
    assert not list(quick.glob("runs/*"))
    given = {"algo": words[1], **({"group": 1} if "--group" in words else {})}
    with pytest.raises(UserError, match=NEEDS_GROUPS):
        finetune(FinetuneConfig(model="tiny-emoji", reward=reward, **given))


def test_fewer_prompts_than_images_make_groups(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DDPO draws a prompt more than once where a round is larger than their list; the evaluations' meaning is said."""
    Path("mine.py").write_text(RANK)
    assert main(["finetune", *SMALL, "--reward", "python:mine.py#rank", "--out", "run"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "python:mine.py#rank compares the images of a prompt: its mean over those of one model says little" in said
    Path("prompts.txt").write_text("".join(f"{i % 10}\n" for i in range(10)))
    few = [*SMALL, "--reward", "python:mine.py#rank", "--batch", "8", "--prompts", "prompts.txt"]
    assert NEEDS_GROUPS in fails(few, capsys)


@pytest.mark.long
def test_a_run_of_before_that_was_refused_goes_on(quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has its algorithm and cannot take another: rounds without groups are refused of new runs alone."""
    Path("mine.py").write_text(RANK)
    Path("prompts.txt").write_text("".join(f"{i % 10}\n" for i in range(10)))
    words = [*SMALL, "--reward", "jpeg + python:mine.py#rank", "--batch", "8", "--prompts", "prompts.txt"]
    with monkeypatch.context() as before:
        before.setattr(suited, "_require_groups", lambda reward, config: None)
        assert main(["finetune", *words, "--queries", "8", "--out", "run"]) == 0
    resume("run", steps=16, quiet=True)
    assert FinetuneRun.read("run").history[-1]["queries"] == 16


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--reward", "python:mine.py#nix"], "mine.py has no function 'nix'"),
        (["--reward", "python:mine.py#narrow"], "must take (images, prompts, metadata), and it takes (images)"),
        (["--reward", "jpeg", "--held-out", "python:mine.py#nix"], "mine.py has no function 'nix'"),
    ],
)
def test_a_function_is_looked_at_before_the_model_is_loaded(
    words: list[str], said: str, quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text(RANK)
    assert said in fails(words, capsys)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("reward", "held_out", "same"),
    [
        ("jpeg", "jpeg", True),
        ("jpeg", "2*jpeg", True),
        ("jpeg + 0.5*png", "1*png + 2*jpeg", True),
        ("python:mine.py#red", "python:./mine.py#red", True),
        ("python:mine.py#red", "python:mine.py#other", False),
        ("jpeg", "-1*jpeg", False),
        ("jpeg", "jpeg:50", False),
        ("jpeg + png", "jpeg", False),
        ("jpeg + png", "jpeg + 2*png", False),
    ],
)
def test_a_reward_is_not_held_out_from_itself(
    reward: str, held_out: str, same: bool, quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.py").write_text(
        "def red(images, prompts, metadata):\n    return images[:, 0].mean((1, 2))\n\nother = red\n"
    )
    config = FinetuneConfig(reward=reward, held_out=held_out)
    with pytest.raises(UserError if same else AssertionError, match="is the reward itself" if same else "is loaded"):
        finetune(config)
    if same:
        assert "is the reward itself" in fails(["--reward", reward, "--held-out", held_out], capsys)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("option", ["--reward", "--held-out"])
def test_digits_are_not_looked_for_in_emoji(option: str, quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "tiny-emoji", option, "digit:8"]
    said = fails(words, capsys)
    assert f"{option} digit:8 is for handwritten digits, and tiny-emoji makes none: --model tiny-digits" in said
    assert FinetuneConfig(reward="digit:8").model == "tiny-digits"


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "tiny-digits", "--reward", "colour:blue"], "--reward colour:blue is for hues, and tiny-digits"),
        (["--algo", "refl", "--reward", "colour:blue"], "--model tiny-emoji with --data FOLDER, its images."),
        (["--algo", "refl", "--held-out", "jpeg + 2*colour:30"], "for hues, and tiny-digits makes grey digits"),
        (["--algo", "refl", "--reward", "emoji"], "--reward emoji is for emoji, and tiny-digits makes grey digits"),
        (["--model", "tiny-latents", "--reward", "emoji-clip:heart + colour:red"], "is for emoji, and tiny-latents"),
    ],
)
def test_grey_digits_are_no_emoji_and_have_no_hue(
    words: list[str], said: str, quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither of a model that was named, nor of refl's own default; a hue of greys is 0, whatever is learned."""
    assert said in fails(words, capsys)


def test_tiny_latents_makes_what_its_decoder_gives() -> None:
    vae, unet = latents._vae(), latents._unet()
    size = unet.config.sample_size
    made = vae.decode(torch.zeros(1, unet.config.in_channels, size, size)).sample
    assert suited.MAKES["tiny-latents"] == tuple(made.shape[1:])


def test_what_is_held_out_changes_no_other_setting() -> None:
    """A run of which nothing else is said stays the first look; a reward of digits names their model."""
    first = FinetuneConfig()
    for held_out in ("emoji-held-out", "png", "colour:blue", "none"):
        assert FinetuneConfig(held_out=held_out) == dataclasses.replace(first, held_out=held_out)
    assert (FinetuneConfig(held_out="digit:8").model, FinetuneConfig(held_out="digit:8").algo) == (
        "tiny-digits",
        "ddpo-is",
    )


def test_a_reward_of_whole_videos_is_no_images(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.py").write_text("def still(images, prompts, metadata):\n    return images.mean((1, 2, 3, 4))\n")
    with Path("mine.py").open("a") as file:
        file.write("still.videos = True\n")
    for words in (["--reward", "jpeg + python:mine.py#still"], ["--held-out", "python:mine.py#still"]):
        said = fails([*SMALL, "--algo", "ddpo-is", *words, "--out", "run"], capsys)
        assert "python:mine.py#still says videos = True, and the model makes images: leave that out" in said
    assert not Path("run").exists()


def test_a_prompt_that_the_model_does_not_know_has_its_line(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And where the model was not named, what it is by default."""
    Path("mine.txt").write_text("heart\n\n  a red cube\n")
    words = ["--reward", "jpeg", "--prompts", "mine.txt", "--out", "run"]
    said = fails(words, capsys)
    assert "mine.txt, line 3, 'a red cube': " in said
    assert "Of another model than tiny-emoji, the default? Give --model." in said
    assert "Of another model than tiny-digits? Give --model" in fails([*SMALL, *words], capsys)
    Path("mine.jsonl").write_text('{"prompt": "3"}\n{"prompt": "eleven"}\n')
    said = fails([*SMALL, "--reward", "jpeg", "--prompts", "mine.jsonl", "--out", "run"], capsys)
    assert "mine.jsonl, line 2, 'eleven': " in said
    assert not Path("run").exists()


def test_nft_that_nobody_named_is_named_where_its_groups_do_not_fit(tmp_path: Path) -> None:
    """A student of straight paths is sampled without noise: an algorithm of another group is chosen for it."""
    write_json(tmp_path / "run.json", {"kind": "images-distil", "base": "tiny-emoji"})
    write_yaml(tmp_path / "settings.yaml", {"calls": 1, "to": "reflow"})
    with pytest.raises(
        UserError, match=r"multiple of --group, 8 .of nft, which is chosen where a model, as .*, is sampled"
    ):
        FinetuneConfig(model=str(tmp_path), reward="jpeg", batch=4, queries=8, updates=1)
    with pytest.raises(UserError, match="--shard shares frozen weights among processes, and there is one"):
        suited.refuse(FinetuneConfig(algo="ddpo-is", model="some/pipeline", lora=2, shard=True))


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("algo", ["supervised", "refl"])
def test_digits_are_no_images_of_emoji(algo: str, quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that are learned from where no --data is given: the line says where they come from, and nothing begins."""
    reward = ["--reward", "symmetry"] if algo == "refl" else []
    said = fails(["--model", "tiny-emoji", "--algo", algo, *reward, "--out", "run"], capsys)
    assert "by default from scikit-learn's digits, of which tiny-emoji knows none: --data FOLDER" in said
    assert not Path("run").exists()


def test_prompts_may_begin_with_the_mark_of_windows_editors(quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mark is no part of the first prompt; a number of millions of digits is a prompt like another."""
    Path("p.txt").write_bytes("\ufeff3\n7\n".encode())
    assert read_prompts(Path("p.txt"))[0] == ["3", "7"]
    assert line_of(Path("p.txt"), 1) == 2
    assert pipelines.class_of("0" * 5000 + "3", 10, "digits") == 3
    Path("long.txt").write_text("8" * 100_000)
    said = fails([*SMALL, "--prompts", "long.txt"], capsys)
    assert "characters ...]" in said
    assert "Of another model than tiny-digits? Give --model." in said


@pytest.mark.long
@pytest.mark.parametrize("algo", ["draft", "refl"])
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("images.detach().mean((1, 2, 3))", "its values carry no gradient to the images"),
        ("images.mul_(0.5).mean((1, 2, 3))", "changes the images in place"),
    ],
)
def test_a_gradient_that_is_none_is_told_before_the_run_has_a_folder(
    body: str, said: str, algo: str, quick: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that the same command, with the reward mended, runs."""
    reward, head = Path("rw.py"), "def glow(images, prompts, metadata):\n    return "
    reward.write_text(f"{head}{body}\n\nglow.differentiable = True\n")
    words = [*SMALL, "--algo", algo, "--reward", "symmetry + 0.5*python:rw.py#glow", "--out", "run"]
    refusal = fails(words, capsys)
    assert said in refusal
    assert "holds no round" not in refusal
    assert not Path("run").exists()
    reward.write_text(f"{head}images.mean((1, 2, 3))\n\nglow.differentiable = True\n")
    assert main(["finetune", *words]) == 0


def test_a_reward_that_cannot_take_noise_is_left_to_the_run(quick: Path) -> None:
    """Only whether there is a gradient is asked before; and the run's own random numbers are as they were."""
    Path("rw.py").write_text(
        "import random\n\nimport numpy as np\nimport torch\nasked = []\n\n"
        "def glow(images, prompts, metadata):\n    torch.rand(3), random.random(), np.random.rand()\n"
        "    asked.append(1)\n"
        "    if len(asked) == 1:\n        raise ValueError('no picture')\n    return images.mean((1, 2, 3))\n\n"
        "glow.differentiable = True\n"
    )
    state, others = torch.get_rng_state(), (random.getstate(), np.random.get_state()[1])  # noqa: NPY002
    config = DRaFTConfig(model="tiny-digits", reward="python:rw.py#glow")
    suited.refuse_without_gradient(parse("python:rw.py#glow"), config, model_of(config, "cpu", True), plain(["7"]))
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == others[0]
    assert np.array_equal(np.random.get_state()[1], others[1])  # noqa: NPY002


def test_a_reward_that_finds_nothing_in_noise_is_left_to_the_run(quick: Path) -> None:
    """It says the same of all of it, without a gradient; on its own images it may have one."""
    body = "def glow(images, prompts, metadata):\n    return {} * images.mean((1, 2, 3)).detach()\n\n"
    body += "glow.differentiable = True\n"
    config = DRaFTConfig(model="tiny-digits", reward="python:rw0.py#glow")
    model = model_of(config, "cpu", True)
    for weight in (0, 1):
        Path(f"rw{weight}.py").write_text(body.format(weight))
        with nullcontext() if weight == 0 else pytest.raises(GradientError):
            suited.refuse_without_gradient(parse(f"python:rw{weight}.py#glow"), config, model, plain(["7", "8"]))
