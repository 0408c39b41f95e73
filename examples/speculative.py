"""Compare ways of decoding: the same distribution, fewer passes of the large model.

python examples/speculative.py --count 8
python examples/speculative.py --bundle outputs/quickstart/bundle
"""

import argparse
from collections.abc import Sequence

from lexel import Document, Image, Pipeline, Text

TEXTS = ("a red circle", "a large yellow star", "a blue square left of a green triangle", "a purple ring")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", help="bundle folder or hub id (default: the shipped one)")
    parser.add_argument("--count", type=int, default=4, help="pictures per strategy")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the bundle's)")
    arguments = parser.parse_args(argv)
    pipe = Pipeline.from_pretrained(arguments.bundle)
    documents: list[Document] = [
        [Text(TEXTS[number % len(TEXTS)]), Image.blank()] for number in range(arguments.count)
    ]
    options = {"seed": 0, "temperature": arguments.temperature, "batch_size": 1}

    pipe.generate(documents[:1], **options)  # the first call also warms up
    print(f"{'strategy':9} {'accepted':>8} {'passes':>7} {'drafts':>7} {'seconds':>8} {'speed':>6}")
    plain = 0.0
    for name in pipe.strategies:
        stats = pipe.generate(documents, decoding=name, **options).stats
        plain = plain or stats.seconds
        print(
            f"{name:9} {stats.mean_accepted:8.2f} {stats.target_forwards:7} {stats.draft_forwards:7} "
            f"{stats.seconds:8.2f} {plain / stats.seconds:5.2f}x"
        )

    # Exactness is easiest seen without chance: every strategy writes the very same greedy tokens.
    greedy = {**options, "temperature": 0.0}
    expected = pipe.generate(documents, decoding="plain", **greedy).ids
    for name in pipe.strategies:
        ids = pipe.generate(documents, decoding=name, **greedy).ids
        same = all(a.equal(b) for a, b in zip(expected, ids))
        print(f"{name}: greedy tokens {'equal' if same else 'DIFFER FROM'} plain decoding")


if __name__ == "__main__":
    main()
