"""`diffrl diagnose`: its numbers are those of the policy and of the data, for several seeds, and its errors teach."""

import dataclasses
import json
from pathlib import Path
from shutil import copytree

import h5py
import numpy as np
import pytest
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg

import diffrl
from agents import BC, DiffusionBC
from diffrl.cli import main
from diffrl.runs.diagnose import report
from diffrl.runs.diagnose.measures import diagnose
from diffrl.runs.policy import load_agent
from diffrl.runs.run import Run
from diffrl.support import folder
from diffrl.support.errors import UserError
from envs.datasets import generate, load_dataset
from tests.fixtures.make_old_runs import FOLDER
from tests.training.conftest import tiny

CLONING = DiffusionBC(width=16, layers=1, batch_size=16)
QUICK = {"rows": 128, "steps": (1, 2, 4), "quiet": True}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data_directory: Path) -> Path:
    """Diffusion-QL, two seeds, 60 steps, on the first 2,000 of 3,000 rows: with checkpoints, held-out rows, critics."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_DATA", str(data_directory))
        file = tmp_path_factory.mktemp("diagnose-data") / "maze.hdf5"
        generate("maze2d-umaze-v1", file, rows=3000, progress=False)
        out = tmp_path_factory.mktemp("runs") / "ql"
        config = tiny(out, rows=2000, steps=60, eval_every=20, log_every=20, env="none")
        return diffrl.train(dataclasses.replace(config, dataset=str(file)), quiet=True)


@pytest.fixture(scope="module")
def result(run: Path) -> dict:
    return diagnose(run, **QUICK)


def numbers(part) -> list[float]:
    """All numbers in a JSON value."""
    if isinstance(part, dict):
        return [x for value in part.values() for x in numbers(value)]
    if isinstance(part, list | tuple):
        return [x for value in part for x in numbers(value)]
    return [float(part)] if isinstance(part, int | float) else []


def test_the_answers_are_finite_and_there_for_every_seed_level_and_checkpoint(result: dict) -> None:
    assert np.isfinite(numbers(result)).all()
    about, training = result["about"], result["training"]
    assert (about["seeds"], about["step"], about["rows"]) == ([0, 1], 60, 128)
    assert len(about["noise_levels"]) == 5
    assert np.array(training["loss"]).shape == (len(training["checkpoints"]), 5, 2)
    assert training["checkpoints"][-1] == 60
    assert len(training["checkpoints"]) > 1
    assert set(result["sampling"]["w2"]) == {"ddim", "dpmpp2m", "dpm2", "ddpm"}
    assert set(result["fine_tuning"]["q"]) == {"data", "policy", "acting", "random"}
    assert result["fine_tuning"]["q_aggregate"] == "min"


def test_critics_are_asked_as_the_agent_asks_them(run: Path, result: dict, tmp_path: Path, capsys) -> None:
    """Of the same critics and the data's actions: least <= mean less half a deviation < mean; the table says which."""
    q = [result["fine_tuning"]["q"]["data"]]
    for how, said in (("lcb", "lower bound of the critics"), ("mean", "mean of the critics")):
        path = tmp_path / how
        copytree(run, path)
        config = yaml.safe_load((path / "config.yaml").read_text())
        config["agent"] |= {"q_agg": how, "q_spread": 0.5}
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        folder.accept(path)
        found = diagnose(path, **QUICK)
        assert found["fine_tuning"]["q_aggregate"] == how
        q.append(found["fine_tuning"]["q"]["data"])
        report.print_diagnosis(found)
        assert said in " ".join(capsys.readouterr().out.split())
    least, bound, mean = np.array(q)
    assert (least < bound).all()
    assert (bound < mean).all()
    np.testing.assert_allclose(bound, (least + mean) / 2, rtol=1e-4)


def test_losses_are_those_of_the_clamped_network(result: dict, run: Path) -> None:
    """Of the last checkpoint, the second seed, level by level, in the letters of a VP process.

    Sampling noise: 128 of the run's 2,000 rows against all of them; the standard errors are the answer's own.
    """
    opened = Run.read(run)
    actor = load_agent(opened, 1).actor  # type: ignore[attr-defined]
    data = load_dataset(opened.config.dataset, rows=2000, progress=False)
    columns = opened.preprocessing.transitions(data, "no", "cpu").columns
    a_0, s = columns.actions[None], columns.observations[None]
    eps = torch.randn(a_0.shape, generator=torch.Generator().manual_seed(0))
    for k, losses, errors in zip(
        result["about"]["noise_levels"],
        result["training"]["loss"][-1],
        result["training"]["loss_error"][-1],
        strict=True,
    ):
        alpha, sigma = 1 / np.sqrt(1 + k**2), k / np.sqrt(1 + k**2)
        a_t = alpha * a_0 + sigma * eps
        D = (a_t - sigma * actor(a_t, torch.tensor(np.log(1 + k**2), dtype=torch.float32), s)) / alpha
        expected = ((a_t - alpha * D.clamp(-1, 1)) / sigma - eps).square().mean().item()
        assert abs(losses[1] - expected) < 4 * errors[1]


def test_the_gap_is_of_rows_not_seen(result: dict) -> None:
    assert result["about"]["held_out"].endswith("rows beyond 2,000")
    assert result["about"]["held_out_rows"] == 128
    gap, training = result["training"]["generalisation_gap"], result["training"]
    difference = np.mean(training["held_out_loss"], 1) - np.mean(training["loss"][-1], 1)
    np.testing.assert_allclose(gap["mean"], difference, atol=1e-5)


def test_deterministic_solvers_near_the_reference_and_ddpm_stays_at_the_floor(result: dict) -> None:
    sampling = result["sampling"]
    for solver in ("ddim", "dpmpp2m", "dpm2"):
        w2 = np.mean(sampling["w2"][solver]["w2"], 1)
        assert w2[-1] < w2[0]
    assert sampling["w2"]["dpm2"]["calls"] == [1, 3, 7]
    assert np.mean(sampling["w2"]["ddpm"]["w2"][-1]) > 0.5 * np.mean(sampling["sampling_floor"])
    for solver, entry in sampling["w2"].items():
        for delta, found in sampling["complexity"][solver].items():
            within = [n for n, w2 in zip(entry["steps"], entry["w2"], strict=True) if np.mean(w2) <= float(delta)]
            assert (found and found["steps"]) == (within[0] if within else None)


def test_distances_are_from_the_start(run: Path, result: dict) -> None:
    """The change is the difference of two likelihoods; of a run from itself every distance is 0."""
    change = result["fine_tuning"]["log_likelihood_of_data"]
    assert result["about"]["start"].endswith("of this run")
    assert change["now"] == result["sampling"]["log_likelihood"]["nats"]
    assert abs(np.mean(change["now"]) - np.mean(change["start"]) - change["change"]) < 1e-4
    assert min(result["fine_tuning"]["kl_to_start_at_most"]) > 0
    itself = diagnose(run, reference=run, checkpoints="last", **QUICK)["fine_tuning"]
    assert max(itself["kl_to_start_at_most"]) < 1e-6
    assert abs(itself["log_likelihood_of_data"]["change"]) < 1e-4


def test_it_repeats_itself(run: Path, result: dict) -> None:
    assert diagnose(run, **QUICK) == result


@pytest.mark.usefixtures("own_data")
def test_the_command_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Path) -> None:
    """Behaviour cloning of one seed, on all the rows of a file: nothing held out, no critics, and no start."""
    fields = {"agent": CLONING, "seeds": (3,), "rows": None, "steps": 20, "out": tmp_path / "bc"}
    config = dataclasses.replace(Run.read(run).config, **fields)
    path = diffrl.train(config, quiet=True)
    words = ["diagnose", str(path), "--rows", "64", "--steps-list", "1", "2", "--solvers", "ddim"]
    assert main([*words, "--checkpoints", "last"]) == 0
    said = capsys.readouterr().out
    for part in ("TRAINING", "SAMPLING", "FINE-TUNING", "--held-out", "--reference"):
        assert part in said
    written = json.loads((path / "diagnosis.json").read_text())
    assert np.isfinite(numbers(written)).all()
    assert "q" not in written["fine_tuning"]
    assert (path / "diagnosis.png").read_bytes().startswith(b"\x89PNG")
    words = [
        "diagnose",
        str(run),
        *words[2:],
        "--reference",
        str(path),
        "--held-out",
        str(Run.read(run).config.dataset),
    ]
    assert main([*words, "--out", str(tmp_path / "elsewhere")]) == 0
    written = json.loads((tmp_path / "elsewhere" / "diagnosis.json").read_text())
    assert written["about"]["start"] == f"{path} (diffusion_bc)"
    assert len(written["fine_tuning"]["kl_to_start_at_most"]) == 2
    assert "rows that the run was trained on" in written["about"]["held_out"]


@pytest.mark.usefixtures("own_data")
def test_a_place_that_takes_no_file_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    (tmp_path / "file").touch()
    for out, said in (
        (f"file://{tmp_path}/new", f"give {tmp_path}/new"),
        (f"{tmp_path}/file/new", "cannot be written: Not a directory. --out FOLDER keeps it elsewhere."),
    ):
        assert main(["diagnose", str(run), "--out", out, "--rows", "64"]) == 2
        heard = capsys.readouterr()
        assert said in " ".join(heard.err.split())
        assert not heard.out


@pytest.mark.usefixtures("own_data")
def test_rows_that_a_run_was_trained_on_are_not_held_out(tmp_path: Path, run: Path) -> None:
    """Not the data of training under another name or in another order, nor part of them; of more rows only the new."""
    data = Path(Run.read(run).config.dataset)
    with h5py.File(data) as whole:
        columns = {name: whole[name][:] for name in whole if isinstance(whole[name], h5py.Dataset)}
        steps = len(columns["actions"])
    for name, rows in (("same", slice(0, 2000)), ("part", slice(100, 1000)), ("tail", slice(1990, 2200))):
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            for column, values in columns.items():
                file[column] = values[rows] if len(values) == steps else values
    for name in ("same", "part"):
        with pytest.raises(UserError, match=r"its .* rows are rows that .* was trained on"):
            diagnose(run, held_out=str(tmp_path / f"{name}.hdf5"), **QUICK)
    for name, most in (("maze.hdf5", 1000), ("tail.hdf5", 200)):
        held_out = str(data if name == "maze.hdf5" else tmp_path / name)
        about = diagnose(run, held_out=held_out, **{**QUICK, "rows": 5000})["about"]
        assert most - 15 <= about["held_out_rows"] <= most
        assert about["held_out"].startswith(f"{held_out}, without ")
    other = tmp_path / "other.hdf5"
    generate("maze2d-umaze-v1", other, rows=200, seed=7, progress=False)
    assert diagnose(run, held_out=str(other), **QUICK)["about"]["held_out"] == str(other)


def test_below_the_floor_no_number_of_steps_is_enough(result: dict, capsys: pytest.CaptureFixture[str]) -> None:
    """A single step of ddpm adds no noise and lies at the reference: it says nothing of ddpm."""
    sampling = result["sampling"]
    low = {delta: {"steps": 1, "calls": 1} for delta in sampling["complexity"]["ddpm"]}
    floor = 0.05
    changed = {
        **result,
        "sampling": {
            **sampling,
            "sampling_floor": [floor],
            "complexity": {"ddpm": low, "ddim": low},
            "w2": {name: sampling["w2"][name] for name in ("ddpm", "ddim")},
        },
    }
    table, _ = report._complexity(changed)
    cells = {next(iter(row)): row[-3:] for row in zip(*(column.cells for column in table.columns), strict=True)}
    assert [float(delta) < floor for delta in low] == [False, True, True]
    assert cells["ddpm"] == ("1 (1)", "-", "-")
    assert cells["ddim"] == ("1 (1)",) * 3


def test_where_rows_to_hold_out_come_from_is_said(result: dict) -> None:
    """Of a run on a part whose data have no more here: not to train on a part, but to have the whole set."""
    training = {name: part for name, part in result["training"].items() if name != "generalisation_gap"}

    def said(**about: object) -> str:
        return report._training({"about": {**result["about"], **about}, "training": training})[1]

    assert "or train on a part by --rows N" in said(trained_rows=None)
    part = said(trained_rows=20_000, dataset="maze2d-umaze-v1")
    assert "none here beyond the 20,000 of --rows" in part
    assert "`diffrl data generate maze2d-umaze-v1`" in part
    assert "train on a part" not in part
    assert "generate" not in said(trained_rows=20_000, dataset="mine.hdf5")


@pytest.mark.parametrize("scale", [1.0, -123456.0])
def test_the_page_says_what_it_is_of_and_no_legend_lies_on_a_plot_or_is_cut(
    scale: float, result: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Agent, kind of run, the data's name without its path, and what it is compared with; legends stand below plots."""
    drawn = []
    monkeypatch.setattr(report, "save", lambda figure, path: drawn.append(figure) or path)
    about = {**result["about"], "called": "diffusion_ql dppo", "start": "/home/me/runs/ql (diffusion_ql)"}
    q = {name: (scale * np.array(values)).tolist() for name, values in result["picture"]["q"].items()}
    report.plot_diagnosis({**result, "about": about, "picture": {**result["picture"], "q": q}}, tmp_path / "page.png")
    (figure,) = drawn
    assert figure.get_suptitle() == "diffusion_ql dppo on maze.hdf5, step 60, compared with ql (diffusion_ql)"
    FigureCanvasAgg(figure).draw()
    assert len(figure.axes) == 6
    for ax in figure.axes:
        legend = ax.get_legend().get_window_extent()
        assert legend.y1 <= ax.xaxis.label.get_window_extent().y0
        assert legend.y0 >= 0
        assert legend.x0 >= 0
        assert legend.x1 <= figure.bbox.x1, ax.get_title()


@pytest.mark.parametrize("name", ["offline", "online"])
def test_what_is_shown_is_called_as_in_a_selection(name: str, run: Path) -> None:
    """With the kind of its run."""
    opened = dataclasses.replace(Run.read(run), kind=name)
    assert opened.agent_name == {"offline": "diffusion_ql", "online": "diffusion_ql online"}[name]


def test_pictures_means_are_those_of_the_tables(result: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over both seeds, which axes say; where points are of one seed, their label does."""
    drawn = []
    monkeypatch.setattr(report, "save", lambda figure, path: drawn.append(figure) or path)
    report.plot_diagnosis(result, tmp_path / "page.png")
    by_title = {ax.get_title(): ax for ax in drawn[0].axes}
    q, tuning = by_title["The critics' view"], result["fine_tuning"]["q"]
    said = [text.get_text() for text in q.get_legend().get_texts()]
    for name, label in (("policy", "policy"), ("acting", "acting"), ("random", "chance")):
        assert f"{label}: mean {np.mean(tuning[name]) - np.mean(tuning['data']):+.2g}" in said
    likelihood = by_title["Likelihood of the data"]
    mean = np.mean(result["sampling"]["log_likelihood"]["nats"])
    assert f"mean {mean:.2f}" in [text.get_text() for text in likelihood.get_legend().get_texts()]
    rows = result["about"]["rows"]
    for ax in (q, likelihood):
        assert ax.get_ylabel() == "rows, of 2 seeds together"
        assert sum(bar.get_height() for bar in ax.containers[0]) == 2 * min(rows, 512)
    (actions,) = (ax for title, ax in by_title.items() if title.startswith("Actions at"))
    seed = result["about"]["seeds"][0]
    assert [text.get_text() for text in actions.get_legend().get_texts()] == ["data", f"policy of seed {seed}"]


@pytest.mark.parametrize(
    ("kl", "shown"), [([9.8e-17, 9.3e-17], "0 but for rounding"), ([0.0, 1e-3], "0.0005 ± 0.0005")]
)
def test_a_distance_of_rounding_is_none(
    kl: list[float], shown: str, result: dict, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = {**result, "fine_tuning": {**result["fine_tuning"], "kl_to_start_at_most": kl}}
    report.print_diagnosis(changed)
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "KL(policy" in line)
    assert line.strip("│ ").endswith(shown)


def test_agents_without_a_generative_model_are_turned_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    config = dataclasses.replace(Run.read(run).config, agent=BC(width=8, layers=1), steps=5, out=tmp_path / "bc")
    path = diffrl.train(config, quiet=True)
    assert main(["diagnose", str(path)]) == 2
    assert "no generative model of actions" in capsys.readouterr().err
    with pytest.raises(UserError, match="no generative model"):
        diagnose(run, reference=path, **QUICK)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rows", "5"], "expected at least 64"),
        (["--solvers", "dpm4"], "did you mean 'dpm3'"),
        (["--steps-list", "0", "2"], "--steps-list[0] is 0; expected at least 1"),
        (["--deltas", "-1"], "--deltas[0] is -1.0; expected more than 0"),
        (["--seed", "-1"], "--seed is -1; expected at least 0"),
        (["--checkpoints", "best"], "last"),
        (["--reference", "runs/none"], "not a run's folder"),
        (["--held-out", "maze2d-umase-v1"], "did you mean 'maze2d-umaze-v1'"),
    ],
)
@pytest.mark.usefixtures("own_data")
def test_mistakes_are_named(run: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["diagnose", str(run), *words])
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    said = capsys.readouterr()
    assert code == 2
    assert expected in " ".join((said.err + said.out).replace("│", " ").split())


def test_changed_data_are_noticed(run: Path, tmp_path: Path) -> None:
    copy = Path(copytree(run, tmp_path / "copy"))
    about = json.loads((copy / "run.json").read_text())
    (copy / "SHA256SUMS").unlink()
    (copy / "run.json").write_text(json.dumps({**about, "fingerprint": "0"}))
    with pytest.raises(UserError, match="contents have changed"):
        diagnose(copy, **QUICK)


def test_a_tuned_policy_is_measured_from_the_one_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DPPO trains the last two of three denoising steps: at the largest noise the network is still the old one."""
    copytree(FOLDER, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    tuned = diagnose("dppo", reference=Path("offline"), rows=64, steps=(1, 2), solvers=("ddim",), quiet=True)
    before = diagnose("offline", checkpoints="last", rows=64, steps=(1, 2), solvers=("ddim",), quiet=True)
    losses, old_losses = (np.array(result["training"]["loss"][-1]) for result in (tuned, before))
    assert losses.shape == (3, 2)
    assert np.array_equal(losses[-1], old_losses[-1])
    assert (losses[:2] != old_losses[:2]).all()
    assert min(tuned["fine_tuning"]["kl_to_start_at_most"]) > 0
