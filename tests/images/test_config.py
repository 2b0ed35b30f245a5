"""Configurations: what an algorithm's defaults are, what it refuses, and files that older runs left."""

import copy
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from diffrl.cli import main
from diffrl.commands.finetune import _configuration
from diffrl.images import finetune
from diffrl.images.algorithms import ALGORITHMS as IMPLEMENTATIONS
from diffrl.images.config import (
    ALGORITHMS,
    FIRST_LOOK,
    Algo,
    DRaFTConfig,
    FinetuneConfig,
    GRPOConfig,
    OnlineConfig,
    base,
)
from diffrl.images.config.base import check_rank
from diffrl.images.rewards.registry import companion, require_gradient
from diffrl.images.run import plain
from diffrl.images.stored import load
from diffrl.support.errors import UserError
from diffrl.support.files import to_yaml

OLD = [json.loads(line) for line in (Path(__file__).parent / "old_configurations.jsonl").read_text().splitlines()]
"""What `finetune.yaml` held at commit 7a5e561 of a run with nothing but these --algo and --model: all 43 options."""


@pytest.mark.parametrize("old", OLD, ids=lambda old: f"{old['algo']}-{old['model']}")
def test_defaults_and_files_mean_what_they_did(old: dict[str, Any], tmp_path: Path) -> None:
    """Each algorithm's defaults with a built-in model and with a pipeline; an old file reads as the same."""
    config = FinetuneConfig(algo=old["algo"], model=old["model"])
    if config.algo in ("draft", "refl"):  # their default had no gradient, and so there was no run with it
        old = {**old, "reward": config.scored_by}
        assert config.scored_by is not None
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    assert load(tmp_path / "old.yaml") == config
    now = {**dataclasses.asdict(config), "rounds": config.rounds}
    # What was filled in as the run went on stands in the configuration now.
    was = {**old, "held_out": companion(config.scored_by or "nothing"), "train_steps": 0}
    was["data"] = "digits" if config.builtin else None
    was["clip_nats"] = 0.0 if config.algo == "d3po" else old["clip_nats"]
    later = {"window": 0, "window_rounds": 1, "guard": False, "scale_rewards": False}
    was |= {
        **later,
        "lean": False,
        "size": None,
        "frames": None,
        "shard": False,
        "layers": None,
        "lora_alpha": None,
        "optimiser": "adamw",
    }  # came later, and are off
    assert now == {name: was[name] for name in now}
    assert config.kl_weight == (old["kl"] if isinstance(config, OnlineConfig) else 0.0)


def test_a_file_that_names_little_is_no_first_look(tmp_path: Path) -> None:
    """It has the defaults of its algorithm, as ever."""
    (tmp_path / "small.yaml").write_text("algo: draft\nqueries: 100\n")
    found = load(tmp_path / "small.yaml")
    assert found == FinetuneConfig(algo="draft", queries=100, reward=DRaFTConfig.reward)
    assert found.lr == DRaFTConfig.lr != FIRST_LOOK["lr"]
    (tmp_path / "held.yaml").write_text("algo: draft\nqueries: 100\nheld_out: png\n")
    assert load(tmp_path / "held.yaml") == dataclasses.replace(found, held_out="png")


def test_what_an_old_run_was_told_is_kept(tmp_path: Path) -> None:
    old = next(old for old in OLD if old["algo"] == "d3po")
    told = {"kl": 0.5, "train_steps": 3, "clip_nats": 2.5, "held_out": "jpeg:10", "out": "runs/x", "eval_every": 5}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old | told))
    config = load(tmp_path / "old.yaml")
    assert {name: getattr(config, name) for name in told} == told | {"out": Path("runs/x")}
    (tmp_path / "new.yaml").write_text(to_yaml(plain(config, Path("elsewhere"))))
    assert load(tmp_path / "new.yaml") == dataclasses.replace(config, out=Path("elsewhere").absolute())
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old | {"reward": "jpeg + 0.5*digit:8"}))
    before = load(tmp_path / "old.yaml")
    assert before.held_out == dataclasses.replace(before, seed=1).held_out == "none"  # sums had no companion then
    fresh = FinetuneConfig(reward="jpeg + 0.5*digit:8")
    assert fresh.held_out == "png + 0.5*digit-held-out:8"
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old | {"clip_nat": 1.0}))
    with pytest.raises(UserError, match=r"clip_nat.*clip_nats"):
        load(tmp_path / "old.yaml")


def test_every_algorithm_has_settings_and_an_implementation() -> None:
    assert [*ALGORITHMS] == [*IMPLEMENTATIONS] == [*get_args(Algo)]
    assert all(FinetuneConfig(algo=algo) == schema() for algo, schema in ALGORITHMS.items())
    assert all(type(FinetuneConfig(algo=algo)) is schema for algo, schema in ALGORITHMS.items())


@pytest.mark.parametrize("algo", [*ALGORITHMS])
def test_the_built_in_defaults_stand_in_the_class(algo: str) -> None:
    """What is read in the file is what a run has: none is changed when a configuration is made, but for companions."""
    schema = ALGORITHMS[algo]
    config = schema(model=schema.model)  # without a word it would be the first look
    for field in dataclasses.fields(config):
        held_out = field.name == "held_out" and config.scored_by is not None
        expected = companion(str(config.scored_by)) if held_out else field.default
        assert getattr(config, field.name) == expected, field.name


def test_defaults_follow_what_is_given() -> None:
    assert FinetuneConfig(queries=512, batch=16).eval_every == 5
    assert FinetuneConfig(algo="dpo", rounds=2).eval_every == 1
    assert FinetuneConfig(reward="digit:8").held_out == "digit-held-out:8"
    assert FinetuneConfig(reward="python:a.py#b").held_out is None
    assert FinetuneConfig(algo="dpo", pairs="folder").held_out is None
    assert FinetuneConfig(algo="supervised", held_out="png").held_out == "png"
    config = FinetuneConfig(model="a/pipeline", eval_every=3)
    assert (config.lora, config.steps, config.guidance, config.eval_every) == (4, 50, 5.0, 3)
    assert dataclasses.replace(config, queries=9999).eval_every == 3


def test_the_model_follows_the_reward() -> None:
    """Digits where a reward, a held-out one or the data are of digits; a model that is given stays."""
    for reward in ("digit", "digit:8", "jpeg-file + 0.2*digit", "2*digit-held-out:1"):
        assert FinetuneConfig(reward=reward).model == "tiny-digits"
        assert FinetuneConfig(reward=reward, model="tiny-emoji").model == "tiny-emoji"
    assert FinetuneConfig(held_out="digit").model == "tiny-digits"
    for reward in ("jpeg", "emoji:blue heart", "python:digit.py#digit", "colour:blue + symmetry"):
        assert FinetuneConfig(reward=reward).model == "tiny-emoji"
    assert [algo for algo in ALGORITHMS if FinetuneConfig(algo=algo).model == "tiny-digits"] == ["refl", "supervised"]


def test_values_are_of_their_types() -> None:
    """From Python paths come as text, and whole numbers for others; None is what is not given."""
    config = FinetuneConfig(out="x", prompts="p.txt", lr=1, batch=None, model=Path("a/pipeline"))
    assert (config.out, config.prompts, config.batch, config.model) == (Path("x"), Path("p.txt"), 256, "a/pipeline")
    assert isinstance(config.lr, float)
    assert copy.deepcopy(config) == dataclasses.replace(config) == config


def test_an_option_of_others_is_refused() -> None:
    """Every option that an algorithm lacks, by a sentence that names all those that have it."""
    refused = 0
    for algo, schema in ALGORITHMS.items():
        for name in {name for other in ALGORITHMS.values() for name in other.options()}:
            having = [a for a, other in ALGORITHMS.items() if name in other.options()]
            if algo in having:
                continue
            refused += 1
            with pytest.raises(UserError) as caught:
                schema(**{name: 3})
            flag = "--" + name.replace("_", "-")
            assert str(caught.value) == f"{flag} is for {', '.join(having)}: {algo} has no use for it."
    assert refused > 50


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"algo": "ddpo"}, "known: ddpo-is"),
        ({"quries": 3}, "did you mean 'queries'"),
        ({"pipeline": {}}, "no option --pipeline"),
        ({"batch": "many"}, "--batch is 'many'; expected a whole number"),
        ({"eta": 1.5}, "--eta is 1.5; expected at least 0 and at most 1"),
        ({"lr": 0}, "--lr is 0.0; expected more than 0"),
        ({"algo": "grpo", "clip_nats": 0}, "--clip-nats is 0.0; expected more than 0"),
        ({"algo": "d3po", "clip_nats": -1}, "--clip-nats is -1.0; expected at least 0"),
        ({"algo": "d3po", "group": 0}, "--group is 0; expected at least 2"),
        ({"algo": "d3po", "group": 32}, r"--updates is 4 \(the default\), more than the 2 images or pairs of a round"),
        ({"algo": "supervised", "drop_prompts": 1}, "less than 1"),
        ({"queries": 10}, r"--batch 64 \(the default\)"),
        ({"queries": 10, "batch": 32}, "--batch 32: give"),
        ({"algo": "rwr", "eta": 0, "kl": 0.1}, "no divergence"),
        ({"algo": "ddpo-sf", "passes": 2}, "--algo ddpo-is"),
        ({"model": "a/pipeline", "lora": 0, "lean": True}, "--lean needs --lora"),
        ({"layers": ("to_q",), "adapter": "a"}, "--layers has no use with --adapter"),
        ({"layers": ("to_q", "")}, "--layers needs names of layers"),
        ({"layers": ()}, "--layers needs names of layers"),
        ({"model": "a/pipeline", "lora": 0, "shard": True}, "--shard is for pipelines with --lora"),
        ({"shard": True, "lora": 2}, "--shard is for pipelines with --lora"),
        ({"algo": "draft", "reward": "digit:8", "scale_rewards": True}, "--scale-rewards is not for draft"),
        ({"model": "a/pipeline", "size": 4}, "--size is 4"),
        ({"model": "tiny-digits", "size": 32}, "--size is for pipelines: tiny-digits has no use for it"),
        ({"lean": True}, "--lean is for pipelines"),
    ],
)
def test_mistakes_are_named(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        FinetuneConfig(**given)


def test_a_class_has_its_own_algorithm() -> None:
    assert GRPOConfig(algo="grpo").group == 8
    with pytest.raises(UserError, match="GRPOConfig"):
        GRPOConfig(algo="dpo")


def help_of(words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What --help prints, with the lines of an option joined."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        main(["finetune", *words, "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("algo", [*ALGORITHMS])
def test_help_shows_the_algorithms_own(
    algo: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its options and no other's, with the values that a run of these words has."""
    words = ["--algo", algo, "--model", "a/pipeline"]
    said = help_of(words, capsys, monkeypatch)
    config = FinetuneConfig(algo=algo, model="a/pipeline")
    options = said[said.index("show this help message") :]
    for name in {name for schema in ALGORITHMS.values() for name in schema.options()}:
        flag = "--" + name.replace("_", "-") + " "
        assert (flag in options.replace(",", " ")) == (name in config.options()), name
    none = [name for name, value in dataclasses.asdict(config).items() if value is None]
    assert "None)" not in options
    assert options.count("(default:") + options.count("(here:") == len(config.options()) - len(none)
    assert set(none) <= {
        "held_out",
        "prompts",
        "adapter",
        "layers",
        "lora_alpha",
        "stop_kl",
        "out",
        "kl_target",
        "pairs",
        "data",
        "size",
        "frames",
    }


def test_help_shows_what_the_words_say(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = help_of(["--queries=6144", "--reward", "digit:8", "--no-train-guidance"], capsys, monkeypatch)
    for flag, value in (("--eval-every", "16"), ("--held-out", "digit-held-out:8"), ("--train-guidance,", "False")):
        rest = " ".join(said[said.index(f" {flag} ") :].replace("│", " ").split())
        found = re.search(r"\((here|default): (.*?)\)", rest)
        assert found is not None
        assert found[2] == value, flag


def test_configurations_import_no_torch() -> None:
    code = "import sys, diffrl.images.config, diffrl.commands.finetune; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_reward_model_or_another_algorithm_a_run_is_one_to_look_at() -> None:
    """What else is said is kept; one of the words, and nothing is added."""
    look = FinetuneConfig(queries=128, kl=1)
    assert isinstance(look, DRaFTConfig)
    assert (look.model, look.reward, look.held_out) == ("tiny-emoji", "colour:blue + emoji", "emoji-held-out")
    assert (look.queries, look.kl, look.updates) == (128, 1.0, 8)
    assert FinetuneConfig() == DRaFTConfig() == FinetuneConfig(**FIRST_LOOK)
    assert FinetuneConfig(batch=4).updates <= 4
    jpeg = FinetuneConfig(algo="ddpo-is", reward="jpeg", model="tiny-emoji")
    assert FinetuneConfig(reward="jpeg") == FinetuneConfig(algo="ddpo-is") == FinetuneConfig(model="tiny-emoji") == jpeg
    assert FinetuneConfig(algo="draft", reward="symmetry").queries == DRaFTConfig.queries
    with pytest.raises(UserError, match=r"--clip-nats is for ddpo-is.*draft has no use"):
        FinetuneConfig(clip_nats=1.0)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"algo": "draft"},
        {"algo": "draft", "queries": 64, "eval_samples": 4},
        {"queries": 128, "kl": 1.0, "seed": 3},
        {"algo": "ddpo-is"},
        {"reward": "jpeg", "batch": 32},
        {"model": "tiny-emoji"},
        {"held_out": "digit"},
        {"algo": "draft", "eta": 0},
        {"algo": "draft", "reward": "digit:8", "queries": 1280},
        {"algo": "grpo", "model": "a/pipeline", "prompts": Path("prompts.txt"), "lr": 1e-5},
        {"algo": "supervised", "rounds": 3, "no_train_guidance": True},
    ],
    ids=repr,
)
def test_python_and_the_command_make_the_same_configuration(given: dict[str, Any]) -> None:
    """Of the same options, whichever are left out."""
    words = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in given.items()]
    settings = {name: value for name, value in given.items() if name != "no_train_guidance"}
    settings |= {"train_guidance": False} if "no_train_guidance" in given else {}
    assert _configuration(words) == FinetuneConfig(**settings)


def test_a_models_name_is_checked_as_it_is_loaded() -> None:
    """`check_model` imports no torch, so it has the names itself."""
    from diffrl.images import models

    assert (*base.TINY,) == (*models.BUILT_IN,)
    assert (*base.VARIANTS,) == (*models.VARIANTS,)
    with pytest.raises(UserError, match=r"did you mean 'tiny-emoji'\? Built in are tiny-emoji, tiny-digits and tiny-l"):
        models.load_model("tiny-emojy", lora=None)


@pytest.mark.parametrize("algo", ["draft", "refl"])
@pytest.mark.parametrize("model", [*base.TINY, "a/pipeline"])
def test_the_default_reward_of_backpropagation_has_a_gradient(algo: str, model: str) -> None:
    """For each model one that its images can have."""
    config = FinetuneConfig(algo=algo, model=model)
    assert config.scored_by is not None
    require_gradient(config.scored_by, algo)
    assert ("digit" in config.scored_by) == (model in ("tiny-digits", "tiny-latents"))


def test_adapters_say_their_rank(tmp_path: Path) -> None:
    """It is the run's where none is given, of a built-in model and a pipeline; another is refused, naming both."""
    file = tmp_path / "adapter_model.safetensors"
    save_file({"base_model.model.to_q.lora_A.weight": np.zeros((3, 8), np.float32)}, file)
    for model in ("tiny-digits", "a/pipeline"):
        config = FinetuneConfig(model=model, adapter=tmp_path)
        assert config.lora == 3
        check_rank(config)
        with pytest.raises(UserError, match=f"--lora is 8, and the adapters in {tmp_path} have rank 3"):
            check_rank(FinetuneConfig(model=model, adapter=tmp_path, lora=8))
        with pytest.raises(UserError, match="--lora is 8"):
            finetune(FinetuneConfig(model=model, adapter=tmp_path, lora=8, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_plans_are_said_in_what_is_counted() -> None:
    """Whole rounds, and what they leave out; of dpo pairs, and what says how long it takes."""
    assert FinetuneConfig(queries=64, batch=16).plan == "4 x 16 images"
    assert FinetuneConfig(queries=70, batch=16).plan == "4 x 16 images (70 asked for; rounds are whole)"
    dpo = FinetuneConfig(algo="dpo", queries=32, batch=16)
    assert dpo.plan == "at most 16 pairs of 32 images, 40 rounds (--rounds) of 4 updates on 16 pairs"
    assert FinetuneConfig(algo="supervised", rounds=1, updates=1).plan == "1 round (--rounds) of 1 update on 64 images"


def test_options_of_sampled_pairs_are_refused_with_pairs_whatever_their_value() -> None:
    for words in (["--reward", "jpeg"], ["--reward", "png"], ["--queries", "3072"], ["--group", "8"]):
        with pytest.raises(UserError, match=f"{words[0]} is for pairs that are sampled"):
            _configuration(["--algo", "dpo", "--pairs", "folder", *words])
