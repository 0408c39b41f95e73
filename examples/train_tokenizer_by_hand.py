"""Train a small image tokenizer in a plain PyTorch loop: no trainer, no configuration files.

python examples/train_tokenizer_by_hand.py --steps 400 --out outputs/by_hand
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from lexel.data import DrawnDataset, ResumableSampler, ShapesConfig, stack_pixels
from lexel.data.images import to_image
from lexel.evaluate.metrics import psnr
from lexel.tokenizers import from_pretrained
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.vq import VQTokenizerConfig
from lexel.train.objectives.tokenizer import TokenizerObjectiveConfig


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("outputs/by_hand"))
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    data = ShapesConfig(size=32)
    sizes = {"channels": 32, "channel_mult": (1,), "z_channels": 32, "res_blocks": 1, "norm_groups": 8}
    sizes |= {"encoder": "patch", "stem": 4, "attention": False}
    quantizer = QuantizerConfig(kind="vq", codebook_size=256)
    tokenizer = VQTokenizerConfig(image_size=32, quantizer=quantizer, **sizes).build()
    objective = TokenizerObjectiveConfig(l2=1.0, worst_pixels=0.5, unrounded_steps=50).build()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=3e-3)

    train = data.build("train")
    # Batch number t is a pure function of the seed: `start_batch=t` resumes anywhere.
    order = ResumableSampler(len(train), batch_size=32, seed=0)
    batches = DataLoader(DrawnDataset(train), batch_sampler=order, collate_fn=stack_pixels)
    for step, pixels in zip(range(arguments.steps), batches):
        output = tokenizer(pixels, quantize=objective.rounds(step))
        loss, metrics = objective.generator_loss(output, pixels, step, tokenizer.last_layer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss:.4f}, {metrics['psnr']:.1f} dB, {metrics['usage']:.0%} used")

    tokenizer.save_pretrained(arguments.out)
    loaded = from_pretrained(arguments.out)
    held_out = data.build("validation")
    pixels = stack_pixels([held_out[index] for index in range(8)])
    rebuilt = loaded.decode(loaded.encode(pixels))
    print(f"{loaded.layout.positions} codes per picture, {psnr(rebuilt, pixels).mean():.1f} dB held out")
    rows = torch.stack([pixels, rebuilt]).permute(2, 0, 3, 1, 4).reshape(3, 64, 256)
    to_image(rows).save(arguments.out / "pictures.png")


if __name__ == "__main__":
    main()
