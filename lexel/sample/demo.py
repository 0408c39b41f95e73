"""The browser demo: draw, describe, reconstruct, and see the tokens. The only module that imports gradio.

h w picture · r c table of codes
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

import gradio as gr
import numpy as np
import torch
from PIL import Image as PictureFile
from torch import Tensor

from lexel.data.images import to_image, to_pixels
from lexel.data.media import clip_rate, read_clip, read_wave, write_clip
from lexel.document import Document, Image, Text
from lexel.errors import LexelError
from lexel.sample.codes import code_map
from lexel.sample.engine import AUTO
from lexel.sample.partial import Partials
from lexel.sample.pipeline import Pipeline
from lexel.sample.reconstruct import (
    SIDE,
    check_draws,
    drawer,
    enlarged,
    reconstruct,
    reconstruct_clip,
    reconstruct_sound,
)
from lexel.tokenizers.base import Tokenizer, VideoTokenizer
from lexel.tokenizers.sound import SoundTokenizer
from lexel.types import Codes, GenerationOutput

OWN = "the language model's own"
"""What the bundle's main tokenizer is called among several."""

FRAME = SIDE + 64
"""Height of a frame, so that its label lies above the picture, not on it."""

STYLE = "<style>.given img {width: 100% !important; object-fit: contain !important}</style>"
"""Small pictures fill their frame, too."""

MOST_PICTURES = 16

MOST_FRAMES, MOST_STEPS = 64, 50

PAUSE = 0.15
"""Seconds between two views of pictures that are being drawn."""

VISITORS = 16
"""Requests of one kind that are served at the same time; they share the rounds of the model."""

Sound = tuple[int, np.ndarray]
"""Samples a second and 16-bit samples, as gradio takes them."""

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


def build_demo(
    pipeline: Pipeline, tokenizers: Mapping[str, Tokenizer | SoundTokenizer] | None = None
) -> gr.Blocks:
    """The demo of one pipeline; call `launch` on it. Endpoints: /draw, /describe, /reconstruct, and where
    the bundle or `tokenizers`, further ones by name, read clips or sounds, /clip and /sound."""
    actions = _Actions(pipeline, tokenizers or {})
    with gr.Blocks(analytics_enabled=False, title="Lexel") as demo:
        gr.Markdown("# Lexel\nPictures and text as one sequence of discrete tokens.")
        with gr.Tab("Draw"):
            _draw_tab(actions)
        with gr.Tab("Describe"):
            _describe_tab(actions)
        with gr.Tab("Reconstruct"):
            _reconstruct_tab(actions, demo)
        if actions.clip_tokenizers:
            with gr.Tab("Clips"):
                _clip_tab(actions)
        if actions.sound_tokenizers:
            with gr.Tab("Sounds"):
                _sound_tab(actions)
        gr.HTML(STYLE, padding=False)
    return demo


class _Actions:
    """What the buttons do; errors of the user's come up as a message in the page."""

    def __init__(
        self, pipeline: Pipeline, tokenizers: Mapping[str, Tokenizer | SoundTokenizer] | None = None
    ) -> None:
        self.pipeline = pipeline
        self.image_sampling = pipeline.sampling["image"]
        self.strategies = [AUTO, *pipeline.strategies]
        self.has_detokenizer = pipeline.detokenizer is not None
        given: dict[str, Tokenizer | SoundTokenizer] = {**pipeline.tokenizers, **(tokenizers or {})}
        further = {name: one for name, one in given.items() if one.has_decoder and one.draws_pixels}
        self.tokenizers: dict[str, Tokenizer] = {OWN: pipeline.tokenizer, **further}  # type: ignore[dict-item]
        self.clip_tokenizers = {n: one for n, one in further.items() if isinstance(one, VideoTokenizer)}
        self.sound_tokenizers = {n: one for n, one in given.items() if isinstance(one, SoundTokenizer)}

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
        steps: float | None = None,
    ) -> tuple[PictureFile.Image, PictureFile.Image, PictureFile.Image]:
        """A picture as the tokenizer `name` sees it, through `length` tokens and back, and the tokens. steps:
        of a decoder that samples (0 or None: its own)."""
        tokenizer = self.tokenizers[name]
        pixels = self._read(picture, tokenizer)
        tokens = int(length) if length is not None and tokenizer.layout.flexible else None
        with _told():
            decode = drawer(tokenizer, steps=int(steps)) if steps and tokenizer.decodes_in_steps else None
            if detokenizer and name == OWN:
                decode = self._detokenize
            rebuilt, codes = reconstruct(tokenizer, pixels, tokens, decode)
        return _shown(pixels), _shown(rebuilt), tokens_picture(codes, tokenizer.layout.codebook_sizes)

    def reconstruct_clip(self, file: str | None, frames: float, name: str) -> tuple[str, str, str]:
        """A clip as the tokenizer `name` sees it, through its tokens and back, as video files, and a line."""
        if file is None:
            raise gr.Error("Choose a clip first.")
        tokenizer = self.clip_tokenizers[name]
        with _told():
            check_draws(tokenizer)
            rate = clip_rate(file) or 8.0
            given = read_clip(file, size=tokenizer.image_size, fps=rate, most=int(frames))
            found, tokens = reconstruct_clip(tokenizer, given)
            shown = [self._video(video, rate) for video in (given[: len(found)], found)]
        return shown[0], shown[1], f"{len(found)} frames, {tokens} tokens"

    def reconstruct_sound(self, file: str | None, name: str) -> tuple[Sound, Sound, PictureFile.Image, str]:
        """A sound as the tokenizer `name` hears it, through its codes and back, the codes, and a line."""
        if file is None:
            raise gr.Error("Choose or record a sound first.")
        tokenizer = self.sound_tokenizers[name]
        with _told():
            wave = read_wave(file, tokenizer.sample_rate)
            found, codes = reconstruct_sound(tokenizer, wave)
        _, positions, books = codes.indices.shape
        line = f"{positions} tokens of {books} codes, {tokenizer.bandwidth:.3g} kilobits a second"
        heard, rebuilt = ((tokenizer.sample_rate, _samples(one)) for one in (wave, found))
        return heard, rebuilt, tokens_picture(codes, tokenizer.codebook_sizes), line

    def _video(self, video: Tensor, rate: float) -> str:
        """A file that browsers play; small frames enlarged, pixel by pixel."""
        factor = max(1, SIDE // max(video.shape[2:]))
        large = video.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
        path = Path(tempfile.mkdtemp(prefix="lexel-")) / "clip.mp4"
        write_clip(large, path, rate)
        return str(path)

    def choose(self, name: str) -> tuple[gr.Slider, gr.Checkbox, gr.Slider]:
        """The number of tokens, the generative decoder and the steps, as far as a tokenizer has them."""
        tokenizer = self.tokenizers[name]
        layout = tokenizer.layout
        length = gr.Slider(value=layout.positions, maximum=layout.positions, visible=layout.flexible)
        generative = gr.Checkbox(visible=name == OWN and self.has_detokenizer)
        return length, generative, gr.Slider(visible=tokenizer.decodes_in_steps)

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


def _samples(wave: Tensor) -> np.ndarray:
    return (wave[0].clamp(-1, 1) * 32767).round().numpy().astype(np.int16)


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
            steps = gr.Slider(
                0,
                MOST_STEPS,
                0,
                step=1,
                label="Steps (0: the decoder's own)",
                visible=actions.tokenizers[OWN].decodes_in_steps,
            )
            button = gr.Button("Reconstruct", variant="primary")
        with gr.Column():
            with gr.Row():
                seen = gr.Image(label="As the tokenizer sees it", format="png", height=FRAME)
                rebuilt = gr.Image(label="Through the tokens and back", format="png", height=FRAME)
            tokens = gr.Image(label="Tokens", format="png", height=FRAME)
    inputs, outputs = [picture, length, detokenizer, name, steps], [seen, rebuilt, tokens]
    # Without a length to choose, the hidden slider's release never fires.
    gr.on([button.click, length.release], actions.reconstruct, inputs, outputs, api_name="reconstruct")
    if several:
        gr.on([name.change, demo.load], actions.choose, name, [length, detokenizer, steps])


def _clip_tab(actions: _Actions) -> None:
    names = list(actions.clip_tokenizers)
    with gr.Row():
        with gr.Column():
            clip = gr.Video(label="Clip", height=FRAME)
            name = gr.Dropdown(names, value=names[0], label="Tokenizer")
            frames = gr.Slider(1, MOST_FRAMES, 17, step=1, label="Frames at most")
            button = gr.Button("Reconstruct", variant="primary")
        with gr.Column():
            with gr.Row():
                seen = gr.Video(label="As the tokenizer sees it", height=FRAME, loop=True, autoplay=True)
                rebuilt = gr.Video(
                    label="Through the tokens and back", height=FRAME, loop=True, autoplay=True
                )
            line = gr.Textbox(label="Tokens", interactive=False)
    button.click(actions.reconstruct_clip, [clip, frames, name], [seen, rebuilt, line], api_name="clip")


def _sound_tab(actions: _Actions) -> None:
    names = list(actions.sound_tokenizers)
    with gr.Row():
        with gr.Column():
            sound = gr.Audio(label="Sound", type="filepath")
            name = gr.Dropdown(names, value=names[0], label="Tokenizer")
            button = gr.Button("Reconstruct", variant="primary")
        with gr.Column():
            heard = gr.Audio(label="As the tokenizer hears it", format="wav", interactive=False)
            rebuilt = gr.Audio(label="Through the codes and back", format="wav", interactive=False)
            line = gr.Textbox(label="Tokens", interactive=False)
            tokens = gr.Image(label="Codes, one codebook below the other", format="png", height=FRAME)
    outputs = [heard, rebuilt, tokens, line]
    button.click(actions.reconstruct_sound, [sound, name], outputs, api_name="sound")
