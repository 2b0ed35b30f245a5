# %% [markdown]
# # Train a Diffusion-QL policy, and look inside
#
# A few minutes on a CPU: train on a maze, see where the policy drives, watch an action come out of noise, and see what
# the critics made of it. `diffrl train` does the same from the command line.

# %%
import diffrl

STEPS, ROWS, EPISODES = 3_000, 100_000, 10

run = diffrl.train(
    "diffusion_ql/maze2d-umaze-v1-small",
    steps=STEPS,
    rows=ROWS,  # a tenth of D4RL's: built in seconds
    seeds=(0,),
    eval_every=STEPS,
    eval_episodes=EPISODES,
    compile=False,
    workers=1,
    quiet=True,
)

# %% [markdown]
# ## What the policy does
#
# The score is normalised: 0 is a random policy, 100 is D4RL's expert. These are few steps of training and few
# episodes; the whole configuration, 20,000 steps, ends at 156.8 ± 1.2
# ([measured](../../benchmarks/results/stability.md)).

# %%
result = diffrl.evaluate(run, episodes=EPISODES, which=("last",), record=4, quiet=True)
scores = result["last"]["scores"][0]
print(
    f"score of {EPISODES} episodes: {sum(scores) / len(scores):.0f} (worst {min(scores):.0f}, best {max(scores):.0f})"
)

# %%
import matplotlib.pyplot as plt

from diffrl.runs.report import draw_maze, maze_of
from diffrl.runs.run import Run

grid, goal = maze_of(Run.read(run).task)
figure, ax = plt.subplots(figsize=(4, 4))
draw_maze(ax, grid, goal, result["last"]["paths"][0])
ax.set_title("Four episodes, from dark to bright, to the disc")
plt.show()

# %% [markdown]
# ## An action comes out of noise
#
# The policy is a chain of five denoising steps. Here 300 actions are made in one state, and the chain's states are
# kept. They begin as noise; at the end they stand where the policy wants to push the ball.

# %%
import numpy as np
import torch

from diffrl.support.plots import BLUE, GREY

policy = diffrl.load_policy(run)
agent = policy.agent
start = np.array(result["last"]["paths"][0][0][0], np.float32)
state = torch.tensor(start)[None, None]  # (seeds, states, observation)
generator = torch.Generator().manual_seed(0)

network = agent.networks["ema_actor"]  # the average, which acts
with torch.no_grad():
    chain = network.chain()
    rollout = chain.rollout(network.step_denoiser(state, K=300), torch.randn(1, 300, 2, generator=generator), generator)
clouds = rollout.states[:, 0].numpy()  # (steps + 1, 300, 2)

figure, axes = plt.subplots(1, 4, figsize=(10, 2.8), sharex=True, sharey=True)
for ax, step in zip(axes, (0, 2, 4, 5), strict=True):
    ax.scatter(*clouds[step].T, s=4, color=BLUE)
    ax.set(title=f"after {step} steps", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
plt.show()
print("spread of the actions after each step:", " ".join(f"{cloud.std(0).mean():.2f}" for cloud in clouds))

# %% [markdown]
# ## What the critics say, and what the data did
#
# The shading is Q of every action in that state, the least of the five critics. Grey dots are what the data did in the
# 200 nearest states; blue ones are the policy's actions. The loss has a term of cloning, which holds the
# blue dots to the grey ones, and one of Q, which is to move them to where it is dark. Of the second nothing shows after
# these few steps: Q differs by 0.04 between all actions here, and its two means below are equal to two digits.

# %%
from envs.datasets import load_dataset

data = load_dataset("maze2d-umaze-v1", rows=ROWS, progress=False)
near = np.argsort(((data.observations - start) ** 2).sum(1))[:200]

side = torch.linspace(-1, 1, 41)
actions = torch.cartesian_prod(side, side)[None]
with torch.no_grad():
    q = agent.networks["target_critic"](state.expand(1, actions.shape[1], -1), actions).min(1).values[0]

figure, ax = plt.subplots(figsize=(4.6, 4))
shades = ax.contourf(side, side, q.reshape(41, 41).T, levels=12, cmap="Purples")
figure.colorbar(shades, label="Q")
ax.scatter(*data.actions[near].T, s=6, color=GREY, label="data")
ax.scatter(*clouds[-1].T, s=6, color=BLUE, label="policy")
ax.set(xlabel="force along x", ylabel="force along y", aspect="equal")
ax.legend(loc="upper left")
plt.show()

with torch.no_grad():
    own = torch.tensor(clouds[-1])[None]
    of_data = torch.tensor(data.actions[near])[None]
    values = [
        agent.networks["target_critic"](state.expand(1, a.shape[1], -1), a).min(1).values.mean() for a in (of_data, own)
    ]
print(f"mean Q of the data's actions: {values[0]:.2f}, of the policy's: {values[1]:.2f}")

# %% [markdown]
# ## Further
#
# `print(run)` says where the run is. `diffrl diagnose RUN` asks whether its policy is well trained: its loss by noise
# level, how many steps its solver needs, how far Q has moved it. `diffrl resume RUN --steps 20000` goes on to the whole
# configuration.
