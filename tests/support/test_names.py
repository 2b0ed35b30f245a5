"""Names of runs that are cut nowhere: what sets them apart, and where their lines end."""

import html
import re

from hypothesis import given
from hypothesis import strategies as st

from diffrl.support.names import apart, breakable, tells, with_agents, wrapped

NAMES = st.text("ab,=-_. <", min_size=1, max_size=60)


def test_what_all_names_share_is_said_once() -> None:
    names = ["bc-maze2d-umaze-v1,agent.width=32,steps=50", "bc-maze2d-umaze-v1,agent.width=64,steps=50"]
    assert apart(names) == (["agent.width=32", "agent.width=64"], "bc-maze2d-umaze-v1,steps=50")


def test_names_that_would_be_empty_or_alike_stay_whole() -> None:
    for names in (["a"], ["a", "b"], ["a,b"], ["a", "a,b"], ["a,b", "b,a"], ["a,a,b", "a,b"], ["a,", "b,"]):
        assert apart(names) == (names, "")


@given(st.lists(NAMES, min_size=1, max_size=5))
def test_no_two_names_become_one(names: list[str]) -> None:
    short, shared = apart(names)
    assert len(set(short)) == len(set(names))
    assert all(short)
    for name, own in zip(names, short, strict=True):
        assert {*own.split(","), *(shared.split(",") if shared else ())} == set(name.split(","))


@given(NAMES, st.integers(3, 20))
def test_lines_hold_the_whole_name_and_are_no_wider(name: str, width: int) -> None:
    lines = wrapped(name, width).split("\n")
    assert "".join(lines) == name
    assert max(map(len, lines)) <= width


def test_lines_end_where_words_do() -> None:
    assert wrapped("agent.learning_rate=0.0003,agent.width=32", 27) == "agent.learning_rate=0.0003,\nagent.width=32"


@given(NAMES)
def test_a_page_has_the_whole_name(name: str) -> None:
    assert html.unescape(re.sub("<wbr>", "", breakable(name))) == name


def test_agents_stand_in_brackets_unless_every_name_tells_its_own() -> None:
    """What is one word of letters tells an agent, also where a part of the name is left out."""
    assert with_agents(["full", "iql"], ["full", "iql"], ["iql", "iql"]) == ["full (iql)", "iql (iql)"]
    assert with_agents(["lr=1", "lr=2"], ["bc-maze,lr=1", "bc-maze,lr=2"], ["bc", "bc"]) == ["lr=1", "lr=2"]
    told = {"td3_bc": ("td3_bc-hopper", "my-td3_bc2"), "bc": ("x_bc", "bc"), "iql": ("2iql,seed=0",)}
    assert all(tells(name, agent) for agent, names in told.items() for name in names)
    assert not any(tells(name, "bc") for name in ("abc", "bcd", "full", "b-c"))
    assert tells("td3_bc-and-bc", "bc", ["td3_bc"])
    assert not any(tells(name, "bc", ["td3_bc", "diffusion_bc"]) for name in ("td3_bc-maze2d", "my-diffusion_bc2"))
    assert with_agents(["td3_bc-maze2d"], ["td3_bc-maze2d"], ["bc"], ["td3_bc"]) == ["td3_bc-maze2d (bc)"]
