"""What commands say: refusals that need no torch, options named by nearness, amounts, files that are kept."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import agents
import diffrl
from diffrl.augment.config import Request
from diffrl.cli import main
from diffrl.commands.words import in_a_line, near_options, parse
from diffrl.images.rewards.registry import REWARDS
from diffrl.runs.config import TrainConfig, meant
from diffrl.support.errors import UserError, counted, singular
from diffrl.support.folder import all_done, ends_sooner, too_far
from diffrl.support.statistics import SINGLE, estimate, plus_minus
from envs import registry
from tests.runs.made_runs import PENDULUM, made_run, small

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


EACH = """
import contextlib, io, json, sys
import diffrl.cli as cli
said = []
for words in json.load(sys.stdin):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = cli.main(words.split())
    said.append([code, " ".join(err.getvalue().split()), "torch" in sys.modules])
print(json.dumps(said))
"""
"""Runs commands in turn in a process: of each its exit code, what it said, and whether torch is there by then."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a policy's run, and what there is of a run of an image model before anything is looked at."""
    path = tmp_path_factory.mktemp("words")
    made_run(path / "bc", small("bc"), PENDULUM)
    made_run(path / "iql", small("iql"), PENDULUM)
    for name, kind in (("img", "images"), ("student", "images-distil")):
        (path / name / "checkpoints" / "000000001").mkdir(parents=True)
        (path / name / "run.json").write_text(json.dumps({"kind": kind}))
    (path / "there.hdf5").write_text("mine")
    return path


REFUSED = [
    ("evaluate img", "img is a fine-tuning run of an image model"),
    ("diagnose student", "student is a distilled image model"),
    ("online img", "img is a fine-tuning run of an image model"),
    ("evaluate bc --which bset", "has no checkpoint 'bset': expected last, best, or one of"),
    ("render bc --out x.gif --which bset", "has no checkpoint 'bset'"),
    ("export bc --to policy --which bset", "has no checkpoint 'bset'"),
    ("compare bc --which bset", "has no checkpoint 'bset'"),
    ("export bc --to img", "img is there already, and is not overwritten"),
    ("finetune policy bc", "The agent bc has no diffusion chain"),
    ("distil bc", "The agent bc does not act by a diffusion or flow policy alone"),
    ("train --agent bc --dataset maze2d-umaze-v1 --out bc", "bc holds a run already"),
    ("online iql --out bc", "bc holds a run already"),
    ("online bc", "bc is of the agent bc, which clones actions and never looks at a reward"),
    ("distil tiny-emoji --out img", "img holds a run already"),
    ("finetune --algo draft --reward jpeg", "draft needs a reward with a gradient, and jpeg has none"),
    ("finetune --algo refl --data digits --reward emoji+", "--reward 'emoji+'"),
    ("finetune --reward colour:mauve", "--reward 'colour:mauve': expected a colour or a hue in degrees"),
    ("finetune --reward jpeg --guidance -3", "--guidance is -3; expected at least 0, and 1 for none"),
    ("finetune --algo draft --reward colour:red --draft-steps 9 --steps 3", "more than the 3 --steps of the chain"),
    ("finetune --reward jpeg+0.5*png", "did you leave out the blanks about the +: 'jpeg + 0.5*png'"),
    ("finetune --reward jpeg+png", "did you leave out the blanks about the +: 'jpeg + png'"),
    ("finetune --reward jpeg:300", "--reward 'jpeg:300': the argument is JPEG's quality"),
    ("finetune --reward jpeg --held-out digit:12", "--held-out 'digit:12': the argument is one digit"),
    ("finetune --reward jpeg --held-out nothing", "--held-out 'nothing': there is no reward 'nothing'"),
    ("finetune --reward python:no.py#f", "--reward 'python:no.py#f': there is no Python file no.py"),
    ("finetune --reward geneval:run.py", "--reward 'geneval:run.py': which function of it? Expected FILE.py#NAME"),
    ("finetune --reward aesthetic:nowhere#head", "--reward 'aesthetic:nowhere#head': 'nowhere' is no folder"),
    ("finetune --reward hps:there.hdf5", "--reward 'hps:there.hdf5': 'there.hdf5' is no folder"),
    ("finetune --reward classifier:nowhere#cat", "'nowhere' is no folder; expected a model's folder, or a hub id"),
    ("finetune --reward richhf:img#much", "--reward 'richhf:img#much': what follows '#' is the weight of artifacts"),
    ("online iql --steps 5000", "--steps is 5000, and the first 5000 only collect (--warm-up)"),
    ("online rlpd/maze2d-umaze-v1-small --steps 10 --warm-up 10", "--steps is 10, and the first 10 only collect"),
    ("resume bc --steps 1", "steps already, more than the 1 step asked for: give a larger --steps"),
    ("train diffusion_ql/maze2d-umaze-v1-small --step 10", "no option --step: did you mean --steps?"),
    ("train bc", "bc is a run, and no configuration: `diffrl resume bc` goes on with it."),
    ("train td3_bc --dataset there.hdf5", "td3_bc is an agent, and no configuration: `diffrl train --agent td3_bc"),
    ("evaluate bc --plot there.hdf5", "there.hdf5 exists. Use --force to replace it."),
    ("evaluate bc --out there.hdf5", "there.hdf5 exists. Use --force to replace it."),
    ("evaluate bc --out bc/config.yaml --force", "bc/config.yaml is part of"),
    ("evaluate bc --plot bc/run.json --force", "which would lose it: write to another file."),
    ("evaluate bc --out bc/SHA256SUMS --force", "bc/SHA256SUMS is part of"),
    ("compare bc ./bc", "bc is named twice: a run is not compared with itself."),
]


def test_what_small_files_and_words_tell_is_refused_before_torch(folder: Path) -> None:
    words = json.dumps([words for words, _ in REFUSED])
    done = subprocess.run([sys.executable, "-c", EACH], input=words, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    for (words, expected), (code, said, torch) in zip(REFUSED, json.loads(done.stdout), strict=True):
        assert code == 2, words
        assert expected in said, words
        assert not torch, f"{words}: torch was imported"


def test_what_is_said_of_an_agents_name_in_python_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of a configuration, and in place of the agent's."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"bc is an agent, and no configuration: expected its data set") as error:
        diffrl.train("bc")
    call = str(error.value).partition("diffrl.train(")[2].removesuffix(").").replace("...", "'there.hdf5'")
    assert eval(f"diffrl.configuration({call})").agent == agents.BC()
    with pytest.raises(UserError, match=r"agent is 'bc'; expected its settings; diffrl\.configuration") as error:
        diffrl.TrainConfig(dataset="there.hdf5", agent="bc")
    call = str(error.value).partition("; ")[2].partition("; ")[2].partition(" has them")[0]
    assert eval(call.replace("...", "'there.hdf5'")).agent == agents.BC()
    with pytest.raises(UserError, match="Unknown agent 'bcc'"):
        diffrl.TrainConfig(dataset="there.hdf5", agent="bcc")
    with pytest.raises(UserError, match=r"no field 'q_wait' of the agent diffusion_ql; .*q_weight"):
        diffrl.configuration("diffusion_ql", dataset="maze2d-umaze-v1", agent={"q_wait": 1.0})


IN_PYTHON = {
    "--agent diffusion_ql --dataset maze2d-umaze-v1": ("diffusion_ql", {"dataset": "maze2d-umaze-v1"}),
    "--agent td3_bc --dataset there.hdf5 --agent.alpha 1.5": (
        "td3_bc",
        {"dataset": "there.hdf5", "agent": {"alpha": 1.5}},
    ),
    "diffusion_ql/maze2d-umaze-v1-small --steps 9 --agent.n-critics 3 --seeds 4 5": (
        "diffusion_ql/maze2d-umaze-v1-small",
        {"steps": 9, "agent": {"n_critics": 3}, "seeds": (4, 5)},
    ),
    "--agent iql --dataset maze2d-umaze-v1 --device cuda --no-compile": (
        "iql",
        {"dataset": "maze2d-umaze-v1", "device": "cuda", "compile": False},
    ),
}
"""Words behind `diffrl train`, and the arguments of `diffrl.configuration` and `diffrl.train` that mean the same."""


@pytest.mark.parametrize("words", IN_PYTHON)
def test_python_and_the_command_train_the_same_configuration(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For data of which a configuration ships, and of which none does."""
    trained: list[TrainConfig] = []
    monkeypatch.setattr("diffrl.runs.train.train", trained.append)
    monkeypatch.setattr("envs.datasets.require", lambda name: None)  # the maze's data are not made here
    assert main(["train", *words.split()]) == 0
    name, settings = IN_PYTHON[words]
    assert [diffrl.configuration(name, **settings)] == trained


def test_bare_defaults_where_a_configuration_ships_are_said() -> None:
    """In what they differ; of those that ship, of others that were chosen, and where nothing ships, nothing is said."""
    bare = TrainConfig(dataset="maze2d-umaze-v1", agent=agents.DiffusionQL())
    _, said = meant(bare, {})
    assert "are the defaults of diffusion_ql" in said
    own = diffrl.configuration("diffusion_ql", dataset="maze2d-umaze-v1")
    differ = {
        f.name for f in dataclasses.fields(own.agent) if getattr(own.agent, f.name) != getattr(bare.agent, f.name)
    }
    assert differ >= {"n_critics", "q_weight"}
    assert set(re.findall(r"\w+", said.partition("another ")[2].partition(":")[0])) == differ | {"and"}
    assert eval(said.rpartition("in Python ")[2].removesuffix(".")) == own
    assert "`diffrl train --agent diffusion_ql --dataset maze2d-umaze-v1`" in said
    for quiet in (own, dataclasses.replace(bare, dataset="own.hdf5"), dataclasses.replace(bare, agent=own.agent)):
        assert meant(quiet, {})[1] == ""
    # It is of the run as it is meant, with all that is replaced.
    assert meant(bare, {"agent": {"q_weight": 9.0}})[1] == meant(bare, {"agent": agents.BC(width=8)})[1] == ""
    assert meant(dataclasses.replace(bare, dataset="own.hdf5"), {"dataset": "maze2d-umaze-v1"})[1] == said


def test_pictures_and_tables_that_are_there_are_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unless --force: then the result takes their place."""
    out = folder / "result.json"
    out.write_text("mine")
    words = ["evaluate", str(folder / "bc"), "--episodes", "1", "--which", "last", "--out", str(out)]
    assert main(words) == 2
    assert out.read_text() == "mine"
    assert main([*words, "--force"]) == 0
    assert "last" in json.loads(out.read_text())
    picture = folder / "picture.png"
    picture.write_text("mine")
    assert main(["data", "info", "maze2d-umaze-v1", "--picture", str(picture)]) == 2
    assert f"{picture} exists. Use --force" in " ".join(capsys.readouterr().err.split())
    assert picture.read_text() == "mine"


def test_options_are_named_by_nearness() -> None:
    """And of equally near ones the verb's own first, whatever the alphabet says."""
    known = ["--agent.denoising-steps", "--agent.steps", "--max-episode-steps", "--steps", "--seeds"]
    assert near_options("--step", known)[:2] == ["--steps", "--agent.steps"]
    assert near_options("--agent.denoising_step", known)[0] == "--agent.denoising-steps"
    assert near_options("--zzzz", known) == []
    assert near_options("--agent.seed", known) == ["--seeds"], "where no option of the group is near"
    assert near_options("--alog", ["--log", "--algo"]) == ["--algo", "--log"], "two letters swapped"


@dataclass(frozen=True)
class Values:
    """One option of each kind."""

    whole: int = 0
    part: float = 0.0
    wholes: tuple[int, ...] = ()
    parts: tuple[float, ...] = ()
    one: Literal["first", "second"] = "first"


LONG = "/a-path/" + "of-many/words/" * 8 + "the end"
LONGER = LONG + "of many/words-and/" * 8
"""Python's int() shows 200 characters of it."""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--whole", LONG], f"--whole is {LONG!r}; expected a whole number."),
        ([f"--whole={LONG}"], f"--whole is {LONG!r}; expected a whole number."),
        (["--whole", LONGER], f"--whole is {LONGER!r}; expected a whole number."),
        (["--part", LONG], f"--part is {LONG!r}; expected a number."),
        (["--part", "it's 3"], """--part is "it's 3"; expected a number."""),
        (["--wholes", "1", LONG, "2"], f"--wholes is 1 '{LONG}' 2; expected whole numbers."),
        (["--parts", "a"], "--parts is a; expected numbers."),
        (["--one", LONG], f"--one is {LONG!r}; expected first or second."),
    ],
)
def test_a_value_is_said_as_it_was_typed(words: list[str], said: str) -> None:
    """However the box breaks it."""
    with pytest.raises(UserError) as caught:
        parse(Values, words, "diffrl try")
    assert str(caught.value) == f"{said} `diffrl try --help` explains all."


def test_a_value_that_was_not_typed_so_is_left_out() -> None:
    mistake = "│ Error parsing --whole: invalid literal for int() with base 10: '/a/lo │\n│ ng/path'  │"
    box = f"╭─ Value error ─╮\n{mistake}\n╰─╯"
    assert in_a_line(box, "diffrl try", ["--whole", "/a/long/path"]).startswith("--whole is '/a/long/path'; expected")
    assert in_a_line(box, "diffrl try", ["--whole", "other"]) == "--whole: expected a whole number."


def test_one_is_said_in_the_singular() -> None:
    assert [counted(n, "start states") for n in (1, 1000)] == ["1 start state", "1,000 start states"]
    assert singular("images scored") == "image scored"
    assert singular("processes that evaluate") == "process that evaluate"
    run = Path("runs/a")
    assert "a: its one round is done." in all_done(run, 1, "rounds")
    assert "all 2 rounds are done." in all_done(run, 2, "rounds")
    assert "made for 1 step," in ends_sooner(run, 1, 1)
    assert "has 1 step already" in too_far(run, 1, 0)


def test_a_single_value_says_that_it_has_no_error() -> None:
    assert estimate([[3.0]]).explained == f"3.0 ({SINGLE})" == f"3.0{plus_minus(None)}"
    assert str(estimate([[3.0]])) == "3.0"
    assert str(estimate([[3.0, 5.0]])) == "4.0 ± 1.0"
    assert str(estimate([[3.0], [5.0]])) == "4.0 ± 1.0"


def test_data_sets_are_counted_alike(capsys: pytest.CaptureFixture[str]) -> None:
    """By the list and by what is said of a name that nothing is near."""
    assert len(set(registry.named())) == len(registry.named()) > len(registry.ids())
    assert f"{len(registry.named())} are known" in registry.hint("zzzz")
    assert main(["data", "list"]) == 0
    assert f"{len(registry.named())} data sets known by name" in " ".join(capsys.readouterr().out.split())


def test_two_amounts_are_refused_where_they_are_said() -> None:
    with pytest.raises(UserError, match="give one of them"):
        Request("a", "b.hdf5", samples=1, ratio=1.0)


def test_rewards_known_to_have_no_gradient_have_none() -> None:
    """Those that can be made here, of which the others say nothing before they are."""
    from diffrl.images import rewards

    for name in ("jpeg", "jpeg-file", "incompressible", "png", "colour:blue", "symmetry"):
        reward = rewards.parse(name)
        assert REWARDS[name.partition(":")[0]].gradient == reward.differentiable


def test_benchmarks_options_are_read_as_the_commands_are(capsys: pytest.CaptureFixture[str]) -> None:
    """By `asked`, whose help says no (default: None)."""
    for path in [*BENCHMARKS.glob("*.py"), *BENCHMARKS.glob("gpu/*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        own = [call for call in calls if ast.unparse(call.func) == "tyro.cli"]
        assert not own or path.name == "asked.py", path
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]\n"
        "from journeys import Journeys\nfrom asked import asked\nasked(Journeys, args=['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(BENCHMARKS)], capture_output=True, text=True)
    assert "--json PATH" in done.stdout, done.stderr
    assert "None" not in done.stdout
