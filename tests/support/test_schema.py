"""The one validator: what the fields of all configurations take and refuse, and the sentences about it."""

import dataclasses
import json
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import diffrl
from agents import AGENTS
from diffrl.augment.synther.config import RefitConfig, Sampling, SynthERConfig
from diffrl.cli import main
from diffrl.images.config import ALGORITHMS as IMAGES
from diffrl.images.distil_config import ImageDistilConfig
from diffrl.runs import config as configuration
from diffrl.runs.config import RunOptions, TrainConfig
from diffrl.runs.online_config import OnlineConfig
from diffrl.runs.tune import finetune_policy
from diffrl.support.errors import UserError
from diffrl.support.files import read_yaml
from diffrl.support.schema import Count, Positive, Range, Share, check, held, read
from diffrl.tuning.config import ALGORITHMS as TUNING
from diffrl.tuning.distil_config import DistilConfig

SCHEMAS: dict[str, tuple[type, Mapping[str, Any]]] = {
    **{f"agents.{name}": (schema, {}) for name, schema in AGENTS.items() if name != "diffuser"},  # which is younger
    "train": (TrainConfig, {"dataset": "x", "agent": AGENTS["bc"]()}),
    "options": (RunOptions, {}),
    "online": (OnlineConfig, {"offline_run": "x"}),
    "distil": (DistilConfig, {"start_run": "x"}),
    "images.distil": (ImageDistilConfig, {"teacher": "x"}),
    **{f"tuning.{name}": (schema, {"start_run": "x"}) for name, schema in TUNING.items()},
    "synther": (SynthERConfig, {}),
    "sampling": (Sampling, {}),
    "refit": (RefitConfig, {}),
    **{f"images.{name}": (schema, {"model": schema.model}) for name, schema in IMAGES.items()},
}
"""Every configuration, and what it cannot be made without."""
BEFORE = [json.loads(line) for line in (Path(__file__).parent / "fields.jsonl").read_text().splitlines()]
"""What each field took and refused at commit c41a7e7, where each dataclass had checks of its own."""
YOUNGER = (
    "images.nft",
    "images.distil",
    "tuning.nft",
    "distil",
    *(f"agents.{name}" for name in ("rebrac", "ifql", "bfn", "qam", "dtql", "rlpd")),
)
"""Configurations that commit had not."""
BOUNDS = ("grad_clip", "clip_norm", "clip_nats", "stop_kl", "target_kl", "kl_target")
"""Fields of which infinity means that there is no bound."""
FILLED_IN = ("start_steps", "reward_shift", "reward_scale")
"""Fields that a run fills in itself."""


def refused(schema: type, base: Mapping[str, Any], field: str, value: Any) -> str | None:
    """The sentence with which a configuration refuses a value of a field; None where it takes it."""
    try:
        schema(**{**base, field: value})
    except UserError as error:
        return str(error)
    return None


def absurd(field: str, value: Any) -> bool:
    """What was taken and is refused now: NaN, infinity where it bounds nothing, and more than 1,000 layers."""
    if isinstance(value, float) and not math.isfinite(value):
        return not (value == math.inf and field in BOUNDS)
    return field in ("layers", "critic_layers", "blocks") and value == 4096


def idle(name: str, field: str, value: Any) -> bool:
    """What was taken and is refused now, since it trained nothing, or ended in training: of DPPO."""
    if name != "tuning.dppo":
        return False
    return (field == "batch_size" and value == 1) or (field == "min_std" and not 1e-6 <= value <= 10)


@pytest.mark.long
@pytest.mark.parametrize("name", SCHEMAS)
def test_what_was_taken_is_taken_and_what_was_refused_is_refused(name: str) -> None:
    """One field at a time, at the values where some field's range begins, ends, or takes no more."""
    schema, base = SCHEMAS[name]
    found = 0
    for group in BEFORE:
        for field in (entry.removeprefix(f"{name}.") for entry in group["fields"] if entry.rpartition(".")[0] == name):
            for value in group["taken"]:
                other = absurd(field, value) or idle(name, field, value)
                assert (refused(schema, base, field, value) is not None) == other, (field, value)
            for value in group["refused"]:
                assert refused(schema, base, field, value) is not None, (field, value)
            found += 1
    if name not in ("options", *YOUNGER):
        assert found >= 3


def numbers_of(schema: type, kind: type) -> Iterator[str]:
    """The fields that hold one whole number, or one float, or nothing."""
    for name, hint in typing.get_type_hints(schema).items():
        if name in {field.name for field in dataclasses.fields(schema)} and name not in FILLED_IN:
            members = set(typing.get_args(hint)) - {NoneType} or {hint}
            if members == {kind}:
                yield name


@pytest.mark.parametrize("name", SCHEMAS)
def test_no_field_takes_an_absurd_number(name: str) -> None:
    """Every whole number has an upper end, at most a seed's 2^64; no float may be NaN. The sentence names the field."""
    schema, base = SCHEMAS[name]
    for kind, values in ((int, (2**64, 10**30, 10**5000, -(10**30))), (float, (math.nan, -math.inf))):
        for field in numbers_of(schema, kind):
            for value in values:
                said = refused(schema, base, field, value)
                assert said is not None, (field, value)
                assert field in said.replace("-", "_"), said
                assert len(said) < 200


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_value_of_another_type_is_refused(name: str) -> None:
    """True is no number, a number is no text; nothing of a wrong type is left for training to stumble over."""
    schema, base = SCHEMAS[name]
    for kind, values in ((int, (True, "3", 3.0)), (float, (True, "3e-4", [1.0])), (bool, (1, "no")), (str, (3, 0.5))):
        for field in numbers_of(schema, kind):
            for value in values:
                if (field, kind) not in (("start_checkpoint", str), ("model", str)):  # a step; a path
                    assert refused(schema, base, field, value) is not None, (field, value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--agent.layers 200000", "--agent.layers is 200000; expected at least 1 and at most 1,000."),
        ("--agent.batch-size 1000000000000", "--agent.batch-size is 1000000000000; expected at least 1 and at most"),
        ("--steps 1000000000000000", "--steps is 1000000000000000; expected at least 1 and at most 1,000,000,000,000."),
        ("--seeds 0 -1", "--seeds[1] is -1; expected at least 0"),
        ("--agent.learning-rate inf", "--agent.learning-rate is inf; expected a finite number, more than 0."),
    ],
)
def test_the_command_line_refuses_it_before_anything_is_made(
    words: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--agent", "bc", "--dataset", "x", *words.split()]) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("agent: {name: bc, layers: 200000}", "agent.layers is 200000; expected at least 1 and at most 1,000."),
        ("agent: {name: bc, widht: 3}", "unknown key 'agent.widht'; did you mean 'agent.width'?"),
        ("agent: {name: bc, width: many}", "agent.width is 'many'; expected a whole number."),
        ("agent: {name: bc, reward_tune: normalise}", "agent.reward_tune is 'normalise'; did you mean 'normalize'?"),
        ("agent: {name: bc, learning_rate: 1e-3}", "agent.learning_rate is '1e-3'; expected a number (write 1.0e-3, "),
        ("agent: {name: bc}\nseeds: [0, 0]", "--seeds is [0, 0]; expected different numbers."),
        ("agent: {name: bc}\nseeds: []", "seeds is []; expected at least 1 and at most 10,000 entries."),
        ("agent: {name: bc}\nseeds: 3", "seeds is 3; expected a list."),
        ("agent: {name: bc}\nout: 3", "out is 3; expected a path."),
        ("agent: {name: bc}\ncapture: 'no'", "capture is 'no'; expected true or false."),
        (f"agent: {{name: bc}}\nenv: [{'x' * 1000}]", "env is ['xxx"),
        (f"agent: {{name: bc}}\n{'x' * 1000}: 1", "unknown key 'xxx"),
        ("agent: {name: consistency_ac, sigma_min: 90.0}", "--agent.sigma-min is 90.0; expected less than"),
        ("agent: {name: bc}\nout: 2026-06-31", "is not valid YAML: day is out of range"),
        ("agent: " + "[" * 5000, "is not valid YAML"),
    ],
)
def test_a_file_s_mistake_is_one_line_that_names_file_field_value_and_what_is_allowed(
    text: str, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"dataset: x\n{text}\n")
    with pytest.raises(UserError) as caught:
        configuration.load(file)
    assert str(caught.value).startswith(str(file))
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(file))


bounds = st.floats(-1e6, 1e6) | st.integers(-(10**20), 10**20)


@given(low=bounds, high=bounds, ends=st.sampled_from(["[]", "[)", "(]", "()"]))
def test_a_range_holds_what_lies_between_its_ends_and_says_so(low: float, high: float, ends: Any) -> None:
    low, high = sorted((low, high))
    numbers = Range(low, high, ends)
    assert numbers.holds(low) == (ends[0] == "[" and (low < high or ends[1] == "]"))
    assert numbers.holds(high) == (ends[1] == "]" and (low < high or ends[0] == "["))
    assert numbers.holds((low + high) / 2) or not low < (low + high) / 2 < high
    assert not any(map(numbers.holds, (math.nan, math.inf, -math.inf, low - abs(low) - 1, high + abs(high) + 1)))
    words = ("at least" if ends[0] == "[" else "more than", "at most" if ends[1] == "]" else "less than")
    assert numbers.expected(math.nan) == f"{words[0]} {low:,} and {words[1]} {high:,}"


def test_infinity_is_taken_where_the_range_is_closed_there() -> None:
    assert held(math.inf, Annotated[float, Range(0, ends="[]")], "x") == math.inf
    assert held(10**400, Annotated[float, Range(0, ends="[]")], "x") == math.inf
    for hint in (float, Positive, Annotated[float, Range(0, ends="[)")]):
        with pytest.raises(UserError, match="x is inf; expected a finite number"):
            held(math.inf, hint, "x")


def test_values_become_of_their_types_without_loss() -> None:
    for value, hint, wanted in (
        (3, float, 3.0),
        (np.int64(3), Count, 3),
        (np.float32(0.5), Share, 0.5),
        ([1, 2], tuple[Count, ...], (1, 2)),
        (np.array([1, 2]), tuple[Count, ...], (1, 2)),
        (range(3), tuple[int, ...], (0, 1, 2)),
        ((i for i in (4, 5)), Annotated[tuple[int, ...], Range(1, 2)], (4, 5)),
        ([1, 2.0], tuple[int, float], (1, 2.0)),
        ("a", Path, Path("a")),
        (Path("a"), str, "a"),
        (None, Count | None, None),
        (3, int | str | None, 3),
        ("3", int | str | None, "3"),
        ({"a": 1}, dict[str, int], {"a": 1}),
        (len, Any, len),
    ):
        made = held(value, hint, "x")
        assert made == wanted
        assert type(made) is type(wanted)
    for value, hint, words in (
        (range(10**12), Annotated[tuple[int, ...], Range(1, 10)], "at least 1 and at most 10 entries"),
        ([1], tuple[int, float], "at least 2 and at most 2 entries"),
        ("ab", tuple[str, ...], "a list"),
        (None, int, "a whole number"),
        ([], int | str, "a whole number or text"),
        (0, Count | Share | None, None),
        (3, dict[str, int], "dict"),
        ("b", Literal["aa", "ab"], "did you mean"),
        (10**5000, Literal["aa", "ab"], "known: aa, ab"),
    ):
        if words is None:
            assert held(value, hint, "x") == 0.0  # the second of the types takes it
            continue
        with pytest.raises(UserError, match=f"x is .*{words}"):
            held(value, hint, "x")


def test_what_a_dataclass_itself_raises_is_the_user_s_error_in_its_file() -> None:
    """As a package's own agent may: ValueError and TypeError alike, with the file's name before them."""

    @dataclass(frozen=True)
    class Own:
        size: int
        error: str = ""

        def __post_init__(self) -> None:
            check(self)
            if self.error:
                raise {"value": ValueError, "type": TypeError}[self.error]("of its own")

    assert read(Own, {"size": 3}, "file") == Own(3)
    for values, said in (
        ({"size": 3, "error": "value"}, "file: of its own"),
        ({"size": 3, "error": "type"}, "file: of its own"),
        ({}, "file: the key `size` is missing."),
        ({"size": "3"}, "file: size is '3'; expected a whole number."),
    ):
        with pytest.raises(UserError) as caught:
            read(Own, values, "file")
        assert str(caught.value) == said
    with pytest.raises(UserError, match=r"^--size is '3'; expected a whole number\.$"):
        Own("3")  # type: ignore[arg-type]


def test_an_override_that_is_no_field_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for call, said in (
        (lambda: diffrl.train("bc/maze2d-umaze-v1", stepz=3), r"'stepz' of a run .*did you mean 'steps'"),
        (
            lambda: diffrl.train("bc/maze2d-umaze-v1", agent="bc"),
            r"agent is 'bc'; .*configuration\('bc', dataset",
        ),
        (
            lambda: diffrl.train("bc/maze2d-umaze-v1", agent={"layer": 3}),
            "'layer' of the agent bc; did you mean 'layers'",
        ),
        (lambda: diffrl.train("bc/maze2d-umaze-v1", agent=3), "--agent is 3; expected an instance of AgentConfig"),
        (lambda: diffrl.online(tmp_path, capcity=3), "'capcity' of an online run; did you mean 'capacity'"),
        (lambda: finetune_policy(TUNING["dppo"](tmp_path), sedes=(0,)), "'sedes' of a fine-.*did you mean 'seeds'"),
    ):
        with pytest.raises(UserError, match=said):
            call()


def test_a_number_of_more_digits_than_python_reads_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text(f"steps: {'9' * 5000}")
    with pytest.raises(UserError, match="is not valid YAML"):
        read_yaml(tmp_path / "long.yaml")


def test_only_a_number_that_yaml_reads_as_text_is_said_to_be_one() -> None:
    """What is proposed is a number to YAML, the one that was meant."""
    for text in ("3e-4", "-1e5", "3.0e4", ".5E3"):
        assert isinstance(yaml.safe_load(text), str)
        with pytest.raises(UserError) as told:
            held(text, float, "rate")
        proposed = str(told.value).partition("(write ")[2].partition(",")[0]
        assert yaml.safe_load(proposed) == float(text)
    for text in ("0.5:0.9", "many", "", "3e", "e-4", "nan"):
        with pytest.raises(UserError) as told:
            held(text, float, "rate")
        assert "YAML" not in str(told.value)


def test_a_key_that_is_no_text_is_refused_in_a_line() -> None:
    with pytest.raises(UserError, match="There is no field 1 of the agent bc; "):
        configuration.configuration("bc", dataset="maze2d-umaze-v1", agent={1: 2})
