"""A small CLIP-like teacher of `shapes`: pictures and captions trained to meet in one space.

    python -m benchmarks.teacher --out outputs/teacher [--steps N]

Recipes that learn from a frozen vision model (semantic tokenizers, representation losses) need one that knows
the pictures; no published model is that small. The network is transformers' CLIPModel, trained with CLIP's
symmetric contrastive loss (Radford et al. 2021) on one caption per picture. The folder it writes holds the
model, its text tokenizer and a preprocessor file, and is what `VisionTeacher` and transformers load.

b batch · l caption length · m candidate captions
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from lexel.data.captions import render_caption
from lexel.data.example import Example, stack_pixels
from lexel.data.shapes import PAIRS, SEEN_PAIRS, ShapesConfig, ShapesDataset, draw_scene, full_claim
from lexel.data.text_tokenizer import train_text_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerFast

WIDTH, LAYERS, HEADS, PATCH, SPACE = 128, 4, 4, 8, 64
TEXT_VOCABULARY, LONGEST_CAPTION = 512, 48
END, PAD = "<|endoftext|>", "<|pad|>"
# Of pixels in [0, 1]: the network is shown [-1, 1], as every picture in Lexel is.
MEAN = STD = [0.5, 0.5, 0.5]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save, and tell how often the nearest of 64 captions names a held-out object rightly."""
    options = _parser().parse_args(arguments)
    if options.quick:
        options.steps, options.batch, options.count = 2, 8, 16
    scenes = easy_scenes(options.size, max(options.batch, options.pictures))
    started = time.perf_counter()
    model, tokenizer = train(scenes, options.steps, options.batch, options.lr, options.seed)
    seconds = time.perf_counter() - started
    save(model, tokenizer, options.out)
    accuracy = {kind: zero_shot(model, tokenizer, scenes, kind, options.count) for kind in ("one", "unseen")}
    figures = {"machine": common.machine("cpu"), "seconds": round(seconds), "zero_shot": accuracy}
    print(common.table(["pictures", "colour", "shape", "both"], _rows(accuracy)))
    print(
        f"{sum(x.numel() for x in model.parameters()) / 1e6:.2f} M parameters, {seconds:.0f} s: {options.out}"
    )
    (options.out / "figures.json").write_text(json.dumps(figures, indent=2))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


def easy_scenes(size: int, count: int) -> ShapesConfig:
    """The scenes of ``lexel-train experiment=quickstart``: plain light backgrounds, little variation."""
    return ShapesConfig(
        size=size,
        count=count,
        textured=0.0,
        backgrounds=("light",),
        variation=0.25,
        object_weights=(0.5, 0.4, 0.1),
        partial=0.1,
    )


def _parser() -> argparse.ArgumentParser:
    made = common.parser(str(__doc__).splitlines()[0], "teacher")
    made.add_argument("--out", type=Path, default=Path("outputs/teacher"), help="folder of the model")
    made.add_argument("--steps", type=int, default=1200)
    made.add_argument("--batch", type=int, default=64, help="pictures per step")
    made.add_argument("--pictures", type=int, default=50000, help="different training pictures")
    made.add_argument("--lr", type=float, default=1.5e-3, help="highest learning rate")
    made.add_argument("--count", type=int, default=512, help="held-out pictures of each kind")
    return made


def _rows(accuracy: dict[str, dict[str, float]]) -> list[list[str]]:
    names = {"one": "one object, seen pair", "unseen": "one object, unseen pair"}
    return [[names[k], *(f"{v[x]:.1%}" for x in ("color", "shape", "both"))] for k, v in accuracy.items()]


def build(size: int, vocabulary: int, end: int, pad: int) -> CLIPModel:
    """The untrained network: about 1 M parameters, half of them in the picture's side."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    shared: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_attention_heads": HEADS,
    }
    vision = CLIPVisionConfig(
        **shared, num_hidden_layers=LAYERS, image_size=size, patch_size=PATCH, projection_dim=SPACE
    )
    text = CLIPTextConfig(
        **shared,
        num_hidden_layers=2,
        vocab_size=vocabulary,
        max_position_embeddings=LONGEST_CAPTION,
        projection_dim=SPACE,
        eos_token_id=end,
        bos_token_id=end,
        pad_token_id=pad,
    )
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=SPACE)
    )
    _place(model.vision_model.embeddings)
    return model


@torch.no_grad()
def _place(embeddings: Any) -> None:
    """Start the patches' places as sines of row and column, and patch and place equally loud: from CLIP's own
    start (both faint, places random) a small network learnt colours in minutes, and no shapes."""
    positions = embeddings.position_embedding.weight
    side = math.isqrt(len(positions) - 1)
    frequencies = math.pi / 8 * 2 ** torch.linspace(0, 3, positions.shape[1] // 4)
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = torch.stack([row.reshape(-1, 1) * frequencies, column.reshape(-1, 1) * frequencies], 1)
    positions[1:] = 0.1 * torch.cat([angles.sin(), angles.cos()], 2).flatten(1)
    embeddings.patch_embedding.weight.mul_(5)


def train(
    scenes: ShapesConfig, steps: int, batch: int, lr: float, seed: int
) -> tuple[CLIPModel, PreTrainedTokenizerFast]:
    """The trained model in eval mode and its text tokenizer."""
    torch.manual_seed(seed)
    dataset = scenes.build("train")
    captions = [caption for i in range(min(1000, len(dataset))) for caption in dataset.captions(i)]
    tokenizer = train_text_tokenizer(captions, TEXT_VOCABULARY)
    tokenizer.add_special_tokens({"eos_token": END, "pad_token": PAD})
    end, pad = (int(tokenizer.convert_tokens_to_ids(name)) for name in (END, PAD))  # type: ignore[arg-type]
    model = build(scenes.size, len(tokenizer), end, pad).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2), pct_start=0.1)
    for step, examples in zip(range(steps), _batches(dataset, batch, seed)):
        # The first caption names every object with colour and shape; the last may leave something out.
        chosen = [x.captions[-1 if i % 4 == 3 else 0] for i, x in enumerate(examples)]
        loss = contrastive(model, stack_pixels(examples), text_values(tokenizer, chosen))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)  # ln 100, as in CLIP
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}/{steps}  loss {float(loss.detach()):.3f}", flush=True)
    return model.eval(), tokenizer


def _batches(dataset: ShapesDataset, size: int, seed: int) -> Iterator[list[Example]]:
    """In turn: scenes as they come, and one object of each pair, of which every other picture is a wrong
    answer that differs in colour or in shape alone."""
    random = np.random.default_rng(seed)
    config = dataset.config
    for number in count():
        if number % 2:
            yield [dataset[int(i)] for i in random.integers(len(dataset), size=size)]
        else:
            pairs = [SEEN_PAIRS[i] for i in random.permutation(len(SEEN_PAIRS))[:size]]
            scenes = [draw_scene(random, [pair], config) for pair in pairs]
            captions = [render_caption(full_claim(scene.objects, random), random) for scene in scenes]
            yield [
                Example("", (caption,), scene.render(config.size), scene)
                for scene, caption in zip(scenes, captions)
            ]


def text_values(tokenizer: PreTrainedTokenizerFast, captions: Sequence[str]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, long ``[b, l]``; every caption ends with the end token."""
    ended = [caption + END for caption in captions]
    return dict(
        tokenizer(ended, padding=True, truncation=True, max_length=LONGEST_CAPTION, return_tensors="pt")
    )


def contrastive(model: CLIPModel, pixels: Tensor, texts: dict[str, Tensor]) -> Tensor:
    """CLIP's loss: each picture against the batch's captions and each caption against its pictures."""
    logits = model(pixel_values=pixels, **texts).logits_per_image
    target = torch.arange(len(logits))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@torch.no_grad()
def zero_shot(
    model: CLIPModel, tokenizer: PreTrainedTokenizerFast, scenes: ShapesConfig, kind: Any, count: int
) -> dict[str, float]:
    """Share of held-out pictures of one object whose nearest caption "a <colour> <shape>" has the right
    colour, the right shape, and both; 64 captions to choose from, so chance is 1/64 for both."""
    examples = scenes.scenes(kind, count, seed=7)
    texts = text_values(tokenizer, [f"{_article(color)} {color} {shape}" for color, shape in PAIRS])
    logits = torch.cat(
        [model(pixel_values=part, **texts).logits_per_image for part in stack_pixels(examples).split(128)]
    )
    found = [PAIRS[i] for i in logits.argmax(1).tolist()]
    true = [(x.truth.objects[0].color, x.truth.objects[0].shape) for x in examples]  # type: ignore[attr-defined]
    color = [a[0] == b[0] for a, b in zip(found, true)]
    shape = [a[1] == b[1] for a, b in zip(found, true)]
    both = [a and b for a, b in zip(color, shape)]
    return {"color": float(np.mean(color)), "shape": float(np.mean(shape)), "both": float(np.mean(both))}


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def save(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """`folder` as transformers and `VisionTeacher` load it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = int(model.vision_model.embeddings.image_size)
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": MEAN,
        "image_std": STD,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=2))


if __name__ == "__main__":
    common.run(main)
