"""Untuned samples of tiny-emoji: how many show their prompts, and the picture of docs/finetune.md.

python benchmarks/emoji/samples.py docs/tiny_emoji.png [--each 10]
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from diffrl.images.config import FinetuneConfig
from diffrl.images.emoji_words import OBJECTS, PROMPTS, class_of
from diffrl.images.models import load_model
from diffrl.images.rewards.codecs import to_uint8
from diffrl.images.rewards.emoji import emoji_classifier, network
from diffrl.images.run import tiles
from diffrl.images.samples import RunState, Setup, chain_of, plain, roll_out


@torch.no_grad()
def main() -> None:
    """Sample, count, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--each", type=int, default=10, help="samples of each prompt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model("tiny-emoji", lora=None)
    prompts = PROMPTS * options.each
    config = FinetuneConfig(model="tiny-emoji", eval_samples=len(prompts))
    setup = Setup(config, model, chain_of(model, config), plain(PROMPTS), None)
    chosen = torch.arange(len(prompts)) % len(PROMPTS)
    images = roll_out(setup, RunState(), chosen, setup.noise_path(0)).images
    agreed = emoji_classifier().agree(images, prompts).float().mean()
    print(f"{len(prompts)} samples; the classifier agrees with {agreed:.3f}")
    things = torch.tensor([class_of(prompt) for prompt in prompts]) // (len(PROMPTS) // len(OBJECTS))
    for which in ("emoji", "emoji-held-out"):
        right = network(which)(images)[:, : len(OBJECTS)].argmax(-1) == things
        print(f"{which}: the object of {right.float().mean():.3f}")
    first = images[: len(PROMPTS)].unflatten(0, (len(OBJECTS), -1)).transpose(0, 1).flatten(0, 1)
    canvas = torch.from_numpy(tiles(first, len(OBJECTS))).permute(2, 0, 1)[None]
    picture = Image.fromarray(to_uint8(canvas)[0])
    picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST).save(options.out)


if __name__ == "__main__":
    main()
