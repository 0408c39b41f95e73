"""Write a wider copy of a bundle's language model: to train on (stages.lm.init=FOLDER) or to measure.

python -m benchmarks.grow --bundle shapes --factor 4 --out outputs/large

The folder holds what `lexel-train` leaves of a language model. Without training the copy draws exactly what
the bundle's model draws (`lexel.models.grow`); --noise parts the copies, so that training can use them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import common
from lexel.models.causal_lm import CausalLM
from lexel.models.grow import widen
from lexel.sample.bundle import SHIPPED, BundleInfo, find_bundle, load_codec
from lexel.train.codec import save_codec


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.grow", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--bundle", default=SHIPPED, help=f"folder or hub id; {SHIPPED} is the one shipped")
    parser.add_argument("--factor", type=int, default=4, help="times the width, heads and feed-forward units")
    parser.add_argument("--layers", type=int, default=0, help="blocks to add, identities at first")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="differences between copies, share of weights"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the noise and the added blocks")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    options = parser.parse_args(arguments)
    folder = find_bundle(None if options.bundle == SHIPPED else options.bundle)
    info = BundleInfo.read(folder)
    lm = CausalLM.from_pretrained(folder / "lm")
    grown = widen(lm, options.factor, options.layers, noise=options.noise, seed=options.seed)
    save_codec(load_codec(folder, info), options.out, info.tokenizer)
    grown.save_pretrained(options.out)
    counts = " to ".join(f"{common.parameters(model) / 1e6:.2f}" for model in (lm, grown))
    print(f"{options.out}: width {lm.config.dim} to {grown.config.dim}, {counts} million parameters")


if __name__ == "__main__":
    common.run(main)
