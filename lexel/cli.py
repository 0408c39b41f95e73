"""The `lexel` command: sample, draw, describe, reconstruct, published, verify, tokenize, evaluate, matrix,
demo.

Exit codes: 0 done, 1 `verify` found something that does not fit, 2 the user's to mend (one sentence on
stderr, never a traceback), 130 interrupted.
Heavy libraries load inside the commands, so that `lexel --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexel import __version__
from lexel.errors import LexelError

if TYPE_CHECKING:
    from lexel.sample.lossy import AcceptanceConfig
    from lexel.sample.partial import Partial, Partials
    from lexel.sample.pipeline import Pipeline
    from lexel.tokenizers.base import Tokenizer
    from lexel.types import Codes, GenerationOutput

SHAPES = "shapes"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. `argv` defaults to the process's arguments."""
    arguments = build_parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (LexelError, ValueError, OSError) as error:
        print(f"lexel: error: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lexel: interrupted", file=sys.stderr)
        return 130


def _sentence(error: Exception) -> str:
    """The error's message on one line; system errors name the file."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}."
    return " ".join(str(error).split()) or type(error).__name__


# Arguments


def _part(text: str) -> tuple[int, int]:
    """An argparse type: ``I/N`` with 0 <= I < N."""
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"must be I/N with 0 <= I < N, as in 0/8, got {text}")
    return int(part), int(parts)


def _number(
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


def _counts(text: str) -> tuple[int, ...]:
    """An argparse type: numbers from 1, separated by commas."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError(f"must be numbers from 1 like 1,4,16, got {text!r}")
    return counts


def _labels(text: str) -> tuple[int, ...]:
    """An argparse type: numbers from 0, separated by commas."""
    labels = text.split(",")
    if not all(label.isdigit() for label in labels):
        raise argparse.ArgumentTypeError(f"must be numbers from 0 like 207,360, got {text!r}")
    return tuple(map(int, labels))


def _box(text: str) -> tuple[float, ...]:
    """An argparse type: x0,y0,x1,y1."""
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be four numbers like 8,8,24,24, got {text!r}") from None
    return x0, y0, x1, y1


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int | None], help: str, example: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", metavar="DIR", help="bundle folder or hub id (default: the shipped one)")
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: auto)")


def _add_dtype(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    parser.add_argument(
        "--dtype",
        default=default,
        choices=("float32", "bfloat16", "int8"),
        help="pack the weights for fast decoding, in this type; pays from a few dozen pictures on "
        f"(default: {default or 'not packed'})",
    )


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=_number(0), help="repeats exactly; without it every run differs")
    parser.add_argument("--temperature", type=_number(0.0, float), help="0 is greedy (default: the bundle's)")
    parser.add_argument(
        "--decoding",
        default="auto",
        metavar="NAME",
        help="who drafts tokens: plain, jacobi, nested, a drafter of the bundle, …; all sample the same "
        "distribution (default: the bundle's choice)",
    )
    parser.add_argument(
        "--batch-size", type=_number(1), default=64, help="how many are generated side by side (default: 64)"
    )


def _add_acceptance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--acceptance",
        default="exact",
        choices=("exact", "lantern", "grouped"),
        help="which drafted codes stand; lantern and grouped change the pictures (default: exact)",
    )
    parser.add_argument(
        "--bound", type=_number(0.0, float), metavar="B", help="of lantern: δ up to 1, λ above (default: 3)"
    )
    parser.add_argument(
        "--neighbours", type=_number(1), metavar="K", help="of lantern: per code at most (default: 1000)"
    )


def _acceptance(arguments: argparse.Namespace) -> AcceptanceConfig:
    from lexel.sample.lossy import AcceptanceConfig

    given = {"bound": arguments.bound, "neighbours": arguments.neighbours}
    options = {name: value for name, value in given.items() if value is not None}
    if options and arguments.acceptance != "lantern":
        raise LexelError(f"--{next(iter(options))} belongs to --acceptance lantern.")
    return AcceptanceConfig(arguments.acceptance, **options)


def _add_detokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--detokenizer", action="store_true", help="draw pixels with the generative decoder")
    parser.add_argument("--steps", type=_number(1), help="its solver steps (default: its own)")


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="lexel",
        description="Draw from text, describe and reconstruct pictures with discrete tokens.",
        epilog='example:\n  lexel sample "a red circle left of a blue square" --count 4 --out pictures',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lexel {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    _add_drawing_commands(commands)
    _add_draw(commands)
    _add_reconstruct(commands)
    _add_published_commands(commands)
    _add_data_commands(commands)
    return parser


def _add_drawing_commands(commands: Any) -> None:
    sample = _command(
        commands, "sample", _sample, "draw pictures of a text",
        'lexel sample "a red circle left of a blue square" --count 4 --out pictures --seed 1',
    )  # fmt: skip
    sample.add_argument("text", help="what to draw")
    sample.add_argument("--count", type=_number(1), default=4, help="how many pictures (default: 4)")
    sample.add_argument("--out", type=Path, default=Path("samples"), metavar="DIR", help="default: samples")
    sample.add_argument("--guidance", type=_number(0.0, float), help="1 is none (default: the bundle's)")
    sample.add_argument(
        "--stream", action="store_true", help="write the pictures while they are drawn, too, row by row"
    )
    sample.add_argument(
        "--inpaint", type=Path, metavar="PICTURE",
        help="draw a part of this picture anew; the text says what the whole shall show ('': anything)",
    )  # fmt: skip
    part = sample.add_mutually_exclusive_group()
    part.add_argument(
        "--mask", type=_box, metavar="X0,Y0,X1,Y1",
        help="of --inpaint: the part to draw, in pixels of the bundle's picture size",
    )  # fmt: skip
    part.add_argument(
        "--keep",
        type=_box,
        metavar="X0,Y0,X1,Y1",
        help="of --inpaint: the part to keep, around which to draw",
    )
    for add in (_add_sampling, _add_acceptance, _add_detokenizer, _add_bundle, _add_dtype, _add_json):
        add(sample)

    describe = _command(
        commands, "describe", _describe, "write what pictures show",
        "lexel describe pictures/0000.png",
    )  # fmt: skip
    describe.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE")
    for add in (_add_sampling, _add_bundle, _add_dtype, _add_json):
        add(describe)


def _add_draw(commands: Any) -> None:
    draw = _command(
        commands, "draw", _draw, "draw classes or captions with a published model",
        "lexel draw llamagen-gpt-c2i-b-256 --classes 207,360 --guidance 4 --top-k 2000 --out pictures",
    )  # fmt: skip
    draw.add_argument(
        "model", metavar="NAME_OR_DIR", help="published name (`lexel published`) or model folder"
    )
    what = draw.add_mutually_exclusive_group(required=True)
    what.add_argument("--classes", type=_labels, metavar="N,N,…", help="class labels from 0")
    what.add_argument("--captions", nargs="+", metavar="TEXT", help="what to draw, in words")
    draw.add_argument("--count", type=_number(1), default=1, help="how many pictures of each (default: 1)")
    draw.add_argument("--out", type=Path, default=Path("samples"), metavar="DIR", help="default: samples")
    files = {
        "--checkpoint": ("FILE", "local file of the published name (default: the hub's)"),
        "--config": ("JSON", "hyper-parameters that differ from the published ones"),
        "--tokenizer-checkpoint": ("FILE", "local file of the published tokenizer (default: the hub's)"),
        "--tokenizer-config": ("JSON", "its hyper-parameters that differ from the published ones"),
        "--sampling": ("JSON", "fields of SamplingConfig, such as schedule and further; they come first"),
    }
    for option, (kind, help) in files.items():
        draw.add_argument(option, type=Path, metavar=kind, help=help)
    draw.add_argument(
        "--tokenizer", metavar="NAME_OR_DIR", help="what draws the codes (default: the one they belong to)"
    )
    draw.add_argument(
        "--caption-encoder", metavar="DIR", help="T5 folder or hub id (default: google/flan-t5-xl)"
    )
    draw.add_argument("--guidance", type=_number(0.0, float), default=1.0, help="1 is none (default: 1)")
    draw.add_argument("--top-k", type=_number(0), default=0, help="most probable codes kept (default: all)")
    draw.add_argument("--top-p", type=_number(0.0, float, 1.0), default=1.0, help="of them, by probability")
    draw.add_argument("--temperature", type=_number(0.0, float), default=1.0, help="0 is greedy (default: 1)")
    draw.add_argument("--seed", type=_number(0), default=0, help="repeats exactly (default: 0)")
    draw.add_argument(
        "--decoding", default="plain", metavar="NAME", help="plain, jacobi, pac, … (default: plain)"
    )
    draw.add_argument("--batch-size", type=_number(1), default=64, help="drawn side by side (default: 64)")
    draw.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the model")
    _add_device(draw)
    _add_json(draw)


def _add_reconstruct(commands: Any) -> None:
    reconstruct = _command(
        commands, "reconstruct", _reconstruct, "send a picture through its tokens and back",
        "lexel reconstruct photo.png --out photo-tokens.png\n"
        "  lexel reconstruct photo.png --tokenizer outputs/flexible/tokenizer --tokens 1,4,16,64",
    )  # fmt: skip
    reconstruct.add_argument("picture", type=Path, metavar="PICTURE")
    reconstruct.add_argument(
        "--tokenizer",
        metavar="NAME_OR_DIR",
        help="published name, tokenizer or bundle folder, hub id, or name within --bundle "
        "(default: the bundle's own)",
    )
    reconstruct.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="local file of a published name (default: the hub's)"
    )
    reconstruct.add_argument(
        "--config", type=Path, metavar="JSON", help="hyper-parameters that differ from the published ones"
    )
    counts = reconstruct.add_mutually_exclusive_group()
    counts.add_argument("--length", type=_number(1), help="tokens to keep (flexible tokenizers only)")
    counts.add_argument(
        "--tokens",
        type=_counts,
        metavar="N,N,…",
        help="write a strip: the original, then the picture from that many tokens, for each number",
    )
    reconstruct.add_argument(
        "--out", type=Path, metavar="FILE", help="default: PICTURE-reconstructed.png, PICTURE-strip.png"
    )
    reconstruct.add_argument(
        "--seed", type=_number(0), default=0, help="of the detokenizer's noise (default: 0)"
    )
    for add in (_add_detokenizer, _add_bundle, _add_json):
        add(reconstruct)


def _add_published_commands(commands: Any) -> None:
    published = _command(
        commands, "published", _published, "list the published tokenizers and models that load by name",
        "lexel published --json",
    )  # fmt: skip
    _add_json(published)

    verify = _command(
        commands, "verify", _verify, "check a published system against its own implementation's numbers",
        "lexel verify llamagen_vq tests/golden/llamagen_vq\n"
        "  lexel verify llamagen_vq --checkpoint vq_ds16_c2i.pt --name llamagen-vq-16",
    )  # fmt: skip
    verify.add_argument("system", metavar="SYSTEM", help="e.g. llamagen_vq, titok, flextok")
    verify.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        nargs="?",
        help="recorded numbers: config.json, io.safetensors and weights",
    )
    verify.add_argument("--checkpoint", type=Path, metavar="FILE", help="try this downloaded file instead")
    verify.add_argument("--name", metavar="ROW", help="which published checkpoint it is (`lexel published`)")
    verify.add_argument(
        "--key", help="the file's copy of the weights to read, e.g. ema (default: as published)"
    )
    verify.add_argument(
        "--config", type=Path, metavar="JSON", help="hyper-parameters that differ from the published ones"
    )
    verify.add_argument(
        "--size", type=_number(1), help="side of the test pictures (default: the tokenizer's, at most 256)"
    )
    _add_json(verify)


def _add_data_commands(commands: Any) -> None:
    tokenize = _command(
        commands, "tokenize", _tokenize, "write a data set's codes, to train language models on",
        "lexel tokenize photos --out photo-codes --tokenizer outputs/photos/tokenizer --workers 2 --check",
    )  # fmt: skip
    tokenize.add_argument("data", metavar="DATA", help="folder of pictures or of .tar shards, or 'shapes'")
    tokenize.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="folder for the codes")
    tokenize.add_argument(
        "--tokenizer",
        metavar="NAME_OR_DIR",
        help="published name, tokenizer or bundle folder, or hub id (default: the shipped one)",
    )
    tokenize.add_argument("--split", choices=("all", "train", "validation"), default="all")
    tokenize.add_argument("--batch-size", type=_number(1), default=64)
    tokenize.add_argument("--workers", type=_number(0), default=0, help="processes (default: this one)")
    tokenize.add_argument("--check", action="store_true", help="afterwards encode a sample again and compare")
    tokenize.add_argument(
        "--part",
        type=_part,
        default=(0, 1),
        metavar="I/N",
        help="write every N-th shard from the I-th on (from 0): N machines fill one folder",
    )

    evaluate = _command(
        commands, "evaluate", _evaluate, "measure a bundle on held-out data",
        "lexel evaluate --bundle outputs/quickstart/bundle --count 500 --json report.json",
    )  # fmt: skip
    evaluate.add_argument(
        "--data",
        default=SHAPES,
        help="'shapes' (default: the scenes the bundle was trained on), or a folder of pictures or shards",
    )
    evaluate.add_argument("--count", type=_number(1), default=500, help="prompts of each kind (default: 500)")
    evaluate.add_argument("--seed", type=_number(0), default=0, help="default: 0")
    evaluate.add_argument("--batch-size", type=_number(1), default=64)
    evaluate.add_argument("--json", type=Path, metavar="FILE", help="write the report there ('-': print it)")
    evaluate.add_argument(
        "--card", type=Path, metavar="FILE", help="write a model card with the figures there"
    )

    matrix = _command(
        commands, "matrix", _matrix, "measure every modality of a bundle against every other",
        "lexel matrix --bundle outputs/any_to_any/bundle --count 64 --out outputs/any_to_any",
    )  # fmt: skip
    matrix.add_argument("--count", type=_number(2), default=64, help="held-out scenes (default: 64)")
    matrix.add_argument("--pairs", nargs="+", metavar="PAIR", help="such as text_to_image (default: all)")
    matrix.add_argument("--seed", type=_number(0), default=0, help="default: 0")
    matrix.add_argument("--batch-size", type=_number(1), default=64)
    matrix.add_argument("--out", type=Path, metavar="DIR", help="write matrix.json, .txt and .html there")
    demo = _command(
        commands, "demo", _demo, "open the browser demo (needs the extra: pip install 'lexel[demo]')",
        "lexel demo --port 7860",
    )  # fmt: skip
    demo.add_argument("--port", type=_number(1, int, 65535), default=7860, help="default: 7860")
    for command in (evaluate, matrix, demo):
        _add_bundle(command)
    _add_dtype(demo, "float32")
    _add_device(tokenize)
    _add_json(tokenize)


# Commands


def _device(name: str) -> Any:
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


def _load(arguments: argparse.Namespace) -> Pipeline:
    from lexel.sample.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(arguments.bundle).to(_device(arguments.device))
    return pipe.pack(getattr(arguments, "dtype", None))


def _save_picture(pixels: Any, path: Path) -> None:
    """Write pixels as a PNG, whole or not at all."""
    from lexel.data.images import to_image

    _write_png(to_image(pixels), path)


def _write_png(picture: Any, path: Path) -> None:
    from lexel.hub import write_atomically

    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def _show(arguments: argparse.Namespace, values: dict[str, Any], text: str) -> None:
    print(json.dumps(values, indent=2, ensure_ascii=False) if arguments.json else text)


def _sample(arguments: argparse.Namespace) -> None:
    from lexel.document import Document, Image, Text

    pipe = _load(arguments)
    paths = [arguments.out / f"{number:04d}.png" for number in range(arguments.count)]
    if arguments.inpaint is not None or arguments.mask or arguments.keep:
        output = _completed(pipe, arguments)
    else:
        document: Document = [Text(arguments.text), Image.blank()]
        partials = pipe.stream(
            document,
            decoding=arguments.decoding,
            acceptance=_acceptance(arguments),
            **_drawing_options(arguments),
        )
        output = _watched(partials, paths) if arguments.stream else partials.wait()
    for path, document in zip(paths, output.documents):
        _save_picture(document[-1].pixels, path)  # type: ignore[union-attr]
    stats = {
        "mean_accepted": output.stats.mean_accepted,
        "target_forwards": output.stats.target_forwards,
        "seconds": output.stats.seconds,
    }
    values = {"text": arguments.text, "seed": arguments.seed, "pictures": [str(p) for p in paths], **stats}
    _show(arguments, values, "\n".join(str(path) for path in paths))


def _drawing_options(arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("count", "seed", "temperature", "guidance", "detokenizer", "steps", "batch_size")
    return {name: getattr(arguments, name) for name in names}


def _completed(pipe: Pipeline, arguments: argparse.Namespace) -> GenerationOutput:
    """The pictures of --inpaint. Raises LexelError for options that make no sense together."""
    from lexel.sample.completion import cells_outside

    box = arguments.mask or arguments.keep
    if arguments.inpaint is None or box is None:
        raise LexelError("--inpaint PICTURE and one of --mask and --keep belong together.")
    if arguments.stream or arguments.acceptance != "exact":
        raise LexelError("--inpaint draws without --stream and with --acceptance exact.")
    keep = cells_outside(box, pipe.codec.layouts["image"], pipe.tokenizer.image_size)
    return pipe.complete(
        pipe.read_picture(arguments.inpaint),
        ~keep if arguments.keep else keep,
        caption=arguments.text or None,
        decoding="plain" if arguments.decoding == "auto" else arguments.decoding,
        **_drawing_options(arguments),
    )


def _draw(arguments: argparse.Namespace) -> None:
    from lexel.hub import decode_config
    from lexel.sample.bundle import read_json
    from lexel.sample.conditional import draw
    from lexel.sample.logits import SamplingConfig
    from lexel.sample.strategies import make_drafter, strategies

    settings = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p", "guidance")}
    if arguments.sampling:
        settings |= read_json(arguments.sampling)
    device = _device(arguments.device)
    lm, tokenizer = (network.to(device) for network in _conditional_model(arguments))
    what = list(arguments.captions or arguments.classes)
    conditions: list[Any] = what
    if arguments.captions:
        from lexel.models.caption_encoder import FLAN_T5_XL, CaptionEncoder

        encoder = CaptionEncoder.from_pretrained(arguments.caption_encoder or FLAN_T5_XL)
        conditions = encoder.to(device).encode(what)
    codes = draw(
        lm,
        [condition for condition in conditions for _ in range(arguments.count)],
        sampling=decode_config(SamplingConfig, settings),
        seed=arguments.seed,
        drafter=make_drafter(strategies(lm, {}), lm, arguments.decoding, None),
        rows=arguments.batch_size,
    )
    paths = [arguments.out / f"{number:04d}.png" for number in range(len(codes))]
    for number, path in enumerate(paths):
        _save_picture(tokenizer.decode(codes[number : number + 1].to(device))[0].clamp(-1, 1).cpu(), path)
    shown = [what[number // arguments.count] for number in range(len(paths))]
    values = [{"picture": str(path), "of": one} for path, one in zip(paths, shown)]
    _show(arguments, {"seed": arguments.seed, "pictures": values}, "\n".join(map(str, paths)))


def _conditional_model(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The model to draw with and the tokenizer of its codes. Raises LexelError when they do not fit."""
    import torch

    from lexel.models import find_published, load_published
    from lexel.models.raster_lm import RasterLM
    from lexel.sample.bundle import load_tokenizer_of, read_json

    config = read_json(arguments.config) if arguments.config else None
    tokenizer_config = read_json(arguments.tokenizer_config) if arguments.tokenizer_config else {}
    name = arguments.tokenizer
    if Path(arguments.model).is_dir():
        lm: Any = RasterLM.from_pretrained(arguments.model)
    else:
        lm = load_published(arguments.model, arguments.checkpoint, config)
        row = find_published(arguments.model)[1]
        if name is None:
            name, tokenizer_config = row.tokenizer, {**row.tokenizer_arguments, **tokenizer_config}
    if not isinstance(lm, RasterLM):
        raise LexelError(f"{arguments.model} is no class- or caption-conditional model.")
    given = "caption" if arguments.captions else "class"
    if lm.config.condition != given:
        raise LexelError(f"{arguments.model} draws from a {lm.config.condition} condition, not a {given}.")
    if not name:
        raise LexelError(f"--tokenizer: name the tokenizer whose codes {arguments.model} was trained on.")
    tokenizer = load_tokenizer_of(
        name,
        checkpoint=arguments.tokenizer_checkpoint,
        config=tokenizer_config or None,
    )
    if tuple(tokenizer.layout.codebook_sizes) != lm.config.codebook_sizes:
        raise LexelError(
            f"{arguments.model} draws codes of {lm.config.codebook_sizes}, {name} has "
            f"{tuple(tokenizer.layout.codebook_sizes)}; use the tokenizer that it was trained with."
        )
    return lm.to(getattr(torch, arguments.dtype)), tokenizer


def _watched(partials: Partials, paths: Sequence[Path]) -> GenerationOutput:
    """The result; on the way the pictures are written as far as they are drawn, and counted on stderr."""
    drawn: dict[int, Partial] = {}
    try:
        for partial in partials:
            drawn[partial.row] = partial
            _save_picture(partial.segment.pixels, paths[partial.row])  # type: ignore[union-attr]
            tokens, done = sum(p.tokens for p in drawn.values()), sum(p.done for p in drawn.values())
            print(f"\r{done} of {len(paths)} pictures, {tokens} tokens", end="", file=sys.stderr, flush=True)
    finally:
        print(file=sys.stderr)
    assert partials.output is not None
    return partials.output


def _describe(arguments: argparse.Namespace) -> None:
    from lexel.document import Document, Image, Text

    pipe = _load(arguments)
    documents: list[Document] = [
        [Image(pixels=pipe.read_picture(path)), Text.blank()] for path in arguments.pictures
    ]
    output = pipe.generate(
        documents,
        seed=arguments.seed,
        temperature=arguments.temperature,
        decoding=arguments.decoding,
        batch_size=arguments.batch_size,
    )
    captions = [pipe.caption(document) for document in output.documents]
    names = [str(path) for path in arguments.pictures]
    values = {"captions": [{"picture": name, "text": text} for name, text in zip(names, captions)]}
    one = len(names) == 1
    _show(arguments, values, captions[0] if one else "\n".join(f"{n}: {c}" for n, c in zip(names, captions)))


def _reconstruct(arguments: argparse.Namespace) -> None:
    from lexel.data.images import read_pixels
    from lexel.evaluate.metrics import psnr
    from lexel.sample.reconstruct import picture_strip, reconstruct, token_count

    tokenizer, decode = _tokenizer_and_decoder(arguments)
    pixels = read_pixels(arguments.picture, tokenizer.image_size)
    shown = []
    for count in arguments.tokens or [arguments.length]:
        picture, codes = reconstruct(tokenizer, pixels, count, decode)
        shown.append((picture, token_count(codes), float(psnr(picture[None], pixels[None])[0])))
    kind = "strip" if arguments.tokens else "reconstructed"
    path = arguments.out or arguments.picture.with_name(f"{arguments.picture.stem}-{kind}.png")
    results = [{"tokens": tokens, "psnr": decibels} for _, tokens, decibels in shown]
    lines = [f"{tokens} token{'s' * (tokens != 1)}, {decibels:.1f} dB" for _, tokens, decibels in shown]
    if arguments.tokens:
        labels = ["original", *(line.replace(", ", "\n") for line in lines)]
        _write_png(picture_strip([pixels, *(picture for picture, _, _ in shown)], labels), path)
        values = {"strip": str(path), "reconstructions": results}
        _show(arguments, values, "\n".join([f"{path}:", *lines]))
    else:
        _save_picture(shown[0][0], path)
        _show(arguments, {"picture": str(path), **results[0]}, f"{path}: {lines[0]}")


def _tokenizer_and_decoder(arguments: argparse.Namespace) -> tuple[Tokenizer, Callable[[Codes], Any] | None]:
    """The tokenizer that is asked for, and the bundle's generative decoder where that is."""
    import torch

    from lexel.sample.bundle import load_tokenizer_of, read_json

    device = _device(arguments.device)
    if not arguments.detokenizer:
        tokenizer = load_tokenizer_of(
            arguments.tokenizer,
            bundle=arguments.bundle,
            checkpoint=arguments.checkpoint,
            config=read_json(arguments.config) if arguments.config else None,
        )
        return tokenizer.to(device), None
    if arguments.tokenizer or arguments.checkpoint:
        raise LexelError("--detokenizer knows the bundle's own tokenizer only; leave --tokenizer out.")
    pipe = _load(arguments)

    def decode(codes: Codes) -> Any:
        generator = torch.Generator(device).manual_seed(arguments.seed)
        return pipe.decode(codes, detokenizer=True, steps=arguments.steps, generator=generator)

    return pipe.tokenizer, decode


def data_config(name: str, size: tuple[int, int]) -> Any:
    """The data source config that DATA on the command line means, at a picture size (h, w).
    Raises LexelError for a folder that does not exist or holds nothing."""
    if name == SHAPES:
        from lexel.data.shapes import ShapesConfig

        return ShapesConfig(size=size[0])
    from lexel.data import FolderConfig, ShardsConfig
    from lexel.data.store import is_url

    if is_url(name):
        return ShardsConfig(root=name, size=size)
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise LexelError(f"data folder {name} does not exist; give a folder, or 'shapes'.")
    shards = next(folder.rglob("*.tar"), None) is not None
    return (ShardsConfig if shards else FolderConfig)(root=str(folder), size=size)


def _tokenize(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict, replace

    from lexel.data.tokenized import check_codes, write_codes
    from lexel.sample.bundle import load_tokenizer_of

    tokenizer = load_tokenizer_of(arguments.tokenizer)
    config = data_config(arguments.data, tokenizer.image_size)
    if arguments.split == "all" and arguments.data != SHAPES:
        config = replace(config, validation_share=0.0)
    split = "train" if arguments.split == "all" else arguments.split
    dataset = config.build(split)
    missing = write_codes(
        tokenizer,
        dataset,
        arguments.out,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        device=_device(arguments.device),
        progress=sys.stderr.isatty(),
        source={"data": arguments.data, "split": split, **asdict(config)},
        part=arguments.part,
    )
    values: dict[str, Any] = {
        "folder": str(arguments.out),
        "pictures": len(dataset),
        "missing_shards": missing,
    }
    text = f"{arguments.out}: codes of {len(dataset)} pictures"
    if missing:
        text = f"{arguments.out}: this part is written; {missing} shards of other parts are still missing"
    elif arguments.check:
        check = check_codes(arguments.out, tokenizer, dataset)
        values["check"] = {**asdict(check), "passed": check.passed}
        text += f"; {check.agreement:.1%} of {check.samples} pictures' codes agree, {check.psnr:.1f} dB"
        if not check.passed:
            raise LexelError(
                f"{arguments.out}: only {check.agreement:.1%} of the stored codes are what the tokenizer "
                "writes now; delete the folder and tokenize again."
            )
    _show(arguments, values, text)


def _evaluate(arguments: argparse.Namespace) -> None:
    from lexel.evaluate.card import figures_table, model_card
    from lexel.evaluate.evaluate import evaluate_bundle
    from lexel.sample.bundle import write_json, write_text

    pipe = _load(arguments)
    report = evaluate_bundle(
        pipe,
        pipe.scenes
        if arguments.data == SHAPES and pipe.scenes is not None
        else data_config(arguments.data, pipe.tokenizer.image_size),
        count=arguments.count,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        progress=sys.stderr.isatty(),
    )
    if arguments.card is not None:
        write_text(arguments.card, model_card(pipe, report))
    if str(arguments.json) == "-":
        print(json.dumps(report, indent=2))
        return
    if arguments.json is not None:
        write_json(arguments.json, report)
    print(figures_table(report))


def _matrix(arguments: argparse.Namespace) -> None:
    from lexel.data.any_to_any import parse_pair
    from lexel.evaluate.matrix import matrix_text, measure_matrix, write_matrix

    pipe = _load(arguments)
    if pipe.scenes is None:
        raise LexelError("the matrix needs a bundle that was trained on procedural scenes (data=shapes).")
    found = measure_matrix(
        pipe,
        pipe.scenes,
        pairs=[parse_pair(pair) for pair in arguments.pairs] if arguments.pairs else None,
        count=arguments.count,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )
    if arguments.out is not None:
        write_matrix(arguments.out, found, pipe)
    print(matrix_text(found.report))


def _published(arguments: argparse.Namespace) -> None:
    from dataclasses import asdict

    from lexel import models, tokenizers

    found = {"tokenizers": tokenizers.list_published(), "models": models.list_published()}
    tables = [
        tokenizers.published_table(found["tokenizers"]),
        models.published_table(found["models"]),
    ]
    _show(
        arguments, {kind: [asdict(row) for row in rows] for kind, rows in found.items()}, "\n\n".join(tables)
    )


def _verify(arguments: argparse.Namespace) -> int:
    from lexel.sample.bundle import read_json
    from lexel.verify import verify, verify_checkpoint

    options = (arguments.name, arguments.key, arguments.config, arguments.size)
    if (arguments.folder is None) == (arguments.checkpoint is None):
        raise LexelError("give either a FOLDER of recorded numbers or --checkpoint FILE.")
    if arguments.folder is not None and any(options):
        raise LexelError("--name, --key, --config and --size belong to --checkpoint.")
    report: Any
    if arguments.folder is not None:
        report = verify(arguments.system, arguments.folder)
    else:
        config = read_json(arguments.config) if arguments.config else None
        report = verify_checkpoint(
            arguments.system, arguments.checkpoint, arguments.name, config, arguments.key, arguments.size
        )
    _show(arguments, report.as_dict(), report.table())
    return 0 if report.passed else 1


def _demo(arguments: argparse.Namespace) -> None:
    try:
        from lexel.sample.demo import build_demo
    except ModuleNotFoundError as error:
        raise LexelError(
            f"the demo needs {error.name}; install it with: pip install 'lexel[demo]'."
        ) from None
    build_demo(_load(arguments)).launch(server_name="127.0.0.1", server_port=arguments.port, share=False)


if __name__ == "__main__":
    sys.exit(main())
