"""Preferences and labelled pairs: which is preferred, by which share, and files that are read as they were written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffrl.data import d4rl, values
from diffrl.data.d4rl import fingerprint
from diffrl.data.offline import OfflineDataset
from diffrl.data.preferences import (
    LabelledPairs,
    Preferences,
    data_fingerprint,
    draw_pairs,
    label_segments,
    read_preferences,
    segment_starts,
    teach,
)
from diffrl.data.values import segment_advantages, segment_returns
from diffrl.support.errors import UserError


def walk(lengths: list[int]) -> OfflineDataset:
    """Every row is told by its number, which is its reward too."""
    n = sum(lengths)
    ends = np.zeros(n, np.bool_)
    ends[np.cumsum(lengths) - 1] = True
    number = np.arange(n, dtype=np.float32)
    return OfflineDataset(number[:, None], number[:, None] / n, number, ends, np.zeros(n, np.bool_))


def test_judged_pairs_are_whole_segments_and_the_better_is_preferred() -> None:
    """No segment crosses an episode's end; at temperature 0 the preferred return is larger, always."""
    data = walk([5, 3, 9, 4])
    pairs = label_segments(data, 300, 4, 0, by="return")
    episodes, _ = data.episode_indices()
    both = [side[..., 0].astype(int) for side in (pairs.observations_w, pairs.observations_l)]
    for rows in both:
        assert (np.diff(rows, axis=1) == 1).all()
        assert (episodes[rows] == episodes[rows[:, :1]]).all()
    assert set(np.concatenate(both)[:, 0]) == {0, 1, 8, 9, 10, 11, 12, 13, 17}
    assert (pairs.observations_w.sum((1, 2)) > pairs.observations_l.sum((1, 2))).all()
    np.testing.assert_allclose(pairs.actions_w, pairs.observations_w / 21, rtol=1e-6)


def test_labels_are_bradley_terrys_and_turned_round_at_the_rate_said() -> None:
    data = walk([2, 2])  # two segments of 2: returns 1 and 5
    share = np.mean(label_segments(data, 20_000, 2, 0, by="return", label_noise=0.2).observations_w[:, 0, 0] == 2)
    assert share == pytest.approx(0.8, abs=0.01)
    pairs = label_segments(data, 40_000, 2, 0, by="return", temperature=3.0)
    differ = pairs.observations_w[:, 0, 0] != pairs.observations_l[:, 0, 0]
    share = np.mean(pairs.observations_w[differ, 0, 0] == 2)
    assert share == pytest.approx(1 / (1 + np.exp(-4 / 3)), abs=0.01)


def test_preferences_are_read_as_they_were_written(tmp_path: Path) -> None:
    pairs = label_segments(walk([6, 6]), 10, 3, 0, by="return")
    read = Preferences.read(pairs.write(tmp_path / "pairs.safetensors", {"by": "hand"}))
    for name in ("observations_w", "actions_w", "observations_l", "actions_l"):
        np.testing.assert_array_equal(getattr(read, name), getattr(pairs, name))
    np.testing.assert_array_equal(pairs.flipped().actions_w, pairs.actions_l)


def test_lists_are_taken_as_arrays_are(tmp_path: Path) -> None:
    """And numbers of another precision; what is no array of numbers is named."""
    pairs = label_segments(walk([6, 6]), 10, 3, 0, by="return")
    names = ("observations_w", "actions_w", "observations_l", "actions_l")
    given = Preferences(*(getattr(pairs, name).tolist() for name in names), equal=[False] * 9 + [True])  # type: ignore
    assert given.equal.dtype == np.bool_
    read = Preferences.read(given.write(tmp_path / "pairs"))
    for name in names:
        np.testing.assert_array_equal(getattr(read, name), getattr(pairs, name))
        assert getattr(given, name).dtype == np.float32
    columns = [getattr(pairs, name) for name in names]
    with pytest.raises(UserError, match="actions_w holds no array of numbers"):
        Preferences(columns[0], [[[1.0], [1.0, 2.0]]], *columns[2:])  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"observations_w has shape \(\); expected \(pairs, steps, size\)"):
        Preferences(0.0, *columns[1:])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="observations_w of pair 3 is not finite"):
        Preferences(np.where(np.arange(10)[:, None, None] == 3, 1e300, columns[0].astype(float)), *columns[1:])
    for odd in (columns[1] + 1j, columns[1].astype(str), columns[1].astype(object)):
        with pytest.raises(UserError, match=f"actions_w holds no array of numbers .its type is {odd.dtype}"):
            Preferences(columns[0], odd, *columns[2:])
    for value, said in ((0.5, "0.5"), (2, "2"), (-1, "-1"), (np.nan, "nan")):
        with pytest.raises(UserError, match=f"equal holds {said}; expected true or false"):
            Preferences(*columns, equal=[0] * 9 + [value])  # type: ignore[arg-type]
    with pytest.raises(UserError, match="equal holds no array of numbers"):
        Preferences(*columns, equal=["no"] * 10)  # type: ignore[arg-type]
    assert Preferences(*columns, equal=[0.0] * 9 + [1]).equal.tolist() == [False] * 9 + [True]  # type: ignore[arg-type]


def test_a_name_of_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    pairs = label_segments(walk([6, 6]), 10, 3, 0, by="return")
    for name in ("pairs.npz", "pairs.JSON", "pairs.h5", "pairs.pkl"):
        with pytest.raises(UserError, match=f"{name}: preferences are written as safetensors; expected no other kind"):
            pairs.write(tmp_path / name)
    assert not list(tmp_path.iterdir())
    for name in ("prefs-0.5", "a.v2", "a.SAFETENSORS", "a.safetensors", "a"):
        assert len(Preferences.read(pairs.write(tmp_path / name))) == 10


def test_what_is_no_file_of_preferences_says_so(tmp_path: Path) -> None:
    pairs = label_segments(walk([6, 6]), 10, 3, 0, by="return")
    with pytest.raises(UserError, match="no file of preferences"):
        Preferences.read(tmp_path / "none")
    (tmp_path / "pickle").write_bytes(b"\x80\x04nonsense")
    expected = r"is not a file of preferences \(JSON of `diffrl augment label`, or safetensors\)\.$"
    d4rl.write(tmp_path / "more.hdf5", walk([6, 6]))
    for content in (b"", b"PK", (tmp_path / "more.hdf5").read_bytes()):
        (tmp_path / "a file").write_bytes(content)
        with pytest.raises(UserError, match=expected):
            Preferences.read(tmp_path / "a file")
    with pytest.raises(UserError, match=expected):
        Preferences.read(tmp_path / "pickle")
    import safetensors.numpy

    safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, tmp_path / "other")
    with pytest.raises(UserError, match="expected the format"):
        Preferences.read(tmp_path / "other")
    with pytest.raises(UserError, match="2 and"):
        pairs.check_sizes(2, 1, "it")
    with pytest.raises(UserError, match=r"shape \(10, 3\)"):
        Preferences(pairs.observations_w[..., 0], pairs.actions_w, pairs.observations_l, pairs.actions_l)
    bad = pairs.actions_w.copy()
    bad[4, 0, 0] = np.nan
    with pytest.raises(UserError, match="pair 4 is not finite"):
        Preferences(pairs.observations_w, bad, pairs.observations_l, pairs.actions_l)
    with pytest.raises(UserError, match="the same of both"):
        Preferences(pairs.observations_w, pairs.actions_w, pairs.observations_l[:9], pairs.actions_l)
    with pytest.raises(UserError, match="longest episode has 6"):
        label_segments(walk([6, 6]), 10, 7, 0)
    still = walk([6, 6])
    still.rewards[:] = 0
    with pytest.raises(UserError, match="differ in return"):
        label_segments(still, 10, 3, 0, by="return")


def test_advantages_are_of_what_was_done_and_not_of_where(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state s is worth 2 s whatever is done; an action adds its own size. V takes the former away."""
    monkeypatch.setattr(values, "STEPS", 400)
    rng = np.random.default_rng(0)
    states, done = rng.integers(0, 5, 2000).astype(np.float32), rng.uniform(-1, 1, 2000).astype(np.float32)
    ends = np.ones(2000, np.bool_)
    data = OfflineDataset(states[:, None], done[:, None], 2 * states + done, ends, ~ends)
    gained = segment_advantages(data, np.arange(2000), 1, 0.9, 0)
    np.testing.assert_allclose(gained, done, atol=0.3)
    pairs = label_segments(data, 1000, 1, 0)
    assert np.mean(pairs.actions_w > pairs.actions_l) > 0.9
    by_return = label_segments(data, 1000, 1, 0, by="return")
    assert np.mean(by_return.actions_w > by_return.actions_l) < 0.75


def test_a_terminal_state_is_worth_nothing_and_an_unknown_one_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row an episode, 1 a row: advantages are 0. Where the state after a cut is not known, no segment ends."""
    monkeypatch.setattr(values, "STEPS", 400)
    data = OfflineDataset(
        np.zeros((40, 1), np.float32),
        np.zeros((40, 1), np.float32),
        np.ones(40, np.float32),
        np.ones(40, np.bool_),
        np.zeros(40, np.bool_),
    )
    np.testing.assert_allclose(segment_advantages(data, np.arange(40), 1, 0.9, 0), 0, atol=0.05)
    cut = dataclasses.replace(walk([4, 4, 4]), terminals=np.zeros(12, np.bool_), timeouts=np.arange(12) % 4 == 3)
    pairs = label_segments(cut, 100, 2, 0)
    assert set(pairs.observations_w[:, 0, 0]) | set(pairs.observations_l[:, 0, 0]) <= {0, 1, 4, 5, 8, 9}


def test_pairs_that_are_all_ties_are_refused() -> None:
    """A loss of them has no gradient but rounding; one pair that differs is enough to begin with."""
    segments = np.random.default_rng(0).standard_normal((3, 4, 2)).astype(np.float32)
    with pytest.raises(UserError, match="In mine the preferred segment of each of the 3 pairs is the other one too"):
        Preferences(segments, segments, segments.copy(), segments.copy()).check_preferred("mine")
    other = segments.copy()
    other[2, 3, 1] += 1
    Preferences(segments, segments, segments, other).check_preferred("mine")


# --- labelled pairs --------------------------------------------------------------------------------------------------


def pairs_of(data: OfflineDataset, pairs: list[tuple[int, int]], labels: list[float]) -> LabelledPairs:
    found = LabelledPairs.empty(data, 3, {"by": "hand", "noise": 0.1})
    for (first, second), label in zip(pairs, labels, strict=True):
        found = found.added(first, second, label)
    return found


def test_labels_are_read_as_they_were_written_and_say_what_is_preferred(tmp_path: Path) -> None:
    """To the bit, about included; label 0 prefers the first. From either kind of file come the same preferences."""
    data = walk([6, 9])
    made = pairs_of(data, [(0, 7), (9, 2), (3, 8)], [1, 0, 0.5])
    read = LabelledPairs.read(made.write(tmp_path / "labels.json"), data)
    assert (read.dataset, read.fingerprint, read.segment, read.about) == (
        made.dataset,
        made.fingerprint,
        3,
        {"by": "hand", "noise": 0.1},
    )
    np.testing.assert_array_equal(read.pairs, [[0, 7], [9, 2], [3, 8]])
    np.testing.assert_array_equal(read.labels, [1, 0, 0.5])
    text = (tmp_path / "labels.json").read_bytes()
    assert read.write(tmp_path / "again.json").read_bytes() == text
    assert json.loads(text)["pairs"][1:] == [{"segments": [9, 2], "label": 0}, {"segments": [3, 8], "label": "equal"}]
    found = read_preferences(tmp_path / "labels.json", data)
    np.testing.assert_array_equal(found.observations_w[..., 0], [[7, 8, 9], [9, 10, 11], [3, 4, 5]])
    np.testing.assert_array_equal(found.observations_l[..., 0], [[0, 1, 2], [2, 3, 4], [8, 9, 10]])
    np.testing.assert_array_equal(found.equal, [False, False, True])
    also = read_preferences(found.write(tmp_path / "segments.safetensors"), data)
    for field in dataclasses.fields(Preferences):
        np.testing.assert_array_equal(getattr(also, field.name), getattr(found, field.name))
    turned = made.flipped().segments(data)
    np.testing.assert_array_equal(turned.observations_w[:2], found.observations_l[:2])
    np.testing.assert_array_equal(found.take(~found.equal).actions_l, found.actions_l[:2])


def test_a_label_that_is_undone_was_never_given(tmp_path: Path) -> None:
    data = walk([6, 9])
    made = pairs_of(data, [(0, 7), (9, 2)], [1, 0])
    again = made.added(3, 8, 0.5).without_last()
    assert again.write(tmp_path / "b").read_bytes() == made.write(tmp_path / "a").read_bytes()
    none = made.without_last().without_last().without_last()
    none.write(tmp_path / "none.json")
    assert len(LabelledPairs.read(tmp_path / "none.json", data, empty=True)) == 0
    np.testing.assert_array_equal(made.head(1).pairs, [[0, 7]])


def test_labels_know_their_data_by_what_was_seen() -> None:
    """Other rewards, actions in other units and other marks of ends leave them valid; other observations do not."""
    data = walk([6, 9])
    made = pairs_of(data, [(0, 7)], [1])
    other = dataclasses.replace(data, rewards=-data.rewards, actions=2 * data.actions)
    assert fingerprint(other) != fingerprint(data)
    made.check(other, "it")
    seen = data.observations.copy()
    seen[4, 0] += 1
    assert data_fingerprint(dataclasses.replace(data, observations=seen)) != made.fingerprint
    with pytest.raises(UserError, match="it labels segments of another data set"):
        made.check(dataclasses.replace(data, observations=seen), "it")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pairs": []}, "holds no pairs"),
        ({"pairs": [{"segments": [0, 99], "label": 0}]}, "pair 0: there is no segment 99; expected 0 to 14"),
        ({"pairs": [{"segments": [0, -1], "label": 0}]}, "expected two ids"),
        ({"pairs": [{"segments": [0, 1.0], "label": 0}]}, "expected two ids"),
        ({"pairs": [{"segments": [0, True], "label": 0}]}, "expected two ids"),
        ({"pairs": [{"segments": [0], "label": 0}]}, "expected two ids"),
        ({"pairs": [{"segments": [0, 10**30], "label": 0}]}, "expected two ids"),
        ({"pairs": [{"segments": [1, 4], "label": 0}]}, "segment 4 crosses its episode's end.*last is row 5"),
        ({"pairs": [{"segments": [0, 13], "label": 0}]}, "segment 13 crosses its episode's end.*last is row 14"),
        ({"pairs": [{"segments": [1, 1], "label": 0}]}, "segment 1 is compared with itself"),
        ({"pairs": [{"segments": [0, 1], "label": 2}]}, "the label is 2; expected 0, 1 or .equal."),
        ({"pairs": [{"segments": [0, 1], "label": True}]}, "the label is True"),
        ({"pairs": [{"segments": [0, 1], "label": 0.5}]}, "the label is 0.5"),
        ({"pairs": [{"segments": [0, 1], "label": "first"}]}, "the label is 'first'"),
        ({"pairs": [{"segments": [0, 1]}]}, "expected the keys segments and label"),
        ({"pairs": [[0, 1, 0]]}, "expected the keys segments and label"),
        ({"pairs": 3}, "pairs.*expected a list"),
        (
            {"pairs": [{"segments": [0, 1], "label": 0}, {"segments": [1, 0], "label": 0}]},
            "pairs 0 and 1 contradict each other",
        ),
        (
            {"pairs": [{"segments": [0, 1], "label": label} for label in ("equal", 0, 1)]},
            "pairs 1 and 2 contradict each other",
        ),
        ({"fingerprint": "0" * 64}, "labels segments of another data set"),
        (
            {"segment": 10},
            "Segments have 10 rows, and the longest episode has 9 steps. Give the options that say where",
        ),
        ({"segment": 0}, "segment.*at least 1"),
        ({"segment": "3"}, "segment.*a whole number"),
        ({"format": "other"}, "no file of labelled pairs"),
        ({"piars": []}, "did you mean 'pairs'"),
        ({"dataset": 7}, "dataset"),
    ],
)
def test_each_mistake_in_a_file_of_labels_has_a_line(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    data = walk([6, 9])
    path = pairs_of(data, [(0, 7)], [1]).write(tmp_path / "labels.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UserError, match=said) as error:
        read_preferences(path, data)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_what_is_no_file_of_labels_and_data_without_episodes_say_so(tmp_path: Path) -> None:
    data = walk([6, 9])
    with pytest.raises(UserError, match="does not exist"):
        read_preferences(tmp_path / "none.json", data)
    for text in ("{", "[]", "[" * 10**5, "\x00"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=r"bad\.json"):
            read_preferences(tmp_path / "bad.json", data)
    rows = walk([1] * 20)
    with pytest.raises(UserError, match="has no episodes: each of its 20 rows"):
        teach(rows, 5, 1, 0)
    wide = dataclasses.replace(data, observations=np.zeros((15, 4), np.float32))
    path = label_segments(data, 3, 2, 0, by="return").write(tmp_path / "p.safetensors")
    with pytest.raises(UserError, match="holds observations of 1"):
        read_preferences(path, wide)
    with pytest.raises(UserError, match=r"the label is 0\.3"):
        pairs_of(data, [(0, 1)], [0.3])
    nobody = pairs_of(data, [(0, 1)], [0.5]).segments(data)
    with pytest.raises(UserError, match="All 1 pairs of mine are labelled equal"):
        nobody.check_preferred("mine")


def test_whatever_becomes_of_a_files_bytes_it_is_refused_in_a_line_or_read(tmp_path: Path) -> None:
    """Bytes changed, cut out or doubled, in 300 ways: no other error than a UserError, and most are noticed."""
    data = walk([6, 9])
    whole = teach(data, 12, 3, 0, ties=0.2).write(tmp_path / "labels.json").read_bytes()
    rng, refused, path = np.random.default_rng(0), 0, tmp_path / "labels.json"
    for _ in range(300):
        a, b = np.sort(rng.integers(len(whole), size=2))
        middle = (bytes([rng.integers(32, 127)]), b"", 2 * whole[a:b])[rng.integers(3)]
        path.write_bytes(whole[:a] + middle + whole[b if len(middle) != 1 else a + 1 :])
        try:
            LabelledPairs.read(path, data)
        except UserError:
            refused += 1
    assert refused > 200


@pytest.mark.parametrize(
    "lengths", [[7], [9, 9], [2, 9], [9, 1, 1, 1], [3, 5, 8, 13, 62], [4, 4, 4, 4], [6, 9, 12, 15]]
)
def test_too_long_segments_are_told_a_length_that_works(lengths: list[int]) -> None:
    """Of that many rows there are two segments or more, and where there are several episodes, half of them have it."""
    data = walk(lengths)
    with pytest.raises(UserError, match=r"Segments have 100 rows, .* Ask for --segment \d+, or fewer\.") as error:
        segment_starts(data, 100)
    works = int(str(error.value).split("--segment ")[1].split(",")[0])
    assert len(segment_starts(data, works)) > 1
    assert len(lengths) == 1 or np.mean(np.array(lengths) >= works) >= 0.5


def test_drawn_pairs_differ_and_are_all_there_are() -> None:
    """Of 8 segments 28 pairs: all of them, each once, whatever the order; then none is left."""
    starts = segment_starts(walk([5, 3, 6]), 3)
    np.testing.assert_array_equal(starts, [0, 1, 2, 5, 8, 9, 10, 11])
    some = draw_pairs(starts, 10, np.random.default_rng(0))
    rest = draw_pairs(starts, 18, np.random.default_rng(1), some)
    every = {frozenset(pair) for pair in np.concatenate([some, rest]).tolist()}
    assert len(every) == 28
    assert {len(pair) for pair in every} == {2}
    with pytest.raises(UserError, match=r"only 18 are left of 8 segments.*(a smaller --segment)"):
        draw_pairs(starts, 19, np.random.default_rng(1), some)


def test_a_teacher_prefers_the_larger_return_but_for_ties_and_noise() -> None:
    """Without noise and ties the larger return always; noise 1 turns every label; ties are the closest pairs."""
    data = walk([40, 60, 50])
    exact = teach(data, 300, 4, 0)
    J = segment_returns(data, exact.pairs.reshape(-1), 4, 1.0).reshape(-1, 2)
    np.testing.assert_array_equal(exact.labels, (J[:, 1] > J[:, 0]).astype(float))
    assert 0.3 < exact.labels.mean() < 0.7
    np.testing.assert_array_equal(teach(data, 300, 4, 0, noise=1.0).labels, 1 - exact.labels)
    tied = teach(data, 300, 4, 0, ties=0.25)
    gap, equal = np.abs(J[:, 1] - J[:, 0]), tied.labels == 0.5
    assert equal.sum() == 75
    assert gap[equal].max() <= gap[~equal].min()
    assert tied.about["equal"] == 75
    assert tied.about["largest difference called equal"] == gap[equal].max()
    noisy = teach(data, 2000, 4, 1, noise=0.2)
    truth = teach(data, 2000, 4, 1)
    assert noisy.about["turned round"] == (noisy.labels != truth.labels).sum()
    assert noisy.about["turned round"] / 2000 == pytest.approx(0.2, abs=4 * np.sqrt(0.16 / 2000))
    noisy.check(data, "it")
    np.testing.assert_array_equal(teach(data, 300, 4, 0).pairs, exact.pairs)
    assert not np.array_equal(teach(data, 300, 4, 1).pairs, exact.pairs)


def test_a_teacher_of_equal_returns_prefers_nothing() -> None:
    """Exactly equal returns are ties, however few ties were asked for; where all are, there is nothing to teach."""
    data = walk([30, 30])
    data.rewards[:] = 0
    with pytest.raises(UserError, match="nothing is preferred"):
        teach(data, 50, 3, 0)
    data.rewards[10] = 1
    taught = teach(data, 200, 3, 0, noise=0.3)
    J = segment_returns(data, taught.pairs.reshape(-1), 3, 1.0).reshape(-1, 2)
    np.testing.assert_array_equal(taught.labels == 0.5, J[:, 0] == J[:, 1])


def test_returns_of_segments_are_discounted_sums() -> None:
    np.testing.assert_allclose(segment_returns(walk([9]), np.array([2, 5]), 3, 0.5), [2 + 1.5 + 1, 5 + 3 + 7 / 4])
