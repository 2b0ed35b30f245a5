# %% [markdown]
# # Enlarge a data set, and see whether it is faithful
#
# SynthER learns the distribution of single transitions and samples new ones. A few minutes on a CPU: train its model
# on a maze's data, generate rows, and measure them before any agent sees them. `diffrl augment synther` does the same
# from the command line.

# %%
from diffrl.augment.synther.augmenter import synther
from diffrl.augment.synther.config import Sampling, SynthERConfig

STEPS, HASTY, ROWS, SAMPLES, WIDTH = 4_000, 60, 20_000, 20_000, 128


def enlarge(name: str, steps: int) -> None:
    """Train a model for some steps, write what it generates to NAME.hdf5 and what it is worth to NAME-synther/."""
    synther(
        "maze2d-umaze-v1",
        f"{name}.hdf5",
        rows=ROWS,
        samples=SAMPLES,
        model=SynthERConfig(width=WIDTH, steps=steps, batch_size=256),
        sampling=Sampling(solver="dpmpp2m", sampling_steps=32),
        force=True,  # a file of an earlier run of this page is replaced
        quiet=True,
    )


enlarge("trained", STEPS)
enlarge("hasty", HASTY)  # the same model, hardly trained

# %% [markdown]
# ## Look at it
#
# Positions of real rows and of generated ones. A ball cannot be in a wall, and no model was told of a wall: rows of a
# model that has seen too little stand in it.

# %%
import matplotlib.pyplot as plt

from diffrl.data import d4rl
from envs.datasets import load_dataset

sides = {
    "real": load_dataset("maze2d-umaze-v1", rows=ROWS, progress=False),
    "trained": d4rl.read("trained.hdf5"),
    "hasty": d4rl.read("hasty.hdf5"),
}
figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), sharex=True, sharey=True)
for ax, (name, rows) in zip(axes, sides.items(), strict=True):
    ax.scatter(*rows.observations[:5_000, :2].T, s=1, alpha=0.4)
    ax.set(title=name, xlim=(0, 4.5), ylim=(0, 4.5), aspect="equal")
plt.show()

# %% [markdown]
# ## Measure it
#
# Every measure stands beside its floor: the same measure between real rows and others, held out. What is at the floor
# cannot be told from chance. The dynamics error asks the simulator where the action leads from the state, and
# compares.

# %%
from diffrl.support.files import read_json

reports = {name: read_json(f"{name}-synther/fidelity.json") for name in ("trained", "hasty")}
figures = {
    "sliced W2": lambda report: report["sliced_w2"],
    "mean KS of a column": lambda report: report["marginals"]["ks_mean"],
    "pairs in which trees find the fake": lambda report: report["classifier"]["area_under_curve"],
    "median distance to a training row": lambda report: report["nearest_neighbour"]["median"],
    "median dynamics error": lambda report: report["dynamics"]["median"],
}
print(f"{'':34} {'trained':>8} {'hasty':>8} {'floor':>8}")
for name, figure_of in figures.items():
    trained, hasty = (figure_of(report) for report in reports.values())
    print(f"{name:34} {trained['synthetic']:8.3f} {hasty['synthetic']:8.3f} {trained['real']:8.3f}")

# %% [markdown]
# ## The verdict
#
# `fidelity.html` says the same in sentences, with pictures. Read its first line before you train on the rows. A model
# of minutes is a small one: the paper's is eight times as wide.

# %%
for name, report in reports.items():
    print(f"{name}: {report['verdicts']['overall']}")
    print(f"  {report['verdicts']['dynamics']}")

# %% [markdown]
# ## Further
#
# The file is an ordinary data set: `diffrl train --agent iql --dataset trained.hdf5`. Faithful rows are not yet useful
# ones: on this maze, and on a recording of hopper, agents did as well on synthetic rows alone as on real ones
# ([measured](../../benchmarks/results/synther.md)).
