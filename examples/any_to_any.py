"""One call for every direction: a document with blanks goes in, a complete document comes out.

python examples/any_to_any.py --out pictures
python examples/any_to_any.py --bundle outputs/quickstart/bundle
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lexel import Document, Image, Pipeline, SamplingConfig, Text
from lexel.data.images import to_image


def show(title: str, document: Document, out: Path) -> None:
    """Print the texts of a document and save its pictures."""
    words = []
    for number, segment in enumerate(document):
        if isinstance(segment, Text):
            words.append(repr(segment.text))
        elif segment.pixels is not None:
            path = out / f"{title}-{number}.png"
            to_image(segment.pixels).save(path)
            words.append(str(path))
    print(f"{title}: {' + '.join(words)}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", help="bundle folder or hub id (default: the shipped one)")
    parser.add_argument("--text", default="a red circle left of a blue square")
    parser.add_argument("--out", type=Path, default=Path("pictures"))
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    pipe = Pipeline.from_pretrained(arguments.bundle)

    drawn = pipe([Text(arguments.text), Image.blank()], count=4, seed=0).documents
    for number, document in enumerate(drawn):
        show(f"draw-{number}", document, arguments.out)

    picture = drawn[0][-1]
    show("describe", pipe([picture, Text.blank()]).documents[0], arguments.out)

    # How well a direction works depends on what the bundle was trained on (stages.lm.mixture); the two
    # below run with every bundle, because the grammar keeps whatever is sampled a document.
    show("redraw", pipe([picture, Text("a green star"), Image.blank()], seed=0).documents[0], arguments.out)
    freely = {"text": SamplingConfig(temperature=0.7), "image": SamplingConfig(temperature=0.6)}
    invented = pipe([Text.blank(), Image.blank()], seed=0, sampling=freely, text_limit=24)
    show("invent", invented.documents[0], arguments.out)


if __name__ == "__main__":
    main()
