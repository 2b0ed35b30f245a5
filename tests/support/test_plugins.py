"""Objects of other packages are found by entry points, and refused with a reason."""

import shutil
import sys
from pathlib import Path

import pytest

from diffrl.support import plugins
from diffrl.support.errors import UserError
from tests.support.plugin_cases import install

GROUP = "diffrl.rewards"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_an_object_is_found_by_its_name_and_loaded_when_asked_for(site: Path) -> None:
    assert plugins.find(GROUP, "warmth", ()) is None
    source = "print('imported')\nclass Warmth: ..."
    install(site, "warm-things", {GROUP: {"warmth": "warm_module:Warmth"}}, warm_module=source)
    plugin = plugins.find(GROUP, "warmth", ("jpeg",))
    assert plugin is not None
    assert (plugin.name, plugin.distribution) == ("warmth", "warm-things")
    assert plugin.load().__name__ == "Warmth"
    assert plugins.find("diffrl.agents", "warmth", ()) is None
    assert plugins.listed(GROUP, ()) == ["warmth (warm-things)"]


def test_listing_imports_nothing(site: Path) -> None:
    install(site, "broken", {GROUP: {"broken": "broken_module:Reward"}}, broken_module="raise SystemError")
    assert plugins.listed(GROUP, ()) == ["broken (broken)"]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import no_such_module_anywhere", "No module named 'no_such_module_anywhere'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("", "has no attribute 'Reward'"),
        ("if:", "SyntaxError"),
    ],
)
def test_what_cannot_be_imported_is_said_in_one_sentence(site: Path, source: str, why: str) -> None:
    name = f"broken_{abs(hash(source))}"
    install(site, "broken", {GROUP: {"broken": f"{name}:Reward"}}, **{name: source})
    plugin = plugins.find(GROUP, "broken", ())
    assert plugin is not None
    with pytest.raises(UserError, match=why) as caught:
        plugin.load()
    assert f"The reward 'broken' of broken ({name}:Reward) cannot be used" in str(caught.value)


def test_a_name_of_ours_stays_ours_and_one_brought_twice_is_refused(site: Path) -> None:
    for distribution in ("one", "two"):
        install(site, distribution, {GROUP: {"both": "module:Reward"}})
    install(site, "three", {GROUP: {"jpeg": "module:Reward"}})
    with pytest.raises(UserError, match=r"'both' of (one|two) .* (one|two) brings one of the same name"):
        plugins.find(GROUP, "both", ("jpeg",))
    assert plugins.find(GROUP, "jpeg", ("jpeg",)) is None
    (said,) = plugins.left_out(GROUP, ("jpeg", "png"))
    assert "'jpeg' of three (module:Reward) cannot be used: the name is that of one of diffrl's own" in said
    for plugin in plugins.found(GROUP):
        other = {"one": "two brings", "two": "one brings", "three": "one of diffrl's own"}[plugin.distribution]
        with pytest.raises(UserError, match=f"of {plugin.distribution} .*{other}"):
            plugins.check_name(plugin, ("jpeg",))
    both, jpeg = plugins.listed(GROUP, ("jpeg",))
    assert both in ("both (left out: one and two bring one each)", "both (left out: two and one bring one each)")
    assert jpeg == "jpeg (three; left out: the name is that of one of diffrl's own, which is used instead)"


def test_a_package_that_comes_or_goes_meanwhile_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found is kept while no folder of Python's path changes, which "" does with the current folder."""
    here, there = tmp_path / "here", tmp_path / "there"
    install(there, "two", {GROUP: {"two": "module:Reward"}})
    here.mkdir()
    monkeypatch.setattr(sys, "path", ["", *sys.path])

    def found() -> list[str]:
        return [plugin.name for plugin in plugins.found(GROUP) if plugin.name in ("one", "two")]

    monkeypatch.chdir(here)
    assert found() == found() == []
    install(here, "one", {GROUP: {"one": "module:Reward"}})
    assert found() == ["one"]
    monkeypatch.chdir(there)
    assert found() == ["two"]
    shutil.rmtree(there / "two-1.0.dist-info")
    assert found() == []
