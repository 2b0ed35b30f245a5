"""`benchmarks/synther.py` over several models: cells, settings, statistics, and what it leaves of a page."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synther
from rich.console import Console
from synther_tables import identity, models_table, put_on_page, tables_of

import diffrl
from agents import IQL, TD3BC
from diffrl.data import d4rl
from diffrl.runs import config as configuration


def row(variant: str, model: int | None, curve: list[tuple[int, list[float]]], critics: str = "stabilised") -> Any:
    return {
        "data": "hopper-small",
        "agent": "iql",
        "variant": variant,
        "critics": critics,
        "model": model,
        "steps": curve[-1][0],
        "curve": curve,
    }


ROWS = [
    row("real", None, [(1, [0.0, 0.0]), (2, [10.0, 30.0]), (3, [99.0, 99.0])]),
    row("synthetic", 0, [(1, [0.0, 0.0]), (2, [10.0, 14.0])]),
    row("synthetic", 1, [(1, [0.0, 0.0]), (2, [20.0, 20.0])]),
    row("synthetic", 2, [(1, [6.0, 6.0]), (2, [1.0, 7.0])]),
]


def test_the_error_is_over_models_and_for_real_data_over_seeds() -> None:
    """Models of 12, 20 and 4: 12 +- 8/sqrt(3). Seeds of 10 and 30 on real data: 20 +- 10. At the last common step."""
    table = models_table(ROWS)
    assert table[1] == [
        "hopper-small",
        "iql",
        "stabilised",
        "0, 1, 2",
        "2",
        "20.0 ± 10.0 (10.0)",
        "12.0 ± 4.6 (7.0)",
        "",
    ]
    assert math.isclose(8 / math.sqrt(3), 4.6, abs_tol=0.05)


def test_real_data_are_one_cell_and_every_model_has_its_own() -> None:
    options = synther.Options(critics="stabilised", models=(0, 1, 2), agents=("iql",))
    cells = synther.cells_of(options)
    assert [(c.variant, c.model) for c in cells] == [
        ("real", None),
        *((variant, model) for variant in ("synthetic", "both") for model in (0, 1, 2)),
    ]
    folders = {cell.folder(options, "hopper-small").name for cell in cells}
    others = {cell.folder(synther.Options(agents=("iql",)), "hopper-small").name for cell in cells}
    assert len(folders) == 7
    assert not folders & others


def test_stabilised_critics_are_those_of_the_small_diffusion_ql() -> None:
    small = configuration.find("diffusion_ql/maze2d-umaze-v1-small").agent
    td3, iql = (synther.agent_config(name, "hopper-small", "stabilised").agent for name in ("td3_bc", "iql"))
    assert isinstance(td3, TD3BC)
    assert isinstance(iql, IQL)
    for settings in (td3, iql):
        for field in ("n_critics", "q_agg", "critic_layer_norm", "target_rate", "width", "batch_size"):
            assert getattr(settings, field) == getattr(small, field), field
    assert td3.actor_q == "min"
    assert iql.deterministic, "what else CORL has on hopper stays"


def test_a_page_keeps_everything_but_its_part(tmp_path: Path) -> None:
    page = tmp_path / "synther.md"
    old = "# A page\n\n<!-- agents -->\n| old |\n<!-- /agents -->\n\n<!-- models -->\n| x |\n<!-- /models -->\n\nEnd.\n"
    page.write_text(old)
    put_on_page(page, ROWS)
    new = page.read_text()
    head, rest = old.split("| x |\n")
    assert new.startswith(head)
    assert new.endswith(rest)
    assert "| 12.0 ± 4.6 (7.0) |" in new.removeprefix(head).removesuffix(rest)
    assert (tmp_path / "synther_models.json").exists()


def test_rows_from_before_there_were_models_are_the_first_models_of_corl() -> None:
    old = {"data": "hopper", "agent": "iql", "variant": "both", "steps": 1, "curve": [(1, [1.0])]}
    assert identity(old) == ("hopper", "iql", "both", "corl", 0)
    assert identity({**old, "variant": "real"}) == ("hopper", "iql", "real", "corl", None)
    assert tables_of({"agents": [old, *ROWS]})[0][0][1][:2] == ["hopper", "iql"]
    assert len(tables_of({"agents": [old]})) == 1


def test_a_cell_that_is_there_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a longer run goes on from it, with the evaluations it had."""
    options = synther.Options(
        critics="stabilised", agents=("iql",), variants=("real",), seeds=(0,), agent_steps=2, eval_every=1, episodes=1
    )
    options = dataclasses.replace(options, out=tmp_path)
    draw = np.random.default_rng(0).uniform
    columns = {"observations": draw(size=(300, 11)), "actions": draw(size=(300, 3)), "rewards": draw(size=300)}
    ends = {"terminals": np.zeros(300, bool), "timeouts": np.arange(300) % 10 == 9}
    d4rl.write_blocks(tmp_path / "few.hdf5", [{k: v.astype(np.float32) for k, v in columns.items()} | ends], {})
    monkeypatch.setattr(synther, "real_file", lambda *_: str(tmp_path / "few.hdf5"))

    console = Console(quiet=True)
    (made,) = synther.train_agents(options, "hopper-small", console)
    assert [step for step, _ in made["curve"]] == [1, 2]
    monkeypatch.setattr(diffrl, "train", None)
    (again,) = synther.train_agents(options, "hopper-small", console)
    assert again == made
    (longer,) = synther.train_agents(dataclasses.replace(options, agent_steps=3), "hopper-small", console)
    assert longer["curve"][:2] == made["curve"]
    assert longer["steps"] == 3
