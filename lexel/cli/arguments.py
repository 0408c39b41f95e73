"""Types of arguments, options that several commands share, and what those options mean."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lexel.errors import LexelError

if TYPE_CHECKING:
    from lexel.sample.lossy import AcceptanceConfig
    from lexel.sample.pipeline import Pipeline


def parse_part(text: str) -> tuple[int, int]:
    """An argparse type: ``I/N`` with 0 <= I < N."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N, as in 0/8, got {text}")
    return int(part), int(parts)


def at_least(
    least: float, kind: Callable[[str], Any] = int, most: float | None = None
) -> Callable[[str], Any]:
    """An argparse type: a number from `least` (to `most`)."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value >= least or (most is not None and not value <= most):
            upper = "" if most is None else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"must be at least {least}{upper}, got {text}")
        return value

    parse.__name__ = "number"
    return parse


def parse_counts(text: str) -> tuple[int, ...]:
    """An argparse type: numbers from 1, separated by commas."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"must be numbers from 1 like 1,4,16, got {text!r}")
    return counts


def parse_labels(text: str) -> tuple[int, ...]:
    """An argparse type: numbers from 0, separated by commas."""
    labels = text.split(",")
    if not all(label.isdigit() for label in labels):
        raise argparse.ArgumentTypeError(f"must be numbers from 0 like 207,360, got {text!r}")
    return tuple(map(int, labels))


def parse_box(text: str) -> tuple[float, ...]:
    """An argparse type: x0,y0,x1,y1."""
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be four numbers like 8,8,24,24, got {text!r}") from None
    return x0, y0, x1, y1


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], help: str, example: str
) -> argparse.ArgumentParser:
    """A command: its parser, with one or more example lines in the help (a test parses them)."""
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """--bundle and --device."""
    parser.add_argument("--bundle", metavar="DIR", help="bundle folder or hub id (default: the shipped one)")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: auto)")


def add_dtype(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """--dtype."""
    parser.add_argument(
        "--dtype",
        default=default,
        choices=("float32", "bfloat16", "int8"),
        help="pack the weights for fast decoding, in this type; pays from a few dozen pictures on "
        f"(default: {default or 'not packed'})",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """How tokens are sampled."""
    parser.add_argument("--seed", type=at_least(0), help="repeats exactly; without it every run differs")
    parser.add_argument(
        "--temperature", type=at_least(0.0, float), help="0 is greedy (default: the bundle's)"
    )
    parser.add_argument(
        "--decoding",
        default="auto",
        metavar="NAME",
        help="who drafts tokens: plain, jacobi, nested, a drafter of the bundle, …; all sample the same "
        "distribution (default: the bundle's choice)",
    )
    parser.add_argument(
        "--batch-size", type=at_least(1), default=64, help="how many are generated side by side (default: 64)"
    )


def add_acceptance(parser: argparse.ArgumentParser) -> None:
    """Which drafted tokens stand."""
    parser.add_argument(
        "--acceptance",
        default="exact",
        choices=("exact", "lantern", "grouped"),
        help="which drafted codes stand; lantern and grouped change the pictures (default: exact)",
    )
    parser.add_argument(
        "--bound", type=at_least(0.0, float), metavar="B", help="of lantern: δ up to 1, λ above (default: 3)"
    )
    parser.add_argument(
        "--neighbours", type=at_least(1), metavar="K", help="of lantern: per code at most (default: 1000)"
    )


def acceptance_config(arguments: argparse.Namespace) -> AcceptanceConfig:
    """What the options of `add_acceptance` say. Raises LexelError for options of another rule."""
    from lexel.sample.lossy import AcceptanceConfig

    given = {"bound": arguments.bound, "neighbours": arguments.neighbours}
    options = {name: value for name, value in given.items() if value is not None}
    if options and arguments.acceptance != "lantern":
        raise LexelError(f"--{next(iter(options))} belongs to --acceptance lantern.")
    return AcceptanceConfig(arguments.acceptance, **options)


def add_detokenizer(parser: argparse.ArgumentParser) -> None:
    """--detokenizer and --steps."""
    parser.add_argument("--detokenizer", action="store_true", help="draw pixels with the generative decoder")
    parser.add_argument(
        "--steps", type=at_least(1), help="its solver steps, or those of a tokenizer that draws by diffusion"
    )


def find_device(name: str) -> Any:
    """The device of --device. Raises LexelError when this machine has none of that name."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise LexelError(f"there is no device {name!r}; give auto, cpu or cuda.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise LexelError(f"device {name} was asked for, but this machine has no usable CUDA device.")
    return device


def load_pipeline(arguments: argparse.Namespace) -> Pipeline:
    """The bundle of --bundle on --device, packed where --dtype asks for it."""
    from lexel.sample.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(arguments.bundle).to(find_device(arguments.device))
    return pipe.pack(getattr(arguments, "dtype", None))
