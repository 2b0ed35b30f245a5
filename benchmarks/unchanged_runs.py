"""The fixed small runs that `unchanged.py` compares, as command lines: the words after `diffrl`.

All paths are relative to one working folder, where `unchanged_inputs.py` has written what they read.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from unchanged_inputs import EXAMPLES, FLOW, LATENT, PAIRS, PENDULUM, PROMPTS, UNIT, UNTRAINED


@dataclass(frozen=True)
class FixedRun:
    """A run: commands in order. What they write stands in the folder of the run's name, and is compared."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    after: tuple[str, ...] = ()
    """Runs that it starts from."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _run(name: str, *commands: str, after: Sequence[str] = ()) -> FixedRun:
    return FixedRun(name, tuple(_words(command.replace("OUT", name)) for command in commands), tuple(after))


_TRAIN = f"--dataset {PENDULUM} --env Pendulum-v1 --seeds 0 1 --workers 1 --eval-workers 0 --eval-episodes 1"
_LENGTH = "--steps 200 --eval-every 100 --log-every 40"
_SIZE = "--agent.width 16 --agent.batch-size 32"
_LAYERS = f"{_SIZE} --agent.layers 1"
_Q = f"{_LAYERS} --agent.act-candidates 4 --agent.ema-start 20"
_PLANS = (
    "--agent.width 8 --agent.layers 2 --agent.multipliers 1 2 --agent.batch-size 16 --agent.horizon 16 "
    "--agent.denoising-steps 8 --agent.sampling-steps 4 --agent.replan-every 8 --agent.ema-start 20"
)


def _train(name: str, agent: str, options: str = _LAYERS, length: str = _LENGTH) -> FixedRun:
    return _run(name, f"train --agent {agent} {_TRAIN} {length} {options} --out OUT")


_OFFLINE = (
    _train("bc", "bc"),
    _train("diffusion_bc", "diffusion_bc"),
    _train("td3_bc", "td3_bc"),
    _train("iql", "iql", f"{_LAYERS} --agent.reward-tune iql_locomotion"),
    _train("diffusion_ql", "diffusion_ql", _Q),
    _train("edp", "edp", f"{_Q} --agent.sampling-steps 5"),
    _train("consistency_ac", "consistency_ac", _Q),
    _train("idql", "idql", f"{_LAYERS} --agent.blocks 1 --agent.act-candidates 4"),
    _train("q_guidance", "q_guidance", f"{_LAYERS} --agent.sampling-steps 4"),
    _train("fql", "fql", f"{_LAYERS} --agent.flow-steps 4"),
    _train("rebrac", "rebrac"),
    _train("bfn", "bfn", f"{_LAYERS} --agent.flow-steps 4 --agent.act-candidates 4 --agent.backup-candidates 2"),
    _train("ifql", "ifql", f"{_LAYERS} --agent.flow-steps 4 --agent.act-candidates 4"),
    _train("qam", "qam", f"{_LAYERS} --agent.flow-steps 4 --agent.n-critics 3"),
    _train("dtql", "dtql", f"{_LAYERS} --agent.diffusion-layers 1 --agent.actor-start 120"),
    _train("rlpd", "rlpd", f"{_LAYERS} --agent.n-critics 3"),
    _train("diffuser", "diffuser", f"{_PLANS} --agent.no-goal-reaching --agent.guidance return"),
)
"""Every agent, as it is by default but for its size."""

_SHORT = "--steps 60 --eval-every 60 --log-every 20"
_MAZE = "--dataset maze2d-umaze-v1 --rows 3000 --seeds 3 1 --workers 1 --eval-workers 0 --eval-episodes 1"
_VARIANTS = (
    _run(
        "diffusion_ql-maze2d",
        f"train --agent diffusion_ql {_MAZE} {_SHORT} {_Q} --agent.n-critics 3 --agent.q-agg lcb --agent.actor-q min "
        "--agent.max-q-backup --agent.backup-candidates 3 --agent.act-with average --agent.schedule cosine "
        "--agent.reward-tune cql_antmaze --agent.normalise-observations --agent.critic-layer-norm --no-compile "
        "--out OUT",
    ),
    _train("edp-x0", "edp", f"{_Q} --agent.form x0 --agent.solver dpm2 --agent.act-critics target", _SHORT),
    _train("consistency_ac-angular", "consistency_ac", f"{_Q} --agent.form angular --agent.q-norm", _SHORT),
    _train("consistency_ac-improved", "consistency_ac", f"{_Q} --agent.form improved", _SHORT),
    _train("fql-ours", "fql", f"{_LAYERS} --agent.networks ours --agent.normalise-q --agent.q-agg min", _SHORT),
    _train("fql-chunks", "fql", f"{_LAYERS} --agent.flow-steps 4 --agent.chunk 3", _SHORT),
    _train("bfn-n-step", "bfn", f"{_LAYERS} --agent.flow-steps 4 --agent.n-step 3 --agent.networks ours", _SHORT),
    _run("diffuser-maze2d", f"train --agent diffuser {_MAZE} {_SHORT} {_PLANS} --agent.show-ends --out OUT"),
    _train("iql-deterministic", "iql", f"{_LAYERS} --agent.deterministic --agent.reward-tune normalize", _SHORT),
    _run(
        "published",
        "train diffusion_ql/maze2d-umaze-v1-small --rows 3000 --steps 30 --eval-every 30 --log-every 10 "
        "--eval-episodes 1 --workers 1 --eval-workers 0 --no-compile --agent.width 16 --agent.batch-size 16 "
        "--agent.act-candidates 2 --out OUT",
    ),
    _run(
        "no-environment",
        f"train --agent diffusion_bc --dataset {UNIT} {_LAYERS} {_SHORT} --seeds 0 --workers 1 --out OUT",
    ),
)
_PROCESSES = (
    _train("compiled", "diffusion_bc", f"{_LAYERS} --compile --agent.denoising-steps 2", _SHORT),
    _train("workers", "diffusion_ql", f"{_Q} --workers 2"),
    _train("eval-workers", "td3_bc", f"{_LAYERS} --eval-workers 1"),
    _run(
        "cut-and-resumed",
        f"train --agent diffusion_ql {_TRAIN} --steps 100 --eval-every 100 --log-every 40 {_Q} --out OUT",
        "train --resume OUT --steps 200",
    ),
)
_LOOKED_AT = (
    _run(
        "evaluate",
        "evaluate diffusion_ql --episodes 2 --seed 3 --out OUT/evaluation.json",
        after=("diffusion_ql",),
    ),
    _run(
        "diagnose",
        "diagnose diffusion_ql --rows 150 --steps-list 1 2 4 --solvers ddim dpmpp2m ddpm --out OUT",
        after=("diffusion_ql",),
    ),
    _run("generate", "data generate maze2d-umaze-v1 --rows 3000 --seed 5 --output OUT/maze2d.hdf5"),
)

_SYNTHER = "--width 16 --blocks 1 --steps 60 --batch-size 32 --sampling-steps 4"
_AUGMENT = (
    _run("synther", f"augment synther maze2d-umaze-v1 --rows 3000 --samples 1200 {_SYNTHER} --out OUT/new.hdf5"),
    _run(
        "synther-conditioned",
        f"augment synther {PENDULUM} --env Pendulum-v1 --ratio 0.5 --mix append {_SYNTHER} --solver heun --seed 4 "
        "--terminals modelled --condition return --bins 4 --guidance 2 --above 0.5 --out OUT/new.hdf5",
    ),
    _run(
        "flow-to-better",
        f"augment flow-to-better {PENDULUM} --env Pendulum-v1 --samples 200 --preferences 60 --segment 10 "
        "--horizon 16 --width 8 --multipliers 1 2 --batch-size 16 --steps 40 --blocks 3 --restarts 2 "
        "--diffusion-steps 8 --sampling-steps 4 --flow-steps 2 --reward.members 2 --reward.width 16 --reward.steps 20 "
        "--out OUT/new.hdf5",
    ),
)

_ONLINE = "--steps 120 --eval-every 60 --eval-episodes 1 --warm-up 40 --log-every 20"
_SYNTHETIC = (
    "--synthetic-share 0.5 --refit-every 50 --synthetic-samples 60 --synthetic-steps 20 --synthetic-width 16 "
    "--synthetic-solver dpmpp2m --synthetic-sampling-steps 4"
)
_ON = (
    _run("online", f"online td3_bc {_ONLINE} --exploration 0.1 --out OUT", after=("td3_bc",)),
    _run(
        "online-resumed",
        f"online diffusion_ql {_ONLINE} --keep-offline 0.25 --updates-per-step 2 --start-checkpoint best --out OUT",
        "online --resume OUT --steps 180",
        after=("diffusion_ql",),
    ),
    _run("online-untrained", f"online {UNTRAINED} --seeds 0 1 {_ONLINE} --out OUT"),
    _run("online-synthetic", f"online iql {_ONLINE} {_SYNTHETIC} --exploration 0.1 --out OUT", after=("iql",)),
)

_POLICY = "--eval-episodes 1 --warm-up 3"
_ROLLOUTS = (
    "--environments 2 --rollout-steps 40 --steps 240 --eval-every 160 --epochs 2 "
    "--batch-size 40 --critic-width 16 --critic-layers 1"
)
_DPPO = f"--algo dppo {_POLICY} {_ROLLOUTS}"
_DPO = f"--algo dpo {_POLICY} --steps 40 --eval-every 20 --log-every 10 --out OUT"
_NFT = f"--algo nft {_POLICY} --log-every 10 --out OUT"
_DISTIL = "--steps 60 --eval-every 60 --eval-episodes 1 --log-every 20 --batch-size 32"
_POLICIES = (
    _run("dppo", f"finetune policy diffusion_bc {_DPPO} --out OUT", after=("diffusion_bc",)),
    _run(
        "dppo-resumed",
        f"finetune policy diffusion_ql {_DPPO} --tuned-steps 3 --kl-weight 0.1 --bc-weight 0.1 "
        "--candidates 3 --out OUT",
        "finetune policy --resume OUT --steps 320",
        after=("diffusion_ql",),
    ),
    _run("dppo-idql", f"finetune policy idql {_DPPO} --seeds 1 --out OUT", after=("idql",)),
    _run("policy-dpo", f"finetune policy diffusion_bc {_DPO}", after=("diffusion_bc",)),
    _run(
        "policy-dpo-resumed",
        f"finetune policy q_guidance {_DPO}",
        "finetune policy --resume OUT --steps 60",
        after=("q_guidance",),
    ),
    _run(
        "policy-nft",
        f"finetune policy diffusion_ql {_NFT} --advantages critics --steps 40 --eval-every 20 --states 16 --group 4",
        after=("diffusion_ql",),
    ),
    _run(
        "policy-nft-environment",
        f"finetune policy diffusion_bc --algo nft {_POLICY} --advantages environment {_ROLLOUTS} --out OUT",
        after=("diffusion_bc",),
    ),
    _run("distil-consistency", f"distil diffusion_ql {_DISTIL} --to consistency --out OUT", after=("diffusion_ql",)),
    _run("distil-scm", f"distil ifql {_DISTIL} --to consistency --loss scm --out OUT", after=("ifql",)),
    _run("distil-reflow", f"distil ifql {_DISTIL} --to reflow --out OUT", after=("ifql",)),
)

_UNSCORED = "--model tiny-digits --batch 16 --steps 3 --eval-samples 10 --warm-up 0"
_IMAGES = f"--queries 32 {_UNSCORED}"
_FEW = "--batch 4 --updates 2 --steps 3 --eval-samples 2 --warm-up 0"
_ROUNDS = "--rounds 2 --updates 2"
_FINETUNE = (
    _run("ddpo-is", f"finetune --algo ddpo-is {_IMAGES} --out OUT"),
    _run("ddpo-sf", f"finetune --algo ddpo-sf {_IMAGES} --out OUT"),
    _run("grpo", f"finetune --algo grpo {_IMAGES} --out OUT"),
    _run("dpok", f"finetune --algo dpok {_IMAGES} --out OUT"),
    _run("rwr", f"finetune --algo rwr {_IMAGES} --out OUT"),
    _run("d3po", f"finetune --algo d3po {_IMAGES} --out OUT"),
    _run("nft", f"finetune --algo nft {_IMAGES} --out OUT"),
    _run("draft", f"finetune --algo draft --reward digit:8 {_IMAGES} --out OUT"),
    _run("refl", f"finetune --algo refl --reward digit:8 {_IMAGES} --out OUT"),
    _run("dpo", f"finetune --algo dpo {_IMAGES} {_ROUNDS} --out OUT"),
    _run("dpo-pairs", f"finetune --algo dpo --pairs {PAIRS} --preference ipo {_UNSCORED} {_ROUNDS} --out OUT"),
    _run(
        "supervised-folder",
        f"finetune --algo supervised --model {LATENT} --data {EXAMPLES} {_ROUNDS} --batch 4 --steps 3 --eval-samples 2 "
        "--lora 0 --drop-prompts 0.2 --checkpointing --out OUT",
    ),
    _run(
        "latent",
        f"finetune --algo ddpo-is --model {LATENT} --prompts {PROMPTS} --queries 8 {_FEW} --train-steps 1 --out OUT",
        "finetune --resume OUT --queries 12",
    ),
    _run(  # the layers of which SD 3's adapters were before those of the text had some
        "flow",
        f"finetune --algo grpo --model {FLOW} --prompts {PROMPTS} --queries 8 {_FEW} --group 2 "
        "--layers to_q to_k to_v to_out.0 --out OUT",
    ),
    _run(
        "image-distil-consistency",
        "distil tiny-digits --to consistency --steps 20 --batch-size 8 --levels 4 --eval-samples 20 --out OUT",
    ),
    _run(
        "image-distil-reflow",
        "distil tiny-digits --to reflow --steps 20 --batch-size 8 --levels 4 --pairs 32 --eval-samples 20 --out OUT",
    ),
    _run("compare", "compare ddpo-is grpo --out OUT/page.html", after=("ddpo-is", "grpo")),
    _run("image-processes", f"finetune --algo ddpo-is {_IMAGES} --processes 2 --out OUT"),
    _run("supervised", f"finetune --algo supervised {_UNSCORED} {_ROUNDS} --out OUT"),
    FixedRun(
        "ddpo-is-resumed",
        (
            (
                *_words("finetune --algo ddpo-is --reward"),
                "jpeg + 0.5*digit:8",
                *_words(
                    f"{_IMAGES} --lora 2 --train-steps 2 --kl-target 0.1 --passes 2 --seed 3 --eta 0.7 "
                    "--out ddpo-is-resumed"
                ),
            ),
            _words("finetune --resume ddpo-is-resumed --queries 64"),
        ),
    ),
)
"""Every algorithm for images, as it is by default but for its size; and one resumed, with adapters."""

RUNS: dict[str, FixedRun] = {
    run.name: run for run in (*_OFFLINE, *_VARIANTS, *_PROCESSES, *_LOOKED_AT, *_AUGMENT, *_ON, *_POLICIES, *_FINETUNE)
}
"""All of them by name, each after those it starts from."""


def chosen(names: Sequence[str]) -> list[FixedRun]:
    """The runs of these names and those they start from, in the order of `RUNS`; all where none is named."""
    wanted = set(names or RUNS)
    for run in reversed(RUNS.values()):
        if run.name in wanted:
            wanted.update(run.after)
    return [run for run in RUNS.values() if run.name in wanted]
