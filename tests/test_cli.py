"""The command line: help that is quick and teaches, and every mistake a few lines and exit code 2."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from diffrl.cli import main
from diffrl.runs import config as configuration
from diffrl.support.errors import UserError
from envs import registry

VERBS = [
    [],
    ["train"],
    ["sweep"],
    ["online"],
    ["evaluate"],
    ["diagnose"],
    ["finetune"],
    ["finetune", "policy"],
    ["distil"],
    ["compare"],
    ["export"],
    ["render"],
    ["data"],
    ["doctor"],
    ["completion"],
    *(["data", v] for v in ("list", "info", "generate", "download", "convert")),
]


def run(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "diffrl.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.parametrize("words", ["", "--version", "train x", "data list"])
def test_a_python_without_it_is_told_how_it_is_set_up(words: str, tmp_path: Path) -> None:
    """A checkout that was never installed, by a Python that has no packages (-S)."""
    for name in ("diffrl", "agents", "envs", "configs"):
        (tmp_path / name).symlink_to(Path(__file__).parents[1] / name)
    command = [sys.executable, "-S", "-m", "diffrl", *words.split()]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=clean)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert f"is not installed for {sys.executable}: diffrl is not set up for this Python." in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_teaches_and_needs_no_torch(verb: list[str]) -> None:
    """Without torch, the largest import by far, help answers in well under two seconds."""
    code = (
        "import sys, diffrl.cli as cli\n"
        "try: cli.main(sys.argv[1:])\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, *verb, "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5


@pytest.mark.parametrize(
    ("words", "operand"),
    [
        ("distil tiny-emoji --help", "MODEL"),
        ("distil --help tiny-emoji", "MODEL"),
        ("distil runs/A -h", "RUN"),
        ("evaluate runs/A --episodes 3 --help", "RUN"),
        ("finetune policy runs/A --help", "RUN"),
        ("data info maze2d-umaze-v1 --help", "DATASET"),
        ("compare A B --help", "RUN [RUN ...]"),
    ],
)
def test_help_shows_what_was_given_before_it_too(words: str, operand: str, capsys: pytest.CaptureFixture[str]) -> None:
    """tyro's usage line leaves out operands that it has read."""
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert not ended.value.code
    assert capsys.readouterr().out.splitlines()[0].endswith(operand)


@pytest.mark.parametrize("verb", ["evaluate", "data", "data info", "finetune policy", "completion"])
def test_help_of_a_verb_is_the_verbs_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for words in ([*verb.split(), "--help"], ["help", *verb.split()]):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert not ended.value.code
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert f"usage: diffrl {verb}" in said[0]


@pytest.mark.parametrize(
    "words", ["--help", "--version", "train --help", "data --help", "data list maze2d", "train list"]
)
def test_a_reader_that_has_gone_ends_the_command_without_a_word(words: str) -> None:
    """As after `| head -1`, but surely: the pipe has no reader from the beginning."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "diffrl.cli", *words.split()]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_answers_in_under_two_seconds(verb: list[str]) -> None:
    run(*verb, "--help")
    began = time.perf_counter()
    run(*verb, "--help")
    assert time.perf_counter() - began < 2


def test_importing_the_core_loads_no_agent_and_no_simulator() -> None:
    code = (
        "import sys, diffrl.diffusion\n"
        "bad = {'agents', 'envs', 'gymnasium', 'mujoco', 'diffusers', 'h5py'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_configuration_by_its_public_name_loads_no_torch() -> None:
    code = "import sys, diffrl\ndiffrl.TrainConfig\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


MISTAKES = {
    "verb": (["trian", "bc/x"], "did you mean `diffrl train bc/x`"),
    "data verb": (["data", "lst", "maze2d"], "did you mean `diffrl data list maze2d`"),
    "augment verb": (["augment", "flow-to-beter"], "did you mean `diffrl augment flow-to-better`"),
    "verb far from all": (["augment", "zzz"], "`diffrl augment synther`, `diffrl augment flow-to-better`, `diffrl"),
    "verb without its parent": (["flow_to_better", "x"], "did you mean `diffrl augment flow-to-better x`"),
    "another one's verb": (["info", "a b"], "did you mean `diffrl data info 'a b'`"),
    "search": (["search", "bc/x"], "did you mean `diffrl sweep --search optuna bc/x`"),
    "version": (["version"], "did you mean `diffrl --version`"),
    "help of no verb": (["help", "trian"], "did you mean `diffrl train --help`"),
    "policy without finetune": (["policy", "runs/x"], "did you mean `diffrl finetune policy runs/x`"),
    "finetune verb": (["finetune", "polcy", "runs/x"], "did you mean `diffrl finetune policy runs/x`"),
    "no verb like it": (["xyzzy"], "There is no `diffrl xyzzy`: `diffrl --help` lists"),
    "help of nothing like a verb": (["help", "nonsense"], "There is no `diffrl nonsense`: `diffrl --help` lists"),
    "verb abbreviated": (["eval", "runs/x"], "did you mean `diffrl evaluate runs/x`"),
    "option in place of a verb": (["augment", "--flow"], "`diffrl augment flow-to-better`"),
    "shell": (["completion", "tcsh"], "bash"),
    "nothing to train": (["train"], "--agent and --dataset"),
    "no data set": (["train", "--agent", "bc"], "Which data set"),
    "agent": (
        ["train", "--agent", "difusion_ql", "--dataset", "maze2d-umaze-v1"],
        "did you mean 'diffusion_ql'? `diffrl train --help` lists all.",
    ),
    "agent abbreviated": (["train", "--agent", "diffql", "--dataset", "x"], "did you mean 'diffusion_ql'?"),
    "agent like no other": (["train", "--agent", "zzz", "--dataset", "x"], "known: bc, bfn, consistency_ac, diffuser,"),
    "agent without a value": (["train", "--agent", "--steps", "3"], "--agent needs a value"),
    "data set": (["train", "--agent", "bc", "--dataset", "maze2d-umase-v1"], "did you mean 'maze2d-umaze-v1'"),
    "missing file": (["train", "--agent", "bc", "--dataset", "nowhere.hdf5"], "nowhere.hdf5"),
    "configuration": (["train", "diffusion_ql/hoper-medium-v2"], "did you mean 'diffusion_ql/hopper-medium-v2'"),
    "contradiction": (["train", "diffusion_ql/hopper-medium-v2", "--agent", "bc"], "contradicts"),
    "flag": (["train", "--agent", "bc", "--dataset", "x", "--stepz", "3"], "--steps"),
    "agent's flag": (["train", "--agent", "bc", "--dataset", "x", "--agent.widht", "3"], "--agent.width"),
    "another agent's flag": (
        ["train", "bc/maze2d-umaze-v1-small", "--agent.q-weight", "2"],
        "consistency_ac, diffusion_ql, edp have; `diffrl train --agent bc --help` shows bc's.",
    ),
    "type": (["train", "--agent", "bc", "--dataset", "x", "--steps", "many"], "--steps is 'many'; expected a whole"),
    "number": (["train", "--agent", "bc", "--dataset", "x", "--agent.discount", "a"], "discount is 'a'; expected a"),
    "numbers": (
        ["train", "--agent", "bc", "--dataset", "x", "--seeds", "1", "a"],
        "--seeds is 1 a; expected whole numbers.",
    ),
    "nothing": (["train", "--agent", "bc", "--dataset", "x", "--steps"], "--steps needs a value."),
    "no operand": (["evaluate"], "`diffrl evaluate` needs RUN: The run's folder"),
    "no operands": (["data", "convert"], "`diffrl data convert` needs SOURCE and TARGET. `diffrl data convert --help`"),
    "one operand of two": (["data", "convert", "a"], "`diffrl data convert` needs TARGET: A path ending in .hdf5"),
    "no option": (["augment", "synther", "x"], "`diffrl augment synther` needs --out STR: A path ending in .hdf5"),
    "no operand, no option": (["augment", "synther"], "`diffrl augment synther` needs DATASET and --out STR."),
    "choices": (["data", "convert", "a", "b", "--format", "hdf"], "--format is 'hdf'; expected hdf5 or arrow. `diffrl"),
    "--agent mistyped": (["train", "--agnt", "bc"], "no option --agnt: did you mean --agent?"),
    "--agent mistyped behind": (["train", "bc/maze2d-umaze-v1-small", "--agnt", "bc"], "did you mean --agent?"),
    "a configuration mistyped behind options": (
        ["train", "--seeds", "0", "1", "bc/maze2d-umaze-v1-smal"],
        "No configuration 'bc/maze2d-umaze-v1-smal'",
    ),
    "a path that is an option's": (["train", "--out", "bc/maze2d-umaze-v1"], "What shall be trained?"),
    "a path that is an agent's": (["train", "--agent.nets", "a/b.pt"], "What shall be trained?"),
    "a path in a setting": (["train", "--env-kwargs", "map=a/b.yaml"], "What shall be trained?"),
    "--dataset mistyped": (["train", "--agent", "bc", "--datset", "x"], "no option --datset: did you mean --dataset?"),
    "--dataset alone": (["train", "--dataset", "x"], "What shall be trained? Give a configuration"),
    "flag, and no agent": (["train", "--dataset=x", "--stepz", "3"], "no option --stepz: did you mean --steps?"),
    "flag, and no data set": (["train", "--agent", "bc", "--stepz", "3"], "no option --stepz: did you mean --steps?"),
    "flags alone": (["train", "--no-compile", "--agent.width=3"], "What shall be trained? Give a configuration"),
    "an agent's word": (["finetune", "--agent.lr", "3"], "no option --agent.lr: did you mean --lr?"),
    "letters swapped": (["finetune", "policy", "x", "--alog", "nft"], "no option --alog: did you mean --algo"),
    "a hue": (["finetune", "--reward", "blue"], "no reward 'blue'; did you mean 'colour:blue'?"),
    "value": (["train", "--agent", "bc", "--dataset", "x", "--steps", "0"], "expected at least 1"),
    "agent's value": (
        ["train", "--agent", "bc", "--dataset", "x", "--agent.discount", "1.5"],
        "expected at least 0 and less than 1",
    ),
    "choice": (["train", "--agent", "bc", "--dataset", "x", "--agent.reward-tune", "normalise"], "normalize"),
    "seeds": (["train", "--agent", "bc", "--dataset", "x", "--seeds", "1", "1"], "different"),
    "run": (["evaluate", "runs/none"], "not a run's folder"),
    "online": (["online", "runs/none"], "not a run's folder"),
    "online resume": (["online", "--resume", "runs/none"], "not a run's folder"),
    "online flag": (["online", "runs/none", "--keep-ofline", "0"], "--keep-offline"),
    "diagnosed run": (["diagnose", "runs/none"], "not a run's folder"),
    "resume": (["train", "--resume", "runs/none"], "not a run's folder"),
    "info": (["data", "info", "hopper-medum-v2"], "did you mean 'hopper-medium-v2'"),
    "generate": (["data", "generate", "hopper-medium-v2"], "cannot be generated"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.usefixtures("own_data")
def test_a_mistake_is_a_few_lines_and_exit_code_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = MISTAKES[name]
    try:
        code = main(words)
    except SystemExit as leaving:  # the option parser's own
        code = int(leaving.code or 0)
    said = capsys.readouterr()
    text = " ".join((said.err + said.out).replace("│", " ").split())
    assert code == 2
    assert expected in text
    assert "Traceback" not in text
    assert len(said.err.splitlines()) == 1, "one line"


def test_an_option_below_a_nested_verb_is_told_as_it_is_called(capsys: pytest.CaptureFixture[str]) -> None:
    """tyro forgets the words between the program and the verb that an option belongs to."""
    words = ["augment", "flow-to-better", "x", "--out", "y.hdf5", "--preferences", "5", "--flow-step", "3"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "--flow-steps" in said
    assert "diffrl augment flow-to-better --help" in " ".join(said.split())
    assert "diffrl flow-to-better" not in said


@pytest.mark.long
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train nonsense", "No configuration 'nonsense'"),
        ("train my.yaml", "There is no file my.yaml. `diffrl train list`"),
        ("train --agent bcc --dataset maze2d-umaze-v1", "Unknown agent 'bcc'"),
        ("train --agent bc --dataset nowhere.hdf5", "nowhere.hdf5 does not exist"),
        ("train --agent bc --dataset maze2d-umase-v1", "Unknown data set 'maze2d-umase-v1'"),
        (
            "data info mine",
            "Expected an id of D4RL's, OGBench's or another package's (`diffrl data list`), a Minari id such as "
            "mujoco/hopper/medium-v0 or minari:ID, or the path or address (https://, hf://) of a file ending in .hdf5",
        ),
        ("train --agent bc --dataset hopper-medium-v2", "`diffrl data download hopper-medium-v2`"),
        ("sweep --agent bcc --dataset maze2d-umaze-v1 --out s", "Unknown agent 'bcc'"),
        ("online nowhere", "nowhere is not a run's folder"),
        ("evaluate nowhere", "nowhere is not a run's folder"),
        ("render nowhere --out video.gif", "nowhere is not a run's folder"),
        ("export nowhere --to folder", "nowhere is not a run's folder"),
        ("diagnose nowhere", "nowhere is not a run's folder"),
        ("resume nowhere", "nowhere is not a run's folder"),
        ("distil nowhere --to consistency", "nowhere is not a run's folder"),
        ("finetune policy nowhere", "nowhere is not a run's folder"),
        ("compare nowhere elsewhere", "nowhere is not a run's folder"),
        ("report nowhere", "nowhere does not exist"),
        ("select nowhere", "nowhere does not exist"),
        ("augment synther nowhere.hdf5 --out new.hdf5", "nowhere.hdf5 does not exist"),
        ("augment flow-to-better nowhere.hdf5 --preferences 500 --out new.hdf5", "nowhere.hdf5 does not exist"),
        ("augment label nowhere.hdf5", "nowhere.hdf5 does not exist"),
        ("augment fidelity nowhere.hdf5 x.hdf5", "nowhere.hdf5 does not exist"),
        ("data info nowhere.hdf5", "nowhere.hdf5 does not exist"),
        ("finetune --reward nonsense", "there is no reward 'nonsense'"),
        ("finetune --held-out jepg", "there is no reward 'jepg'; did you mean 'jpeg'?"),
        ("finetune --model tiny-emojy", "did you mean 'tiny-emoji'?"),
        ("finetune --prompts nowhere.txt", "--prompts: there is nothing at nowhere.txt"),
        ("finetune --algo dpo --pairs nowhere", "--pairs: there is nothing at nowhere"),
        ("finetune --algo dpo --pairs data", "data has no metadata.jsonl"),
        ("finetune --algo supervised --data data", "data has no metadata.jsonl"),
        ("finetune --model /nosuch --prompts p.txt", "/nosuch is no folder"),
        ("finetune --model data --prompts p.txt", "data holds no diffusers pipeline: it has no model_index.json"),
        ("finetune --model lora --prompts p.txt", "lora holds adapters and no model"),
        ("finetune --model sd/name --queries 8", "Which prompts? sd/name needs --prompts FILE"),
        ("finetune --prompts empty.txt", "empty.txt is empty"),
        ("finetune --prompts p.txt --reward emoji", "--prompts p.txt has a prompt that --reward emoji cannot take"),
        ("finetune --prompts p.txt --reward jpeg --held-out digit", "that --held-out digit cannot take"),
        ("finetune --reward vlm:http://localhost/v1", "expected vlm:URL#MODEL[#FILE]"),
        ("finetune --reward 0*jpeg", "every weight is 0"),
        ("finetune --algo ddpo", "did you mean ddpo-is or ddpo-sf?"),
        ("finetune --algo DDPO", "did you mean ddpo-is or ddpo-sf?"),
        ("finetune --algo ppo", "did you mean ddpo-is?"),
        ("finetune --algo GRPO", "did you mean grpo?"),
        ("finetune --algo dpo --pairs data --reward jpeg", "--reward is for pairs that are sampled"),
    ],
)
def test_what_is_not_there_is_refused_before_torch_is_imported(words: str, said: str, tmp_path: Path) -> None:
    """Its import takes seconds, that of diffusers more; and nothing is left behind."""
    code = (
        "import sys, diffrl.cli as cli\n"
        "code = cli.main(sys.argv[1:])\n"
        "slow = {'torch', 'diffusers', 'transformers', 'matplotlib', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'{code}, {slow}' if code != 2 or slow else 0)"
    )
    environment = os.environ | {"DIFFRL_DATA": str(tmp_path / "data"), "D4RL_DATASET_DIR": str(tmp_path / "none")}
    command = [sys.executable, "-c", code, *words.split()]
    here = tmp_path / "here"
    for folder in ("data", "lora"):
        (here / folder).mkdir(parents=True)
    for name, text in (("p.txt", "a dog\n"), ("empty.txt", "\n"), ("lora/adapter_model.safetensors", "")):
        (here / name).write_text(text)
    before = sorted(here.rglob("*"))
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment)
    assert done.returncode == 0, done.stderr
    assert said in " ".join(done.stderr.split())
    assert "Using the" not in done.stdout + done.stderr, "of a run that is refused"
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize("verb", ["evaluate", "resume", "diagnose"])
def test_a_file_is_no_runs_folder(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.hdf5"
    path.touch()
    assert main([verb, str(path)]) == 2
    assert "rows.hdf5 is a file, not a run's folder." in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("own_data")
@pytest.mark.parametrize(
    ("device", "said"),
    [("cuda:99", "Try the CPU (--device cpu)"), ("gpu", "expected cpu, cuda, cuda:N or auto (--device)")],
)
def test_a_device_that_is_not_there(device: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--agent", "bc", "--dataset", "maze2d-umaze-v1", "--device", device]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dataset: x\nagent: {name: bc}\nstep: 3", "did you mean 'steps'"),
        ("dataset: x\nagent: {name: bc, widht: 3}", "did you mean 'agent.width'"),
        ("dataset: x\nagent: {name: bcc}", "did you mean 'bc'"),
        ("dataset: x\nagent: {name: bc}\nsteps: '5'", "expected a whole number"),
        ("dataset: x\nagent: {name: bc}\nsteps: true", "expected a whole number"),
        ("dataset: x\nagent: {name: bc, learning_rate: 3e-4}", "3.0e-4"),
        ("agent: {name: bc}", "`dataset` is missing"),
        ("dataset: x", "needs a `name`"),
        ("dataset: [x", "not valid YAML"),
        ("3", "not a configuration"),
    ],
)
def test_yaml_is_read_strictly(text: str, expected: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        configuration.load(file)
    assert expected in str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize("name", configuration.shipped())
def test_shipped_configurations_load_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    config = configuration.find(name)
    agent, dataset = name.split("/")
    assert config.agent.name == agent
    stem = config.dataset.replace("-small-singletask-v0", "-singletask-small")  # of OGBench's
    assert dataset.startswith(stem)
    assert registry.known(config.dataset)
    file = tmp_path / "c.yaml"
    file.write_text(configuration.dump(config))
    assert configuration.load(file) == config


OF_CUBES = "Using the shipped configuration fql/cube-single-play-singletask-v0"


@pytest.mark.parametrize(
    ("dataset", "alpha", "said"),
    [
        ("cube-single-play-singletask-v0", 300, f"{OF_CUBES}."),
        *(
            (f"cube-single-play-singletask-task{task}-v0", 300, f"{OF_CUBES}, whose settings are those of all five")
            for task in range(1, 6)
        ),
        ("cube-single-noisy-singletask-task2-v0", 10, "Using the defaults of fql: nothing is published for this data."),
        ("cube-single-play-singletask-task2-pre-v0", 10, "Using the defaults of fql: nothing is published"),
        (
            "cube-single-play-small-singletask-task3-v0",
            10,
            "`diffrl train fql/cube-single-play-singletask-task3-small`.",
        ),
    ],
)
def test_all_tasks_of_a_data_set_have_its_published_settings(dataset: str, alpha: float, said: str) -> None:
    """OGBench's are tuned on the default task; that of each is found by `--agent` and `--dataset`, and by its name."""
    config, sentence = configuration.default("fql", dataset)
    assert (config.dataset, config.agent.alpha) == (dataset, alpha)  # type: ignore[attr-defined]
    assert said in sentence
    if alpha == 300:
        assert configuration.find(f"fql/{dataset}") == config
        assert configuration.meant("fql", {"dataset": dataset}) == (config, sentence)


def test_a_task_s_number_names_a_configuration_of_its_own_data() -> None:
    found = {
        "fql/cube-single-play-singletask-task4-v0-qc": ("cube-single-play-singletask-task4-v0", "chunk", 5),
        "bfn/scene-play-singletask-task1-sparse-v0": ("scene-play-singletask-task1-sparse-v0", "chunk", 1),
        "bfn/cube-single-play-singletask-task5-small": ("cube-single-play-small-singletask-task5-v0", "width", 128),
    }
    for name, (dataset, field, value) in found.items():
        config = configuration.find(name)
        assert (config.dataset, getattr(config.agent, field)) == (dataset, value)
        assert registry.known(dataset)
        assert configuration.ships(name)
    with pytest.raises(UserError, match="No configuration 'fql/cube-single-play-singletask-task6-v0'"):
        configuration.find("fql/cube-single-play-singletask-task6-v0")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("qc/cube-single-play-singletask-small", "bfn/cube-single-play-singletask-small-qc"),
        ("qc/scene-play-singletask-sparse-v0", "bfn/scene-play-singletask-sparse-v0-qc"),
        ("qc-fql/cube-double-play-singletask-v0", "fql/cube-double-play-singletask-v0-qc"),
        ("fql/cube-singel-play-singletask-small", "fql/cube-single-play-singletask-small"),
    ],
)
def test_a_method_of_a_paper_is_suggested_by_the_agent_that_it_is_here(typed: str, meant: str) -> None:
    with pytest.raises(UserError, match=f"did you mean '{meant}'\\?"):
        configuration.find(typed)


@pytest.mark.usefixtures("own_data")
@pytest.mark.parametrize("place", ["head", "end"])
def test_overrides_apply_to_a_shipped_configuration(place: str, tmp_path: Path) -> None:
    options = "--steps 5 --rows 500 --eval-episodes 1 --agent.width 8 --agent.layers 1 --seeds 4 5"
    words = f"bc/maze2d-umaze-v1 {options}" if place == "head" else f"{options} bc/maze2d-umaze-v1"
    assert main(["train", *words.split(), "--out", str(tmp_path / "run")]) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["steps"], config["seeds"], config["agent"]["width"]) == (5, [4, 5], 8)
    assert main(["evaluate", str(tmp_path / "run"), "--episodes", "1"]) == 0
    assert (tmp_path / "run" / "evaluation.json").is_file()


@pytest.mark.slow
@pytest.mark.usefixtures("own_data")
@pytest.mark.parametrize(("start", "warned"), [(4, False), (5, True)])
def test_an_evaluation_of_an_untrained_average_is_announced(
    start: int, warned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "diffusion_ql/maze2d-umaze-v1-small --steps 5 --rows 500 --eval-episodes 1 --seeds 0 --no-compile"
    words += " --max-episode-steps 4"
    start_words = ["--agent.width", "8", "--agent.ema-start", str(start), "--out", str(tmp_path / "run")]
    assert main(["train", *words.split(), *start_words]) == 0
    said = "Up to step 5 the policy that acts is untrained"
    assert (said in capsys.readouterr().err) == warned
    assert main(["evaluate", str(tmp_path / "run"), "--episodes", "1"]) == 0
    printed = capsys.readouterr()
    assert (f"last: {said}" in printed.err + printed.out) == warned
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "policy")]) == 0
    card = (tmp_path / "policy" / "README.md").read_text()
    assert (f"- **{said}" in card) == warned
    run, copy = str(tmp_path / "run"), str(tmp_path / "copy")
    shutil.copytree(run, copy)
    for shown in (
        ["diagnose", run, "--rows", "64", "--steps-list", "1", "2", "--solvers", "ddim"],
        ["report", run, "--out", str(tmp_path / "report")],
        ["render", run, "--out", str(tmp_path / "video.gif")],
        ["compare", run, copy, "--episodes", "1", "--out", str(tmp_path / "page.html")],
    ):
        assert main(shown) == 0
        assert (said in " ".join(capsys.readouterr().err.split())) == warned, shown


def test_a_name_that_the_system_finds_too_long_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "info", f"{'x' * 50_000}.hdf5"]) == 2
    assert len(capsys.readouterr().err) < 1_500
    assert main(["train", "bc/maze2d-umaze-v1", "--dataset", "x" * 50_000]) == 2
    said = capsys.readouterr().err
    assert said.endswith(": File name too long.\n")
    assert len(said) < 1_500
