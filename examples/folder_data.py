"""From a folder of captioned pictures to stored codes and back to pixels.

python examples/folder_data.py --out outputs/folder_data
python examples/folder_data.py --bundle outputs/quickstart/bundle
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from lexel.data import FolderConfig, ShapesConfig, check_codes, tokenize_dataset
from lexel.data.images import to_image
from lexel.sample.bundle import load_tokenizer_of


def make_folder(root: Path, count: int) -> None:
    """A folder as the hub's image-folder convention has it: pictures and `metadata.jsonl`."""
    root.mkdir(parents=True, exist_ok=True)
    source = ShapesConfig(size=64).build("train")
    with (root / "metadata.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            example = source[number]
            to_image(example.pixels).save(root / f"{number:03d}.png")
            row = {"file_name": f"{number:03d}.png", "text": list(example.captions)}
            file.write(json.dumps(row) + "\n")
        # What is wrong with a folder is counted, named and left out (or refused: on_error="raise").
        file.write(json.dumps({"file_name": "lost.png", "text": "a picture that is not there"}) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", help="tokenizer or bundle folder (default: the shipped bundle)")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("outputs/folder_data"))
    arguments = parser.parse_args(argv)
    make_folder(arguments.out / "pictures", arguments.count)

    tokenizer = load_tokenizer_of(arguments.bundle)
    # A share of 0 holds nothing out; pictures are cropped and scaled to the tokenizer's size.
    config = FolderConfig(str(arguments.out / "pictures"), size=tokenizer.image_size, validation_share=0.0)
    pictures = config.build("train")
    print(f"{len(pictures)} pictures, the first: {pictures[0].captions[0]!r}")

    codes = tokenize_dataset(tokenizer, pictures, arguments.out / "codes")
    check = check_codes(arguments.out / "codes", tokenizer, pictures)
    print(f"{len(codes)} x {len(codes[0].codes)} codes, {check.agreement:.0%} agree, {check.psnr:.1f} dB")

    for number in range(min(4, len(codes))):
        rebuilt = tokenizer.decode(codes[number].batch(tokenizer.layout))[0]
        pair = torch.cat([pictures[number].pixels, rebuilt], dim=2)
        to_image(pair).save(arguments.out / f"rebuilt-{number}.png")


if __name__ == "__main__":
    main()
