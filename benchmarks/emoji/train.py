"""Train tiny-emoji, the model of 32 x 32 emoji that comes with diffrl, on Noto Color Emoji.

    python benchmarks/emoji/train.py FOLDER OUT [--steps N] [--seed 0]

FOLDER has the typeface (`glyphs.py` says how it gets there); OUT becomes a diffusers pipeline, which is written again
every 500 steps, so that what is there can be used at any time. One thread; bfloat16 by autocast. A number of steps in
the file OUT.steps takes the place of --steps; until 2,500 steps before the end that changes nothing of what was done.

The network predicts the image itself. One that predicts v has to hand all 24 channels of noise on through its 48,
exactly, which it had not learned after 1,200 steps: its images were grainy with any sampler, on white paper too. The
loss is v's all the same, |D - x_0|^2 / sigma^2, but for what is nearly without noise (as JiT has it, arXiv 2511.13720).
"""

import argparse
import copy
import json
import math
import shutil
import time
from pathlib import Path

import safetensors.torch
import torch
from glyphs import all_prompts, drawn, noto
from torch import Tensor, nn

from diffrl.diffusion import VP
from diffrl.images.emoji_words import COLOURS, OBJECTS
from diffrl.images.models.emoji import SPREADS, to_states
from diffrl.support.files import atomic_path
from diffrl.support.seeds import generator_at

WARM_UP, DECAY, EMA = 100, 2500, 0.998
"""The rate rises over WARM_UP steps, stays, and falls to 0 along a cosine over the last DECAY; what is kept is the
weights' running mean."""
LEAST = 0.1
"""The least sigma by which errors are divided."""


class Words(nn.Module):
    """The embedding of a class as its object's and its colour's, added up: what is learned of blue serves all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.objects = nn.Embedding(len(OBJECTS), width)
        self.colours = nn.Embedding(1 + len(COLOURS), width)

    def forward(self, labels: Tensor) -> Tensor:
        """Classes (B,) -> (B, width)."""
        n = 1 + len(COLOURS)
        return self.objects(labels // n) + self.colours(labels % n)


def unet(classes: int, widths: tuple[int, ...]):
    """The U-Net on the blocks' coefficients, 24 channels of 8 x 8."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=8,
        in_channels=24,
        out_channels=24,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        num_class_embeds=classes,
        norm_num_groups=8,
        attention_head_dim=16,
    )


def save(mean: nn.Module, scheduler, folder: Path) -> None:
    """Write the pipeline, in half precision, its embedding one row a class."""
    from diffusers import DDIMPipeline

    whole = copy.deepcopy(mean)
    words, classes = whole.class_embedding, whole.config.num_class_embeds
    with torch.no_grad():
        whole.class_embedding = nn.Embedding.from_pretrained(words(torch.arange(classes)), freeze=False)
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_path(folder) as temporary:
        DDIMPipeline(whole.half(), scheduler).save_pretrained(temporary, safe_serialization=True)


def load(network: nn.Module, folder: Path) -> None:
    """Read what `save` wrote, a class's embedding as its object's, which is that without a colour, and a colour's."""
    state = safetensors.torch.load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    state = {name: tensor.float() for name, tensor in state.items()}
    table = state.pop("class_embedding.weight").unflatten(0, (len(OBJECTS), -1))
    state["class_embedding.objects.weight"] = table[:, 0]
    state["class_embedding.colours.weight"] = (table - table[:, :1]).mean(0)
    network.load_state_dict(state)


def main() -> None:
    """Train."""
    from diffusers import DDIMScheduler

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--widths", type=int, nargs=2, default=(48, 96))
    parser.add_argument("--start", type=Path, help="a pipeline of an earlier run to go on from")
    parser.add_argument(
        "--skew", type=float, default=1.0, help="labels are 1000 u^skew, u uniform: more of little noise"
    )
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shorter = options.out.with_name(options.out.name + ".steps")
    torch.set_num_threads(1)
    pictures = all_prompts(noto(options.folder))
    # "trailing" and cosine, as tiny-digits has it: steps begin at pure noise, and the last decision has noise left.
    scheduler = DDIMScheduler(
        1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="sample",
        clip_sample=False,
        timestep_spacing="trailing",
    )
    table = -torch.log(scheduler.alphas_cumprod.double()).float()
    process = VP()
    weight = torch.tensor(SPREADS)[:, None, None]  # between that of the pixels, its square, and none
    weight = weight / weight.mean()
    torch.manual_seed(options.seed)
    network = unet(len(pictures), tuple(options.widths))
    network.class_embedding = Words(network.class_embedding.embedding_dim)
    if options.start is not None:
        load(network, options.start)
    mean = copy.deepcopy(network).requires_grad_(False)
    generator = generator_at(options.seed, 1)
    optimiser = torch.optim.AdamW(network.parameters(), options.lr, weight_decay=1e-4, betas=(0.9, 0.99), fused=True)
    began, losses, steps, step = time.process_time(), [], options.steps, 0
    while step < steps:
        step += 1
        falling = (1 - math.cos(math.pi * min(1, (steps - step + 1) / DECAY))) / 2
        for group in optimiser.param_groups:
            group["lr"] = options.lr * min(1, step / WARM_UP, falling)
        i = torch.randint(len(pictures), (options.batch,), generator=generator)
        x0 = to_states(drawn(pictures[i], generator) * 2 - 1)
        label = (torch.rand(options.batch, generator=generator) ** options.skew * len(table)).long()
        noise = torch.randn(x0.shape, generator=generator)

        t = table[label].view(-1, 1, 1, 1)
        alpha, sigma = process.alpha(t), process.sigma(t)
        with torch.autocast("cpu", torch.bfloat16):
            x = network(alpha * x0 + sigma * noise, label, class_labels=i).sample.float()
        loss = (weight * ((x - x0) / sigma.clamp_min(LEAST)).square()).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        losses.append(loss.item())
        rate = 1 - min(EMA, step / (step + 10))
        torch._foreach_lerp_(list(mean.parameters()), list(network.parameters()), rate)
        if step % 100 == 0:
            seconds = time.process_time() - began
            if shorter.exists():
                steps = int(shorter.read_text())
            print(f"{step} {sum(losses[-100:]) / 100:.5f} {seconds:.0f} s of CPU", flush=True)
        if step % 500 == 0 or step == steps:
            save(mean, scheduler, options.out)
            about = {"steps": step, "of": steps, "batch": options.batch, "seed": options.seed}
            about |= {"cpu_seconds": round(time.process_time() - began), "loss": sum(losses[-1000:]) / 1000}
            (options.out / "trained.json").write_text(json.dumps(about) + "\n")


if __name__ == "__main__":
    main()
