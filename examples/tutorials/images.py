# %% [markdown]
# # Align an image model, and catch it cheating
#
# tiny-digits is a diffusion model of 8x8 digits. We pay it for images that a classifier takes for an 8, and watch what
# it does for the money. A few minutes on a CPU. `diffrl finetune` does the same from the command line.

# %%
from pathlib import Path

from diffrl.images import FinetuneConfig, finetune
from diffrl.support.files import read_json

IMAGES, SAMPLES = 640, 100


def align(**options: object) -> Path:
    """Fine-tune on the reward digit:8 by its own gradient (DRaFT), and give the run's folder."""
    config = FinetuneConfig(
        algo="draft",
        reward="digit:8",
        held_out="digit-held-out:8",
        queries=IMAGES,
        eval_samples=SAMPLES,
        **options,
    )
    return finetune(config, quiet=True)


def evaluations(run: Path) -> list[dict]:
    """What a run's evaluations measured, the one before the first round first."""
    return read_json(run / "evaluations.json")


greedy = align()

# %% [markdown]
# ## The reward rises
#
# `reward` is what the model is paid for. The held-out reward is another network that was trained on other digits.
# Class accuracy asks a third network whether an image still shows the digit of its prompt: it was not part of the deal.

# %%
columns = ("reward", "held_out", "class_accuracy", "diversity", "reference_error")
print(f"{'images':>8}", *(f"{column:>16}" for column in columns))
for entry in evaluations(greedy):
    print(f"{entry['queries']:8}", *(f"{entry[column]:16.3f}" for column in columns))

# %% [markdown]
# ## And the price
#
# The same prompts and the same noise, before and after.

# %%
import matplotlib.pyplot as plt

figure, ax = plt.subplots(figsize=(9, 4))
ax.imshow(plt.imread(greedy / "before_after.png"))
ax.axis("off")
plt.show()

# %% [markdown]
# Every run says so itself, in its last lines, from the same figures:

# %%
from diffrl.images.run import FinetuneRun

for sentence in FinetuneRun.read(greedy).warnings():
    print("-", sentence)

# %% [markdown]
# ## Hold it
#
# `stop_kl` ends a run when it has moved so many nats from the pretrained model. The reward is lower, and more of the
# digits are what their prompts say.

# %%
held = align(stop_kl=max(entry["kl"] for entry in evaluations(greedy)) / 4)
for name, run in (("greedy", greedy), ("held", held)):
    last = evaluations(run)[-1]
    print(f"{name}: reward {last['reward']:.3f}, class accuracy {last['class_accuracy']:.3f}, KL {last['kl']:.1f} nats")

# %% [markdown]
# ## Further
#
# `print(greedy, held)` says where the runs are, and `diffrl compare RUN RUN --out page.html` puts them side by side.
# `--kl` and `--kl-target` hold a run by a penalty instead of an end. [Images
# fine-tuned](../../benchmarks/results/finetune.md) has the curve of reward against accuracy for each algorithm.
