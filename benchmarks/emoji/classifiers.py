"""Train the three networks that say what tiny-emoji's pictures show, and state what they are right on.

    python benchmarks/emoji/classifiers.py FOLDER OUT [--steps 1200]

FOLDER has the typefaces (`glyphs.py`); OUT gets emoji, emoji-held-out and classifier .safetensors, in half precision,
and classifiers.json. `emoji` sees Noto Color Emoji alone, `emoji-held-out` the five other typefaces alone, `classifier`
all six (a third Noto's); all are tested on Noto's pictures as tiny-emoji sees them, and train on pictures turned,
stretched and spoilt further.
"""

import argparse
import json
import time
from pathlib import Path

import safetensors.torch
import torch
from glyphs import SETS, all_prompts, drawn, iconify, noto
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

from diffrl.images.emoji_words import COLOURS, OBJECTS
from diffrl.images.rewards.emoji import untrained

N = 1 + len(COLOURS)


def spoilt(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images with noise and, every other batch, blurred: samples are never as clean as drawings."""
    if torch.rand((), generator=generator) < 0.5:
        images = interpolate(avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    level = 0.15 * torch.rand(len(images), 1, 1, 1, generator=generator)
    return images + level * torch.randn(images.shape, generator=generator)


def trained(which: str, pictures: Tensor, steps: int, seed: int) -> nn.Module:
    """A network on pictures (n * 84, 4, SIDE, SIDE): Adam with a cosine."""
    torch.manual_seed(seed)
    network, generator = untrained(which), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        i = torch.randint(len(pictures), (48,), generator=generator)
        x = spoilt(drawn(pictures[i], generator, turn=25, shift=0.1, least=0.6, mirror=True, stretch=0.25), generator)
        thing, colour = i % (N * len(OBJECTS)) // N, i % N - 1
        things, colours = network(x).split([len(OBJECTS), len(COLOURS)], -1)
        # An object's own colours teach no colour.
        loss = cross_entropy(things, thing, label_smoothing=0.05)
        loss = loss + cross_entropy(colours, colour, ignore_index=-1, label_smoothing=0.05)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def right(network: nn.Module, pictures: Tensor, seed: int = 9) -> dict[str, object]:
    """Of 20 drawings of each picture: the share whose object, and whose prompt, a network is right on."""
    i = torch.arange(len(pictures)).repeat_interleave(20)
    x = drawn(pictures[i], torch.Generator().manual_seed(seed))
    things, colours = network(x).split([len(OBJECTS), len(COLOURS)], -1)
    thing = things.argmax(-1) == i // N
    prompt = thing & ((i % N == 0) | (colours.argmax(-1) == i % N - 1))
    each = {name: round(float(thing[i // N == k].float().mean()), 3) for k, name in enumerate(OBJECTS)}
    return {"object": float(thing.float().mean()), "prompt": float(prompt.float().mean()), "each object": each}


def main() -> None:
    """Train all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--only", nargs="*", default=["emoji", "emoji-held-out", "classifier"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    own = all_prompts(noto(options.folder))
    others = torch.cat([all_prompts(iconify(options.folder, name, which)) for name in SETS for which in (0, 1)])
    everything = torch.cat([own] * 5 + [others])
    options.out.mkdir(parents=True, exist_ok=True)
    about = {}
    seen = {"emoji": own, "emoji-held-out": others, "classifier": everything}
    for seed, (which, pictures) in enumerate(seen.items()):
        if which not in options.only:
            continue
        began = time.process_time()
        network = trained(which, pictures, options.steps, seed)
        state = {name: tensor.half() for name, tensor in network.state_dict().items()}
        safetensors.torch.save_file(state, options.out / f"{which}.safetensors")
        network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
        about[which] = {"right on Noto": right(network, own), "cpu_seconds": round(time.process_time() - began)}
        about[which]["steps"] = options.steps
        print(which, about[which], flush=True)
    (options.out / "classifiers.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
