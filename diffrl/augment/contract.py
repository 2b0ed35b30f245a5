"""What an augmenter must keep to: rows of its shape, and finite ones. What its code raises is said with whose it is."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from diffrl.augment.augmenter import Augmenter
from diffrl.augment.config import Request
from diffrl.augment.methods import Method
from diffrl.data.offline import Floats
from diffrl.support.errors import UserError
from diffrl.support.plugins import Plugin

METHODS = (
    "open",
    "held_out_loss",
    "load",
    "sample",
    "table",
    "ends",
    "look",
    "real",
    "provenance",
    "warning",
    "remark",
)
"""The methods of an augmenter that `diffrl.augment.job` calls, without `trainer`, whose own are called besides."""
TRAINERS = ["advance", "sums", "state", "load"]
"""The methods of its trainer that run its model's code."""


def blame(augmenter: Augmenter, plugin: Plugin) -> None:
    """From now on, what a package's augmenter raises is a UserError that names its method, the package, and the line.

    The same holds for its trainer, and so for the model that is trained.
    """
    name = type(augmenter).__name__
    for method in METHODS:
        _blame(augmenter, method, f"{name}.{method}", plugin)
    make = augmenter.trainer

    def trainer(*given: Any, **named: Any) -> Any:
        with plugin.blamed(f"{name}.trainer"):
            made = make(*given, **named)
        learner = type(getattr(made, "learner", made)).__name__
        for method in TRAINERS:
            what = f"{learner}.update" if method == "advance" else f"{learner}, asked for its {method},"
            _blame(made, method, what, plugin)
        return made

    augmenter.trainer = trainer  # type: ignore[method-assign]


def _blame(thing: Any, method: str, what: str, plugin: Plugin) -> None:
    """Put a method of an object behind `plugin.blamed`, which calls it `what`."""
    own = getattr(thing, method, None)
    if own is None:  # which whoever calls it says
        return

    def call(*given: Any, **named: Any) -> Any:
        with plugin.blamed(what):
            return own(*given, **named)

    setattr(thing, method, call)


def hold(augmenter: Augmenter, by: str) -> None:
    """From now on, `sample` and `table` of an augmenter raise UserError for rows of another shape, or not finite.

    by: whose the augmenter is. What `sample` gives may hold anything where `table` is the augmenter's own.
    """
    give, make = augmenter.sample, augmenter.table
    of_transitions = type(augmenter).table is Augmenter.table

    def sample(generator: torch.Generator) -> NDArray[np.float32]:
        rows, shape = give(generator), (augmenter.chunk, augmenter.columns)
        if not isinstance(rows, np.ndarray) or rows.dtype != np.float32 or rows.shape != shape:
            kind, found = (str(getattr(rows, name, "")) for name in ("dtype", "shape"))
            raise UserError(
                f"{_called(augmenter, by)} cannot be used: {_method(augmenter, 'sample')} gives "
                f"{' '.join(word for word in (type(rows).__name__, kind, found) if word)}; expected ndarray float32 "
                f"{shape}, its `chunk` and `columns`."
            )
        if of_transitions:
            _refuse_odd(augmenter, by, {"rows": rows}, "sample")
        return rows

    def table(rows: Floats) -> dict[str, NDArray[Any]]:
        made = make(rows)
        _refuse_odd(augmenter, by, made, "table")
        return made

    augmenter.sample, augmenter.table = sample, table  # type: ignore[method-assign]


def options(request: Request, augmenter: Augmenter) -> set[str]:
    """The names of the method's options: of another package's the fields of its class, of ours the model's settings."""
    if isinstance(request, Method):
        return {field.name for field in dataclasses.fields(request)}
    return set(augmenter.model_settings)


def _refuse_odd(augmenter: Augmenter, by: str, table: Mapping[str, NDArray[Any]], method: str) -> None:
    """Raise UserError where rows are not finite. table: columns (n, ...) by name, which `method` has given."""
    bad: Any = False
    for column in table.values():
        if column.dtype.kind == "f":
            bad = bad | ~np.isfinite(column).reshape(len(column), -1).all(1)
    if n := int(np.sum(bad)):
        raise UserError(
            f"{_called(augmenter, by)} gives rows with numbers that are not finite: {n:,} of {np.size(bad):,} of "
            f"{_method(augmenter, method)}. No data set is written; its model is kept. "
            "Such rows are often of a model that is trained too briefly, or has diverged."
        )


def _called(augmenter: Augmenter, by: str) -> str:
    return f"The augmenter {augmenter.verb!r} of {by}"


def _method(augmenter: Augmenter, name: str) -> str:
    """A method by its class, with where it is written."""
    code = getattr(inspect.unwrap(getattr(type(augmenter), name)), "__code__", None)
    where = "" if code is None else f" ({code.co_filename}, line {code.co_firstlineno})"
    return f"{type(augmenter).__name__}.{name}{where}"
