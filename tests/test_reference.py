"""The site's reference says what the docstrings say: no name of an argument, and no other word, is lost on the way."""

import functools
import html
import importlib.util
import re
import sys
from typing import Any

import pytest
import yaml

from tests.documents import ROOT

PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))


class _Anything(yaml.SafeLoader):
    """Of `mkdocs.yml`, whatever its tags are."""


_Anything.add_multi_constructor("", lambda *_: None)


@pytest.fixture(scope="module")
def extension() -> Any:
    """`docs/mkdocs_docstrings.py` as a module."""
    pytest.importorskip("griffe", reason="needs the extra: pip install 'diffrl[docs]'")
    spec = importlib.util.spec_from_file_location("mkdocs_docstrings", ROOT / "docs" / "mkdocs_docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def read(extension: Any) -> tuple[dict[str, str], dict[str, Any]]:
    """By name: docstrings as they are written, and what the reference has of each object."""
    import griffe

    written, shown = {}, {}
    for package in ("diffrl", "agents", "envs"):
        loader = griffe.GriffeLoader(search_paths=[str(ROOT)])
        loaded = loader.load(package)
        written |= {one.path: one.docstring.value for one in extension.walk(loaded) if one.docstring is not None}
        extension.Docstrings().on_package(pkg=loaded, loader=loader)
        shown |= {one.path: one for one in extension.walk(loaded) if one.docstring is not None}
    return written, shown


@functools.cache
def converter() -> Any:
    """Python's Markdown with the extensions that the site has."""
    markdown = pytest.importorskip("markdown", reason="needs the extra: pip install 'diffrl[docs]'")
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), _Anything)
    used = [name if isinstance(name, str) else next(iter(name)) for name in config["markdown_extensions"]]
    return markdown.Markdown(extensions=[name for name in used if name != "toc"])


@functools.cache
def converted(text: str) -> str:
    """Markdown as the site has it, in HTML."""
    return str(converter().reset().convert(text))


def words(text: str) -> list[str]:
    """The words of a text, without the signs of code, of tables and of examples in Python."""
    return [word for word in text.replace("`", "").replace("|", " ").split() if word.strip("-:")]


def test_no_word_of_a_docstring_is_lost(read: tuple[dict[str, str], dict[str, Any]], extension: Any) -> None:
    """In HTML, in their order: asterisks, names before colons, what Markdown would take for its own."""
    written, shown = read
    assert len(shown) > 4_000
    for path, one in shown.items():
        if path not in written:  # a field without a docstring, shown for its name
            continue
        text = html.unescape(re.sub(r"<[^>]+>", "", converted(one.docstring.value)))
        assert words(text) == words(extension.BOLD.sub(r"\1", written[path])), path


def test_every_argument_that_is_explained_is_an_item_with_its_name(
    read: tuple[dict[str, str], dict[str, Any]], extension: Any
) -> None:
    written, shown = read
    seen = 0
    for path, one in shown.items():
        made = converted(one.docstring.value)
        for name in extension.arguments(one):
            explained = re.search(rf"^(\w+, )*{name}(, \w+)*: ", written.get(path, ""), re.MULTILINE)
            if explained is None:
                continue
            seen += 1
            assert re.search(rf"<li>\s*(<p>)?(<code>\*{{0,2}}\w+</code>, )*<code>{name}</code>", made), (
                f"{path}: {name}"
            )
    assert seen > 300


def test_arguments_are_items_where_they_follow_in_a_sentence(extension: Any) -> None:
    """As they are written here: on lines of their own, several at once, after each other, and errors after them."""
    text = """Do it.

a, b: (B, *image), of both; c: the third. Raises ValueError
    for others. **rest: what
    is left. d: none of its own.

No box: of this one

    x_r = b D
"""
    made = extension.markdown(text, {"a", "b", "c", "rest"})
    assert made == (
        "Do it.\n\n- `a`, `b`: (B, \\*image), of both;\n- `c`: the third.\n\nRaises ValueError for others.\n\n"
        "- `**rest`: what is left. d: none of its own.\n\nNo box: of this one\n\n    x_r = b D\n"
    )
    assert "<pre>" in converted(made)
    assert converted(made).count("<li>") == 3


def test_words_between_double_asterisks_are_bold_and_no_others_are(
    read: tuple[dict[str, str], dict[str, Any]], extension: Any
) -> None:
    text = "**The last\nstep** to a**b, 2 ** 3, **more and **others has *one*, `**code**`, **two**."
    made = converted(extension.markdown(text, set()))
    assert made.replace("\n", " ") == (
        "<p><strong>The last step</strong> to a**b, 2 ** 3, **more and **others has *one*, <code>**code**</code>, "
        "<strong>two</strong>.</p>"
    )
    assert "<strong>The last step</strong>" in converted(read[1]["diffrl.diffusion.chain"].docstring.value)


def test_the_reference_shows_what_is_offered_and_can_be_read(read: tuple[dict[str, str], dict[str, Any]]) -> None:
    """Of the core its own names and no helper; fields of tuples; constants of other files as their values."""
    _, shown = read
    core = "diffrl.diffusion"
    assert f"{core}.process.unknown" not in shown
    assert f"{core}.sampler.step_noise" not in shown
    assert {f"{core}.sampler.SolverStep.{name}" for name in "tasfgnrbw"} <= {*shown}
    assert f"{core}.sampler.Trial.weight" in shown
    assert str(shown["diffrl.runs.config.TrainConfig.log"].value) == "'tensorboard'"
    assert shown[f"{core}.sampler.Sampler.plan"].value is None


def test_the_pages_use_the_extension_and_have_what_tutorials_call() -> None:
    """No style of docstrings besides it; each name that a tutorial takes from us is in the reference."""
    config = yaml.load((ROOT / "mkdocs.yml").read_text(), _Anything)
    options = next(one for one in config["plugins"] if "mkdocstrings" in one)["mkdocstrings"]["handlers"]["python"][
        "options"
    ]
    assert options["docstring_style"] is None
    assert options["extensions"] == ["docs/mkdocs_docstrings.py"]
    named = {name for page in PAGES for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)}
    import diffrl
    import diffrl.images

    for package in (diffrl, diffrl.images):
        for name in set(package.__all__) - {"FinetuneConfig"}:  # a member of diffrl.images.config
            assert f"{package.__name__}.{name}" in named
    assert "diffrl.augment.synther.augmenter.synther" in named


def test_every_name_of_the_reference_is_there() -> None:
    """It can be imported, as the heading says."""
    for page in PAGES:
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE):
            module, _, attribute = name.rpartition(".")
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                assert hasattr(importlib.import_module(module), attribute), name
