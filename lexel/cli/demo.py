"""`lexel demo`: the browser demo."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lexel.cli.arguments import add_bundle, add_command, add_dtype, at_least, find_device, load_pipeline
from lexel.errors import LexelError


def add(commands: Any) -> None:
    """The command's arguments."""
    demo = add_command(
        commands, "demo", _run, "open the browser demo (needs the extra: pip install 'lexel[demo]')",
        "lexel demo --port 7860\n  lexel demo --tokenizer mimi open-magvit2-video",
    )  # fmt: skip
    demo.add_argument("--port", type=at_least(1, int, 65535), default=7860, help="default: 7860")
    demo.add_argument(
        "--tokenizer",
        nargs="+",
        default=[],
        metavar="NAME_OR_DIR",
        help="further tokenizers, of pictures, clips or sounds, to reconstruct with: published names, "
        "folders or hub ids",
    )
    add_bundle(demo)
    add_dtype(demo, "float32")


def _run(arguments: argparse.Namespace) -> None:
    try:
        from lexel.sample.demo import build_demo
    except ModuleNotFoundError as error:
        raise LexelError(
            f"the demo needs {error.name}; install it with: pip install 'lexel[demo]'."
        ) from None
    from lexel.sample.bundle import load_tokenizer_of

    device = find_device(arguments.device)
    further = {
        Path(name).name: load_tokenizer_of(name, bundle=arguments.bundle).to(device)
        for name in arguments.tokenizer
    }
    demo = build_demo(load_pipeline(arguments), further)
    demo.launch(server_name="127.0.0.1", server_port=arguments.port, share=False)
