"""The stages of a GPU run in the order of their value, and what is made for them beforehand. A new one is an entry."""

import sys

from kinds import TOY_ROWS, LongRun, Place, Script, Stage, Tests, Words

AGENTS = ("agents/*.py", "diffrl/nets/*.py", "diffrl/diffusion/*.py")
TRAINING = (
    *AGENTS,
    "diffrl/training/*.py",
    "diffrl/runs/*.py",
    "diffrl/support/machine.py",
    "diffrl/data/transitions.py",
    "diffrl/data/segments.py",
)
TIMED = ("train_step*", "worker", "workload", "plain", "ours", "jax_version", "floor")
TIMING = (*TRAINING, *(f"benchmarks/{name}.py" for name in TIMED))
FINETUNING = ("diffrl/images/**/*.py", "diffrl/alignment/*.py", "diffrl/diffusion/*.py")
SIZED = ("finetune_sizes", "finetune_speed", "random_models")
SYNTHER = (*TRAINING, "diffrl/augment/**/*.py", "benchmarks/synther.py")

OTHERS = "td3_bc iql fql consistency_ac"
QUICK = "--quick --tasks hopper --out {folder}/train_step.json --agents"
PAPERS = (
    "--parts data agents --width 1024 --learning-rate 3e-4 --model-steps 100000 --samples 5000000 "
    "--agent-steps 50000 --eval-every 12500 --seeds 0 1 2 --device cuda "
    "--recording {work}/recordings/hopper_medium-replay-v4.hdf5 --out {folder} --datasets"
)
TOY_SYNTHER = (
    "--parts data agents --width 16 --model-steps 20 --samples 400 --agent-steps 20 --eval-every 20 --episodes 1 "
    "--seeds 0 --agents td3_bc --recording {work}/recordings/toy.hdf5 --out {folder} --datasets"
)
SIZE = "--sd --device cuda --batch 8 --micro-batch 8 --updates 1 --steps 20 --rounds 1 --out {folder}/speed"
TOY_SIZE = "--sd --tiny --device cpu --batch 2 --micro-batch 2 --updates 1 --steps 4 --rounds 1 --out {folder}/speed"
SIZES = "--resume --device cuda --out {folder}/sizes --size"
TOY_SIZES = "--resume --device cpu --tiny --batch 2 --steps 4 --noise-levels 1 --out {folder}/sizes --size"
DIGITS = (
    "--algos ddpo-is grpo draft --rewards digit:8 --seeds 0 1 2 --scale 10 --batch 256 --device cuda --jobs 3 "
    "--runs {folder}/runs --out {folder}/finetune"
)
TOY_DIGITS = (
    "--algos ddpo-is draft --rewards digit:8 --seeds 0 --queries 64 --evaluations 1 --jobs 1 "
    "--runs {folder}/runs --out {folder}/finetune"
)
TOY_PLANS = ("--agent.horizon", "16", "--agent.denoising-steps", "4")


def maze(
    config: str,
    published: str = "",
    toy_steps: int = 40,
    toy_box: float = 180.0,
    steps: int = 1_000_000,
    toy: tuple[str, ...] = (),
) -> Stage:
    """A long run on a maze2d data set, which is generated beforehand."""
    agent, dataset = config.split("/")
    sources = (*TRAINING, "envs/maze2d.py", f"configs/{config}.yaml")
    kind = LongRun(config, toy, steps=steps, toy_steps=toy_steps, published=published)
    name = f"{agent}-{dataset.removeprefix('maze2d-').removesuffix('-v1')}"
    return Stage(name, f"{agent}, {dataset}, {steps:,} steps", 540, kind, sources, (dataset,), toy_box)


def goals(config: str, dataset: str, published: str = "") -> Stage:
    """A long run on the default task of a data set of OGBench's, which is rebuilt beforehand. Scores: success in %."""
    agent, name = config.split("/")
    sources = (*TRAINING, "diffrl/data/chunks.py", "envs/ogbench/*.py", f"configs/{config}.yaml")
    title = f"{agent}, {name}, 1,000,000 steps"
    short = name.replace("-play-singletask", "").replace("-v0", "")
    return Stage(f"{agent}-{short}", title, 540, LongRun(config, published=published), sources, (dataset,))


STAGES = (
    Stage(
        "tests",
        "The CUDA tests: captured = eager, stacked = single, exact resume",
        90,
        Tests('tests/training/test_capture.py -k "captured or gpu or compiled or frozen"', workers=6),
        (*TRAINING, "tests/training/*.py"),
    ),
    Stage(
        "train-step",
        "A training step of Diffusion-QL, hopper's sizes, 1, 8 and 32 seeds",
        150,
        Script(
            "train_step.py",
            "--device cuda --quick --agents diffusion_ql --tasks hopper --seeds 1 8 32 --out {folder}/train_step.json",
            f"{QUICK} bc",
            "train_step.json",
        ),
        TIMING,
    ),
    # In a rehearsal this one is never whole: it is cut, saved and packed as the long ones are.
    maze("diffusion_ql/maze2d-umaze-v1", toy_steps=1_000_000, toy_box=30),
    maze("diffusion_ql/maze2d-medium-v1"),
    maze("diffusion_ql/maze2d-large-v1"),
    maze("td3_bc/maze2d-umaze-v1", "29.4 ± 12.3"),
    maze("iql/maze2d-umaze-v1", "42.1 ± 0.6"),
    *(
        maze(f"diffuser/maze2d-{name}-v1", score, steps=2_000_000, toy=TOY_PLANS)
        for name, score in (("umaze", "113.9"), ("medium", "121.5"), ("large", "123.0"))
    ),
    *(
        goals(f"{agent}/{data}-play-singletask{kind}-v0{qc}", f"{data}-play-v0", published)
        for data, kind, agent, qc, published in (
            ("cube-double", "", "fql", "", "29 to 36 over five tasks"),
            ("cube-double", "", "bfn", "", "66 over five tasks"),
            ("cube-double", "", "bfn", "-qc", "68 over five tasks"),
            ("cube-single", "", "fql", "", "97 over five tasks"),
            ("cube-single", "", "bfn", "-qc", ""),
            ("puzzle-3x3", "-sparse", "bfn", "", "97 over five tasks"),
            ("puzzle-3x3", "-sparse", "bfn", "-qc", "100 over five tasks"),
        )
    ),
    *(
        Stage(
            f"synther-{data}",
            f"SynthER at the paper's width, 5,000,000 rows, {data}; then the agents",
            540,
            Script("synther.py", f"{PAPERS} {data}", f"{TOY_SYNTHER} {data}", "synther.json", "synther.md"),
            SYNTHER,
            ("recording",),
        )
        for data in ("hopper", "hopper-small")
    ),
    Stage(
        "stable-diffusion",
        "DDPO-IS with LoRA on a U-Net of Stable Diffusion 1.5's size, with and without each saving",
        400,
        Script("finetune_speed.py", SIZE, TOY_SIZE, "speed.json", "speed.md"),
        (*FINETUNING, "benchmarks/finetune_speed.py", "benchmarks/random_models.py"),
    ),
    *(
        Stage(
            f"finetune-{size}",
            f"NFT and DDPO-IS with LoRA at {name}'s size: images/s, peak memory and what fits, by saving",
            box,
            Script("finetune_sizes.py", f"{SIZES} {size}", f"{TOY_SIZES} {size}", "sizes.json", "sizes.md"),
            (*FINETUNING, *(f"benchmarks/{script}.py" for script in SIZED)),
        )
        for size, name, box in (("sdxl", "SDXL", 540), ("sd3", "SD 3 medium", 540), ("sd", "Stable Diffusion 1.5", 300))
    ),
    Stage(
        "digits",
        "DDPO, GRPO and DRaFT on tiny-digits, ten times the images of the CPU's table, 256 a round",
        400,
        Script("finetune.py", DIGITS, TOY_DIGITS, "finetune.json", "finetune.md"),
        (*FINETUNING, "benchmarks/finetune.py"),
        ("tiny-digits",),
    ),
    Stage(
        "train-step-all",
        "A training step of four other agents, hopper's sizes, 1, 8 and 32 seeds",
        540,
        Script(
            "train_step.py",
            f"--device cuda --quick --agents {OTHERS} --tasks hopper --seeds 1 8 32 --out {{folder}}/train_step.json",
            f"{QUICK} bc",
            "train_step.json",
        ),
        TIMING,
    ),
)


def greedy(name: str) -> bool:
    """Whether making this takes most of the machine's cores: MuJoCo's manipulation, at 240 rows a second and core."""
    return name.endswith("-play-v0")


def preparation(name: str, place: Place) -> Words | None:
    """The command that makes what a stage needs; it runs from the beginning, on a core that the GPU does not need.

    None where there is nothing to make.
    """
    if name.startswith("maze2d-"):
        rows = ["--rows", str(TOY_ROWS)] if place.rehearse else []
        return [sys.executable, "-m", "diffrl.cli", "data", "generate", name, *rows]
    if greedy(name):
        episodes = ["--episodes", str(TOY_ROWS // 1_000)] if place.rehearse else []
        jobs = "1" if place.rehearse else "12"
        return [sys.executable, "-m", "diffrl.cli", "data", "generate", name, *episodes, "--jobs", jobs]
    if name == "tiny-digits":
        return [sys.executable, "benchmarks/gpu/made.py", "digits", str(10 if place.rehearse else 1_000)]
    if name == "recording" and place.rehearse:
        return [sys.executable, "benchmarks/gpu/made.py", "recording", str(place.work / "recordings" / "toy.hdf5")]
    return None
