"""Every command and every Python block of the documentation is run, small, page by page in a folder of its own.

What stands for something of the reader's (`runs/NAME`, `rollouts.hdf5`, `FOLDER`, `ID`) is made before. What cannot run
here is in `NOT_RUN` and `PYTHON_NOT_RUN`, with its reason; the tests of the fast tier parse it all the same.
"""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch

from diffrl.cli import main
from diffrl.data import d4rl
from diffrl.data.offline import OfflineDataset
from diffrl.data.preferences import LabelledPairs, Preferences, segment_starts
from diffrl.images.models import latents
from envs import datasets
from tests.documents import ROOT, Command, blocks, commands, name, taught
from tests.images.conftest import cache  # noqa: F401  the built-in models, hardly trained

NOT_RUN = {
    r"augment label ": "waits for a person at a page; tests/augment/test_label.py labels on it",
    r"augment synther mujoco/hopper/medium-v0 ": "Minari downloads the data set",
    r"data download ": "downloads",
    r"data generate cube-single-play-v0 ": "an hour of MuJoCo; tests/envs/test_ogbench.py makes a few episodes",
    r"sweep ": "trains a whole grid; tests/runs/test_sweep*.py run small ones",
    r"report .?sweeps/e/": "reports on that sweep; tests/runs/test_study_report.py reports on small runs",
    r"report .*--by environment": "needs runs on several data sets; tests/runs/test_study_scores.py reports on such",
    r"select ": "needs several runs of some length; tests/runs/test_selection.py selects among small ones",
    r"(distil runs/FINETUNED|(resume|finetune --model) runs/DISTILLED)": "tests/images/test_distil_images.py does it",
    r"(train|online) .*(hopper|walker2d)-medium-v2": "D4RL's file is downloaded",
    r"finetune .*--reward aesthetic:FOLDER": "needs CLIP's weights; tests/images/rewards run the reward on tiny ones",
    r"finetune .*--model stabilityai/": "the hub's; tests/images/models run tiny Stable Diffusion 3 pipelines",
    r"finetune .*--model black-forest-labs/": "the hub's; tests/images/models run tiny FLUX.2 pipelines",
    r"finetune .*--model Wan-AI/": "the hub's; tests/images/models run tiny Wan pipelines",
    r"finetune .*--reward '?vlm:": "needs a server; tests/images/rewards/test_judge.py starts some",
    r"finetune --reward remote:": "needs a server; tests/images/rewards/test_serve.py starts one",
}
"""Commands that are parsed only: a pattern of their text, and why."""

PYTHON_NOT_RUN = {
    ("docs/from_trl.md", "DDPOConfig"): "trl's own code, which trl has removed",
    ("docs/from_flow_grpo.md", "config.pretrained"): "flow_grpo's own code",
    ("docs/from_d3rlpy.md", "d3rlpy.algos"): "d3rlpy's own code",
    ("docs/from_d3rlpy.md", "buffer.h5"): "needs a file of d3rlpy's; tests/data/test_layouts.py makes one, and runs it",
    ("docs/from_d3rlpy.md", "synthetic.hdf5"): "needs synthetic rows: tests/data/test_layouts.py, which runs it",
    ("docs/supervised.md", "from_pretrained"): "diffusers' own loading; tests/images compare what is loaded",
}
"""Python that only compiles: a page, a word of the block, and why."""

SMALL = {
    "train": "--steps 4 --eval-every 4 --eval-episodes 1 --seeds 0 --rows 2000 --workers 1 --eval-workers 0 "
    "--no-compile --agent.width 16 --agent.batch-size 8",
    "online": "--steps 6 --eval-every 6 --eval-episodes 1 --warm-up 2 --synthetic-steps 2 --synthetic-width 8",
    "resume": "--steps 6",
    "evaluate": "--episodes 1",
    "diagnose": "--rows 64 --checkpoints last --solvers ddim --steps-list 1 2 --deltas 0.1",
    "augment synther": "--width 16 --blocks 1 --steps 4 --batch-size 8 --sampling-steps 2 --no-report",
    "augment flow-to-better": "--steps 2 --width 4 --multipliers 1 --blocks 5 --samples 64 --horizon 8 --no-report "
    "--reward.steps 2 --reward.width 4",
    "data generate": "--rows 3000 --force",
    "finetune policy dppo": "--steps 20 --eval-every 20 --eval-episodes 1 --environments 2 --rollout-steps 5 "
    "--critic-width 8 --batch-size 10 --epochs 1",
    "distil": "--steps 2 --eval-every 2 --eval-episodes 1 --batch-size 4",
    "finetune policy nft": "--steps 20 --eval-every 20 --eval-episodes 1 --environments 2 --rollout-steps 5 "
    "--critic-width 8 --batch-size 10 --epochs 1",
    "finetune policy dpo": "--steps 2 --eval-every 2 --eval-episodes 1 --pairs 4 --segment 4 --batch-size 2",
    "finetune supervised": "--rounds 2 --updates 2 --batch 4 --eval-samples 4 --steps 2",
    "finetune dpo": "--rounds 2 --updates 2 --batch 4 --eval-samples 4 --steps 2",
    "render": "--episodes 1",
    "finetune": "--queries 16 --batch 8 --steps 2 --eval-samples 8 --warm-up 0",
}
"""What is added to a command, by its verb and, where they differ in options, its algorithm."""

WITH_PYTHON = [
    page
    for page in taught()
    if any(block.language == "python" for block in blocks(page)) and page.parent.name != "tutorials"
]
"""The tutorials' pages are run as the notebooks that they are."""

TUTORIALS = {
    "policy": {"STEPS": 20, "ROWS": 2500, "EPISODES": 4},
    "augment": {"STEPS": 20, "HASTY": 4, "ROWS": 2500, "SAMPLES": 400, "WIDTH": 16},
    "images": {"IMAGES": 64, "SAMPLES": 20},
}
"""The tutorials, and the numbers of their first cell here."""

PYTHON_SMALL = {
    "steps=2_000": "steps=4, eval_every=4, eval_episodes=1",
    "steps=10_000": "steps=4",
    "piece = 2_000": "piece = 4",
    "width=256": "width=8",
    'samples": 100_000': 'samples": 20',
    'refit_every": 10_000': 'refit_every": 110',
    "learn(50_000)": "learn(120)",
    "gradient_steps=20": "gradient_steps=1",
}
"""Sizes in Python blocks, and what they are here."""


def reason(command: Command) -> str | None:
    """Why a command is not run, or None."""
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, command.text)), None)


def small(words: tuple[str, ...]) -> list[str]:
    """A command's words with the small sizes added, and on a machine without a GPU for its CPU."""
    given = list(words)
    for flag in ("--device", "--precision"):
        if flag in given and not torch.cuda.is_available():
            del given[given.index(flag) : given.index(flag) + 2]
    algo = given[given.index("--algo") + 1] if "--algo" in given else ""
    verb = " ".join(given[: 1 + (given[0] in ("augment", "data") or given[1:2] == ["policy"])])
    key = f"{verb} {algo or 'dppo'}" if verb == "finetune policy" else f"{verb} {algo}".strip()
    more = SMALL.get(key, SMALL.get(verb, "")).split()
    if verb == "augment synther" and "--ratio" not in given:
        more += ["--samples", "50"]
    if verb == "augment flow-to-better" and given[given.index("--preferences") + 1].isdigit():
        more += ["--segment", "4"]
    if "critics" in given:  # where nothing acts
        more = ["--steps", "2", "--eval-every", "2", "--eval-episodes", "1", "--group", "2", "--states", "4"]
    if key == "finetune policy dpo" and "--preferences" in given:  # none are made
        more = ["--steps", "2", "--eval-every", "2", "--eval-episodes", "1", "--batch-size", "2"]
    if verb == "online" and "--synthetic-share" in given:
        more += ["--first-fit", "2", "--synthetic-samples", "20", "--synthetic-sampling-steps", "2"]
    if verb == "distil" and given[1].startswith("tiny-"):
        more = ["--steps", "2", "--pairs", "4", "--levels", "4", "--batch-size", "2", "--eval-samples", "4"]
    if verb == "resume" and (Path(given[1]) / "finetune.yaml").exists():
        more = ["--steps", "24"]  # images scored
    return [*given, *more]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:  # noqa: F811
    """What pages share: a maze's data, the built-in models, a run of each kind."""
    folder: Path = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFRL_DATA", str(folder / "data"))
        patch.setenv("DIFFRL_CACHE", str(cache))
        made = cache / "models" / f"tiny-latents-{latents.VAE_STEPS}-{latents.STEPS}"
        if not made.exists():  # where other tests came between, this fixture is made anew
            latents.train_latents(made, vae_steps=2, steps=2)
        patch.chdir(folder)
        whole = str(datasets.cached_path("maze2d-umaze-v1"))  # as if these few rows were the data set
        assert main(["data", "generate", "maze2d-umaze-v1", "--rows", "3000", "--output", whole]) == 0
        train = ("train", "diffusion_ql/maze2d-umaze-v1-small", "--agent.ema-start", "1", "--out", "offline")
        assert main(small(train)) == 0
        assert main([*small(("finetune",)), "--out", "images"]) == 0
    return folder


@pytest.fixture
def work(home: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """An empty folder, the current one, with the shared things in reach."""
    shutil.copytree(home / "data", tmp_path / ".data")
    monkeypatch.setenv("DIFFRL_DATA", str(tmp_path / ".data"))
    monkeypatch.setenv("DIFFRL_CACHE", str(cache))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / ".minari"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def recorded(env_id: str, episodes: int = 30) -> OfflineDataset:
    """Episodes of random actions, of 40 steps at most."""
    env = gymnasium.make(env_id)
    env.action_space.seed(0)
    rows: list[tuple[np.ndarray, np.ndarray, float, bool, bool]] = []
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        for step in range(40):
            action = env.action_space.sample()
            following, reward, terminated, truncated, _ = env.step(action)
            ended = bool(truncated or step == 39) and not terminated
            rows.append((observation, action, float(reward), bool(terminated), ended))
            observation = following
            if terminated or ended:
                break
    columns = [np.array(column, np.float32) for column in zip(*rows, strict=True)]
    return OfflineDataset(*columns[:3], columns[3].astype(bool), columns[4].astype(bool), metadata={"env_id": env_id})


def labelled(dataset: OfflineDataset, path: Path, segment: int = 4, pairs: int = 12) -> None:
    """A person's labels of a data set, by its rewards."""
    starts = np.random.default_rng(0).permutation(segment_starts(dataset, segment))[: 2 * pairs]
    labels = LabelledPairs.empty(dataset, segment)
    for a, b in starts.reshape(-1, 2).tolist():
        earned = [float(dataset.rewards[i : i + segment].sum()) for i in (a, b)]
        labels = labels.added(a, b, float(earned[1] > earned[0]))
    labels.write(path)


def images(folder: Path) -> None:
    """A folder of images with prompts, pairs, frames, controls and references."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for n in range(8):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{n}.png")


def describe(folder: Path, command: str) -> None:
    """Write `metadata.jsonl` as the model of the command wants it."""
    images(folder)
    lines: list[dict[str, object]] = []
    for n in range(4):
        line: dict[str, object] = {"file_name": f"{n}.png", "text": str(n)}
        if "--algo dpo" in command:
            line = {"file_name_w": f"{n}.png", "file_name_l": f"{n + 4}.png", "text": str(n)}
        elif "control:" in command:
            line["control"] = f"{n + 4}.png"
        elif "reference:" in command:
            line["reference"] = f"{n + 4}.png"
        elif "video:" in command:
            line = {"frames": [f"{m}.png" for m in range(4)]}
        lines.append(line)
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))


def place(command: Command, page: Path, home: Path, work: Path) -> list[str]:
    """Make what the command names and is not there; give its words, with folders in place of hub ids."""
    text = command.text
    if "mypackage:" in text:
        own = next(b.text for b in blocks(ROOT / "docs" / "data.md") if b.text.startswith("# mypackage.py"))
        Path("mypackage.py").write_text(own)
    if "rollouts.hdf5" in command.words:
        env = next((b for a, b in zip(command.words, command.words[1:], strict=False) if a == "--env"), "Hopper-v4")
        d4rl.write("rollouts.hdf5", recorded("Hopper-v4" if env == "none" else env), force=True)
    if "labels.json" in command.words:
        source = command.words[2]
        labelled(d4rl.read(source) if source.endswith(".hdf5") else datasets.load_dataset(source), work / "labels.json")
    if "theirs.csv" in command.words:
        rows = [f"maze,{agent},{seed},{step},{seed + step}" for agent in "ab" for seed in (0, 1) for step in (1, 2)]
        Path("theirs.csv").write_text("\n".join(["task,agent,seed,step,score", *rows]))
    if "pairs.safetensors" in command.words:
        some = np.random.default_rng(0).uniform(-0.5, 0.5, (6, 4, 4)).astype(np.float32)
        Preferences(some, some[..., :2], -some, -some[..., :2]).write("pairs.safetensors")
    for before, word in zip(command.words, command.words[1:], strict=False):
        if before != "--out" and re.fullmatch(r"runs/[\w-]+", word) and not Path(word).exists():
            shutil.copytree(home / ("images" if page.name in ("finetune.md",) else "offline"), word)
    if "FOLDER" in text:
        describe(work / "FOLDER", text)
    for prompts in {"prompts.txt", "animals.txt"} & set(command.words):
        Path(prompts).write_text("a cat\na dog\n")
    if "my_rewards.py" in text:
        Path("my_rewards.py").write_text(next(b.text for b in blocks(page) if b.text.startswith("# my_rewards.py")))
    return [model(word) for word in command.words]


def model(word: str) -> str:
    """The word, with a tiny pipeline's folder where it names a model of the hub."""
    from tests.images import tiny

    kind, colon, id = word.rpartition(":")
    if id not in ("ID", "stable-diffusion-v1-5/stable-diffusion-v1-5") or kind not in ("", *MODELS):
        return word
    folder = Path("svd" if kind == "video" else "sd")
    if not folder.exists():
        getattr(tiny, f"save_{folder}")(folder)
    return f"{kind}{colon}{folder}"


MODELS = ("control", "reference", "video")


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in taught() if commands(p)], ids=name)
def test_every_command_runs(page: Path, home: Path, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for command in commands(page):
        if reason(command) is not None:
            continue
        words = small(tuple(place(command, page, home, work)))
        code = main(words)
        said = capfd.readouterr()
        assert code == 0, f"{command.where}: diffrl {' '.join(words)}\n{said.out[-2000:]}\n{said.err[-2000:]}"


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_every_python_block_runs(page: Path, home: Path, work: Path) -> None:
    """Those of a page one after the other, in one namespace."""
    known: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        skipped = any(name(page) == where and word in block.text for where, word in PYTHON_NOT_RUN)
        if block.language != "python" or skipped:
            continue
        text = block.text
        if '"runs/NAME"' in text and not Path("runs/NAME").exists():
            shutil.copytree(home / "offline", "runs/NAME")
        for size, tiny in PYTHON_SMALL.items():
            text = text.replace(size, tiny)
        exec(compile(text, block.where, "exec"), known)


@pytest.mark.slow
@pytest.mark.parametrize("tutorial", TUTORIALS)
def test_a_tutorial_runs_and_draws(tutorial: str, work: Path) -> None:
    """As a notebook, from its script, at sizes that learn next to nothing."""
    for library in ("jupytext", "nbclient", "ipykernel"):
        pytest.importorskip(library, reason="needs the extra: pip install 'diffrl[docs]'")
    render = runpy.run_path(str(ROOT / "examples" / "tutorials" / "render.py"), run_name="render")
    assert set(render["NAMES"]) == set(TUTORIALS)
    made = render["notebook"](tutorial, TUTORIALS[tutorial])
    assert all(f"{value}" in made.cells[1].source for value in TUTORIALS[tutorial].values())  # the sizes were taken
    text, pictures = render["page"](render["execute"](made, work), tutorial)
    assert pictures
    assert all(content[:8] == b"\x89PNG\r\n\x1a\n" for content in pictures.values())
    assert "```text" in text


def test_what_is_not_run_is_there() -> None:
    """Each line of the tables excuses something: no excuse outlives what it was for."""
    all_commands = [c for p in taught() for c in commands(p)]
    for pattern in NOT_RUN:
        assert any(re.match(pattern, c.text) for c in all_commands), pattern
    for where, word in PYTHON_NOT_RUN:
        assert any(word in b.text for b in blocks(ROOT / where) if b.language == "python"), (where, word)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra: pip install 'diffrl[docs]'")
    pytest.importorskip("mkdocstrings", reason="needs the extra: pip install 'diffrl[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    built = list((tmp_path / "site").rglob("*.html"))
    assert len(built) > len(list((ROOT / "docs").rglob("*.md")))
    asks = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?://([^/\"]+)")
    assert not {host for page in built for host in asks.findall(page.read_text())}, "a page asks another host"
