"""Train the two towers of the reward emoji-clip, and state what they find: prompts of pictures, pictures of prompts.

    python benchmarks/emoji/towers.py FOLDER OUT [--steps 900]

FOLDER has the typefaces (`glyphs.py`); OUT gets emoji-clip.safetensors, in half precision, and towers.json. They learn
from the five typefaces that tiny-emoji has not seen, and are tested on Noto's drawings, which they have not: 20 of each
prompt, turned and shifted as tiny-emoji sees them. A batch has one picture of each of the 84 prompts, so that no
negative is a positive; the loss is CLIP's.
"""

import argparse
import json
import time
from pathlib import Path

import safetensors.torch
import torch
from classifiers import N, spoilt
from glyphs import SETS, all_prompts, drawn, iconify, noto
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from diffrl.images.emoji_words import PROMPTS
from diffrl.images.rewards.emoji_clip import Towers, tokens_of

HARDEST = 60.0
"""The largest scale of the cosines, as CLIP bounds its own by 100."""


def trained(pictures: Tensor, steps: int, seed: int) -> Towers:
    """Towers on pictures (n, 84, 4, SIDE, SIDE) of n drawings of each prompt: AdamW with a cosine."""
    torch.manual_seed(seed)
    towers, generator = Towers(), torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(towers.parameters(), 2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    tokens, own = tokens_of(PROMPTS), torch.arange(len(PROMPTS))
    for step in range(steps):
        which = torch.randint(len(pictures), (len(PROMPTS),), generator=generator)
        x = drawn(pictures[which, own], generator, turn=20, shift=0.08, least=0.65, mirror=True, stretch=0.2)
        x = spoilt(x, generator)
        logits = towers.log_scale.exp().clamp_max(HARDEST) * towers.images(x) @ towers.prompts(tokens).T
        loss = (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"{step + 1} {loss.item():.3f}", flush=True)
    return towers.eval()


@torch.no_grad()
def found(towers: Towers, pictures: Tensor, seed: int = 9) -> dict[str, float]:
    """Of 20 drawings of each of the pictures (84, ...): how often the towers find what belongs together.

    prompt: the nearest of the 84 prompts is the drawing's; prompt@5: it is among the nearest five; object: the nearest
    prompt has its object; image: of 84 drawings, one a prompt, the nearest to a prompt is its own.
    """
    i = torch.arange(len(pictures)).repeat_interleave(20)
    x = drawn(pictures[i], torch.Generator().manual_seed(seed))
    cosines = towers.images(x) @ towers.prompts(tokens_of(PROMPTS)).T
    best = cosines.topk(5, -1).indices
    of_prompts = cosines.view(len(pictures), 20, -1).argmax(0)  # (20, 84): the nearest drawing of each set of 84
    hits = {
        "prompt": best[:, 0] == i,
        "prompt@5": (best == i[:, None]).any(-1),
        "object": best[:, 0] // N == i // N,
        "image": of_prompts == torch.arange(len(PROMPTS)),
    }
    return {name: round(float(hit.float().mean()), 3) for name, hit in hits.items()}


def main() -> None:
    """Train, test, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    others = torch.stack([all_prompts(iconify(options.folder, name, which)) for name in SETS for which in (0, 1)])
    own = all_prompts(noto(options.folder))
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.process_time()
    towers = trained(others, options.steps, options.seed)
    seconds = round(time.process_time() - began)
    state = {name: tensor.half() for name, tensor in towers.state_dict().items()}
    safetensors.torch.save_file(state, options.out / "emoji-clip.safetensors")
    towers.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    about = {"steps": options.steps, "seed": options.seed, "cpu_seconds": seconds}
    about |= {"found on Noto, unseen": found(towers, own), "found on a typeface seen": found(towers, others[0])}
    print(about)
    (options.out / "towers.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
