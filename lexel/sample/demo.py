"""The browser demo: draw, describe, reconstruct, and see the tokens. The only module that imports gradio.

h w picture · r c table of codes
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import gradio as gr
import torch
from PIL import Image as PictureFile
from torch import Tensor

from lexel.data.images import to_image, to_pixels
from lexel.document import Document, Image, Text
from lexel.errors import LexelError
from lexel.sample.codes import code_map
from lexel.sample.engine import AUTO
from lexel.sample.partial import Partials
from lexel.sample.pipeline import Pipeline
from lexel.sample.reconstruct import SIDE, enlarged, reconstruct
from lexel.tokenizers.base import Tokenizer
from lexel.types import Codes, GenerationOutput

OWN = "the language model's own"
"""What the bundle's main tokenizer is called among several."""

FRAME = SIDE + 64
"""Height of a frame, so that its label lies above the picture, not on it."""

STYLE = "<style>.given img {width: 100% !important; object-fit: contain !important}</style>"
"""Small pictures fill their frame, too."""

MOST_PICTURES = 16

PAUSE = 0.15
"""Seconds between two views of pictures that are being drawn."""

VISITORS = 16
"""Requests of one kind that are served at the same time; they share the rounds of the model."""

Drawn = tuple[list[PictureFile.Image], PictureFile.Image | None, str]

EXAMPLES = (
    "a red circle",
    "a large yellow star",
    "a blue triangle left of a green square",
    "a purple ring above an orange heart",
)


def tokens_picture(codes: Codes, sizes: tuple[int, ...]) -> PictureFile.Image:
    """The codes of one picture as colours: equal codes have equal colours, unused places are grey.
    sizes: codes per codebook; the codebooks lie below each other."""
    table = code_map(codes)
    rows = len(table) // len(sizes)
    size = torch.tensor(sizes).repeat_interleave(rows)[:, None]
    # Steps of the golden angle: neighbouring indices get unlike colours.
    hue = (table * 0.618034) % 1.0
    light = 0.35 + 0.5 * table / size
    channels = [
        light + (1 - light) * 0.45 * torch.cos(2 * torch.pi * (hue - shift)) for shift in (0, 1 / 3, 2 / 3)
    ]
    colors = torch.stack(channels, dim=2).clamp(0, 1)
    colors[table < 0] = 0.5
    return enlarged(PictureFile.fromarray((colors * 255).round().to(torch.uint8).numpy()))


def statistics(output: GenerationOutput) -> str:
    """One line on a generation: tokens per target pass and items per second."""
    stats, count = output.stats, len(output.documents)
    rate = count / stats.seconds if stats.seconds > 0 else float("inf")
    return (
        f"{stats.mean_accepted:.2f} tokens accepted per step, {stats.target_forwards} passes of the model "
        f"(and {stats.draft_forwards} of the drafter), {stats.seconds:.2f} s, {rate:.1f} per second"
    )


def build_demo(pipeline: Pipeline) -> gr.Blocks:
    """The demo of one pipeline; call `launch` on it. Endpoints: /draw, /describe, /reconstruct."""
    actions = _Actions(pipeline)
    with gr.Blocks(analytics_enabled=False, title="Lexel") as demo:
        gr.Markdown("# Lexel\nPictures and text as one sequence of discrete tokens.")
        with gr.Tab("Draw"):
            _draw_tab(actions)
        with gr.Tab("Describe"):
            _describe_tab(actions)
        with gr.Tab("Reconstruct"):
            _reconstruct_tab(actions, demo)
        gr.HTML(STYLE, padding=False)
    return demo


class _Actions:
    """What the buttons do; errors of the user's come up as a message in the page."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.image_sampling = pipeline.sampling["image"]
        self.strategies = [AUTO, *pipeline.strategies]
        self.has_detokenizer = pipeline.detokenizer is not None
        further = {name: one for name, one in pipeline.tokenizers.items() if one.has_decoder}
        self.tokenizers: dict[str, Tokenizer] = {OWN: pipeline.tokenizer, **further}

    def draw(
        self,
        text: str,
        count: float,
        seed: float,
        temperature: float,
        guidance: float,
        decoding: str,
        detokenizer: bool,
    ) -> Iterator[Drawn]:
        """Pictures of a text, the first one's tokens, and the statistics line: while they are drawn, too."""
        if not text.strip():
            raise gr.Error("Write what to draw first.")
        document: Document = [Text(text.strip()), Image.blank()]
        with _told():
            partials = self.pipeline.stream(
                document,
                count=int(count),
                seed=int(seed),
                temperature=temperature,
                guidance=guidance,
                decoding=decoding,
                detokenizer=bool(detokenizer),
            )
            # A page that is closed closes this generator, which cancels what is not drawn.
            with closing(partials):
                yield from self._drawn(partials, int(count))

    def _drawn(self, partials: Partials, count: int) -> Iterator[Drawn]:
        pictures = [_shown(torch.zeros(3, *self.pipeline.tokenizer.image_size))] * count
        tokens, counts, last, shown = None, [0] * count, -1, time.monotonic()
        for partial in partials:
            if partial.row <= last and time.monotonic() > shown + PAUSE:  # all are as far as they can be
                shown = time.monotonic()
                yield list(pictures), tokens, f"{sum(counts)} tokens so far"
            assert isinstance(partial.segment, Image)
            last, pictures[partial.row] = partial.row, _shown(partial.segment.pixels)
            counts[partial.row] = partial.tokens
            if partial.row == 0 and partial.segment.codes is not None:
                tokens = self._tokens(partial.segment.codes)
        assert partials.output is not None
        yield pictures, tokens, statistics(partials.output)

    def describe(
        self, picture: PictureFile.Image | None, seed: float, temperature: float, decoding: str
    ) -> tuple[str, PictureFile.Image, str]:
        """The caption of a picture, the picture's tokens, and the statistics line."""
        codes = self.pipeline.encode(self._read(picture)[None]).to("cpu")
        document: Document = [Image(codes=codes), Text.blank()]
        with _told():
            output = self.pipeline(document, seed=int(seed), temperature=temperature, decoding=decoding)
        return self.pipeline.caption(output.documents[0]), self._tokens(codes), statistics(output)

    def reconstruct(
        self,
        picture: PictureFile.Image | None,
        length: float | None,
        detokenizer: bool,
        name: str = OWN,
    ) -> tuple[PictureFile.Image, PictureFile.Image, PictureFile.Image]:
        """A picture as the tokenizer `name` sees it, through `length` tokens and back, and the tokens."""
        tokenizer = self.tokenizers[name]
        pixels = self._read(picture, tokenizer)
        tokens = int(length) if length is not None and tokenizer.layout.flexible else None
        decode = self._detokenize if detokenizer and name == OWN else None
        with _told():
            rebuilt, codes = reconstruct(tokenizer, pixels, tokens, decode)
        return _shown(pixels), _shown(rebuilt), tokens_picture(codes, tokenizer.layout.codebook_sizes)

    def choose(self, name: str) -> tuple[gr.Slider, gr.Checkbox]:
        """The number of tokens and the generative decoder, as far as a tokenizer has them."""
        layout = self.tokenizers[name].layout
        length = gr.Slider(value=layout.positions, maximum=layout.positions, visible=layout.flexible)
        return length, gr.Checkbox(visible=name == OWN and self.has_detokenizer)

    def _detokenize(self, codes: Codes) -> Tensor:
        generator = torch.Generator(self.pipeline.device).manual_seed(0)
        return self.pipeline.decode(codes, detokenizer=True, generator=generator)

    def _read(self, picture: PictureFile.Image | None, tokenizer: Tokenizer | None = None) -> Tensor:
        if picture is None:
            raise gr.Error("Choose a picture first.")
        return to_pixels(picture.convert("RGB"), (tokenizer or self.pipeline.tokenizer).image_size)

    def _tokens(self, codes: Codes) -> PictureFile.Image:
        return tokens_picture(codes, self.pipeline.tokenizer.layout.codebook_sizes)


@contextmanager
def _told() -> Iterator[None]:
    """Errors of the user's become a message in the page."""
    try:
        yield
    except (LexelError, ValueError) as error:
        raise gr.Error(str(error)) from None


def _shown(pixels: Tensor | None) -> PictureFile.Image:
    assert pixels is not None
    return enlarged(to_image(pixels))


def _picture_input() -> gr.Image:
    return gr.Image(
        type="pil", label="Picture", format="png", image_mode="RGB", height=FRAME, elem_classes="given"
    )


def _sampling_inputs(actions: _Actions, temperature: float) -> tuple[gr.Number, gr.Slider, gr.Dropdown]:
    seed = gr.Number(0, label="Seed", precision=0, minimum=0)
    slider = gr.Slider(0.0, 2.0, temperature, step=0.05, label="Temperature (0: greedy)")
    return seed, slider, gr.Dropdown(actions.strategies, value=AUTO, label="Decoding strategy")


def _draw_tab(actions: _Actions) -> None:
    with gr.Row():
        with gr.Column():
            text = gr.Textbox(EXAMPLES[2], label="Draw")
            gr.Examples([[example] for example in EXAMPLES], text)
            count = gr.Slider(1, MOST_PICTURES, 4, step=1, label="Pictures")
            seed, temperature, decoding = _sampling_inputs(actions, actions.image_sampling.temperature)
            guidance = gr.Slider(
                0.0, 8.0, actions.image_sampling.guidance, step=0.1, label="Guidance (1: none)"
            )
            detokenizer = gr.Checkbox(label="Generative decoder", visible=actions.has_detokenizer)
            button = gr.Button("Draw", variant="primary")
        with gr.Column():
            gallery = gr.Gallery(label="Pictures", format="png", columns=4, height=300)
            line = gr.Textbox(label="Decoding", interactive=False)
            tokens = gr.Image(label="Tokens of the first picture", format="png", height=FRAME)
    inputs = [text, count, seed, temperature, guidance, decoding, detokenizer]
    outputs = [gallery, tokens, line]
    gr.on(
        [button.click, text.submit],
        actions.draw,
        inputs,
        outputs,
        api_name="draw",
        concurrency_limit=VISITORS,
    )


def _describe_tab(actions: _Actions) -> None:
    with gr.Row():
        with gr.Column():
            picture = _picture_input()
            text_temperature = actions.pipeline.sampling["text"].temperature
            seed, temperature, decoding = _sampling_inputs(actions, text_temperature)
            button = gr.Button("Describe", variant="primary")
        with gr.Column():
            caption = gr.Textbox(label="The picture shows", interactive=False)
            line = gr.Textbox(label="Decoding", interactive=False)
            tokens = gr.Image(label="Tokens of the picture", format="png", height=FRAME)
    button.click(
        actions.describe,
        [picture, seed, temperature, decoding],
        [caption, tokens, line],
        api_name="describe",
        concurrency_limit=VISITORS,
    )


def _reconstruct_tab(actions: _Actions, demo: gr.Blocks) -> None:
    layouts = [tokenizer.layout for tokenizer in actions.tokenizers.values()]
    own, several = layouts[0], len(layouts) > 1
    with gr.Row():
        with gr.Column():
            picture = _picture_input()
            name = gr.Dropdown(list(actions.tokenizers), value=OWN, label="Tokenizer", visible=several)
            # Up to the longest of all, so that programs can ask for it; `choose` cuts the page's slider.
            most = max(layout.positions for layout in layouts)
            length = gr.Slider(1, most, own.positions, step=1, label="Tokens", visible=own.flexible)
            detokenizer = gr.Checkbox(label="Generative decoder", visible=actions.has_detokenizer)
            button = gr.Button("Reconstruct", variant="primary")
        with gr.Column():
            with gr.Row():
                seen = gr.Image(label="As the tokenizer sees it", format="png", height=FRAME)
                rebuilt = gr.Image(label="Through the tokens and back", format="png", height=FRAME)
            tokens = gr.Image(label="Tokens", format="png", height=FRAME)
    inputs, outputs = [picture, length, detokenizer, name], [seen, rebuilt, tokens]
    # Without a length to choose, the hidden slider's release never fires.
    gr.on([button.click, length.release], actions.reconstruct, inputs, outputs, api_name="reconstruct")
    if several:
        gr.on([name.change, demo.load], actions.choose, name, [length, detokenizer])
