"""The browser demo: draw, describe, reconstruct, and see the tokens. The only module that imports gradio.

h w picture · r c table of codes
"""

from __future__ import annotations

from typing import Any

import gradio as gr
import torch
from PIL import Image as PictureFile
from torch import Tensor

from lexel.data.images import to_image
from lexel.document import Image, Text
from lexel.errors import LexelError
from lexel.sample.pipeline import Pipeline, code_map
from lexel.types import Codes, GenerationOutput

SIDE = 256
"""Pictures smaller than this are shown enlarged, pixel by pixel."""

MOST_PICTURES = 16
EXAMPLES = (
    "a red circle",
    "a large yellow star",
    "a blue triangle left of a green square",
    "a purple ring above an orange heart",
)


def enlarged(picture: PictureFile.Image) -> PictureFile.Image:
    """The picture with every pixel repeated until its longer side is about `SIDE`."""
    factor = max(1, SIDE // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), PictureFile.Resampling.NEAREST)


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
            _reconstruct_tab(actions)
    return demo


class _Actions:
    """What the buttons do; errors of the user's come up as a message in the page."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.image_sampling = pipeline.sampling["image"]
        self.strategies = list(pipeline.strategies)
        self.has_detokenizer = pipeline.detokenizer is not None

    def draw(
        self,
        text: str,
        count: float,
        seed: float,
        temperature: float,
        guidance: float,
        decoding: str,
        detokenizer: bool,
    ) -> tuple[list[PictureFile.Image], PictureFile.Image, str]:
        """Pictures of a text, the first one's tokens, and the statistics line."""
        if not text.strip():
            raise gr.Error("Write what to draw first.")
        output = self._run(
            [Text(text.strip()), Image.blank()],
            count=int(count),
            seed=int(seed),
            temperature=temperature,
            guidance=guidance,
            decoding=decoding,
            detokenizer=bool(detokenizer),
        )
        drawn = [document[-1] for document in output.documents]
        pictures = [_shown(image.pixels) for image in drawn if isinstance(image, Image)]
        codes = [image.codes for image in drawn if isinstance(image, Image)]
        return pictures, self._tokens(codes[0]), statistics(output)

    def describe(
        self, picture: PictureFile.Image | None, seed: float, temperature: float, decoding: str
    ) -> tuple[str, PictureFile.Image, str]:
        """The caption of a picture, the picture's tokens, and the statistics line."""
        codes = self.pipeline.encode(self._read(picture)[None]).to("cpu")
        document = [Image(codes=codes), Text.blank()]
        output = self._run(document, seed=int(seed), temperature=temperature, decoding=decoding)
        return self.pipeline.caption(output.documents[0]), self._tokens(codes), statistics(output)

    def reconstruct(
        self, picture: PictureFile.Image | None, length: float | None, detokenizer: bool
    ) -> tuple[PictureFile.Image, PictureFile.Image, PictureFile.Image]:
        """A picture as the model sees it, through `length` tokens and back, and the tokens."""
        pixels = self._read(picture)
        tokens = int(length) if length is not None and self.pipeline.tokenizer.layout.flexible else None
        generator = torch.Generator(self.pipeline.device).manual_seed(0)
        try:
            codes = self.pipeline.encode(pixels[None], tokens)
            rebuilt = self.pipeline.decode(codes, detokenizer=bool(detokenizer), generator=generator)[0]
        except LexelError as error:
            raise gr.Error(str(error)) from None
        return _shown(pixels), _shown(rebuilt), self._tokens(codes.to("cpu"))

    def _read(self, picture: PictureFile.Image | None) -> Tensor:
        if picture is None:
            raise gr.Error("Choose a picture first.")
        return self.pipeline.read_picture(picture)

    def _run(self, document: list[Any], **options: Any) -> GenerationOutput:
        try:
            return self.pipeline(document, **options)
        except (LexelError, ValueError) as error:
            raise gr.Error(str(error)) from None

    def _tokens(self, codes: Codes | None) -> PictureFile.Image:
        assert codes is not None
        return tokens_picture(codes, self.pipeline.tokenizer.layout.codebook_sizes)


def _shown(pixels: Tensor | None) -> PictureFile.Image:
    assert pixels is not None
    return enlarged(to_image(pixels))


def _sampling_inputs(actions: _Actions, temperature: float) -> tuple[gr.Number, gr.Slider, gr.Dropdown]:
    seed = gr.Number(0, label="Seed", precision=0, minimum=0)
    slider = gr.Slider(0.0, 2.0, temperature, step=0.05, label="Temperature (0: greedy)")
    default = actions.pipeline.decoding.strategy
    return seed, slider, gr.Dropdown(actions.strategies, value=default, label="Decoding strategy")


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
            tokens = gr.Image(label="Tokens of the first picture", format="png", height=SIDE)
    inputs = [text, count, seed, temperature, guidance, decoding, detokenizer]
    outputs = [gallery, tokens, line]
    gr.on([button.click, text.submit], actions.draw, inputs, outputs, api_name="draw")


def _describe_tab(actions: _Actions) -> None:
    with gr.Row():
        with gr.Column():
            picture = gr.Image(type="pil", label="Picture", format="png", image_mode="RGB")
            text_temperature = actions.pipeline.sampling["text"].temperature
            seed, temperature, decoding = _sampling_inputs(actions, text_temperature)
            button = gr.Button("Describe", variant="primary")
        with gr.Column():
            caption = gr.Textbox(label="The picture shows", interactive=False)
            line = gr.Textbox(label="Decoding", interactive=False)
            tokens = gr.Image(label="Tokens of the picture", format="png", height=SIDE)
    button.click(
        actions.describe, [picture, seed, temperature, decoding], [caption, tokens, line], api_name="describe"
    )


def _reconstruct_tab(actions: _Actions) -> None:
    layout = actions.pipeline.tokenizer.layout
    with gr.Row():
        with gr.Column():
            picture = gr.Image(type="pil", label="Picture", format="png", image_mode="RGB")
            length = gr.Slider(
                1, layout.positions, layout.positions, step=1, label="Tokens", visible=layout.flexible
            )
            detokenizer = gr.Checkbox(label="Generative decoder", visible=actions.has_detokenizer)
            button = gr.Button("Reconstruct", variant="primary")
        with gr.Column():
            with gr.Row():
                seen = gr.Image(label="At the model's size", format="png", height=SIDE)
                rebuilt = gr.Image(label="Through the tokens and back", format="png", height=SIDE)
            tokens = gr.Image(label="Tokens", format="png", height=SIDE)
    inputs, outputs = [picture, length, detokenizer], [seen, rebuilt, tokens]
    # Without a length to choose, the hidden slider's release never fires.
    gr.on([button.click, length.release], actions.reconstruct, inputs, outputs, api_name="reconstruct")
