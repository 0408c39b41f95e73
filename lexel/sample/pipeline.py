"""The whole chain as one object: a document with blanks goes in, a complete document comes out.

    pipe = Pipeline.from_pretrained()                       # the bundle shipped with Lexel
    pipe([Text("a red circle"), Image.blank()], count=4)    # draw
    pipe([Image(pixels=picture), Text.blank()])             # describe

b batch · n code positions · l generated tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from einops import rearrange
from torch import Tensor

from lexel.data.images import read_pixels, to_pixels
from lexel.data.shapes import ShapesConfig
from lexel.document import Document, DocumentCodec, Grammar, Image, Segment, State, Text, TokenSequence
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.sample.bundle import (
    FURTHER,
    STRATEGIES,
    TRAINED_ON_FILE,
    VOCABULARY_FILE,
    BundleInfo,
    DecodingConfig,
    check_trained_on,
    find_bundle,
    load_codec,
    save_text_tokenizer,
    staged,
    tokenizer_folders,
    write_json,
    write_text,
)
from lexel.sample.decode import generate
from lexel.sample.drafters import Drafter, JacobiDrafter, ModelDrafter, NestedDrafter
from lexel.sample.logits import SamplingConfig
from lexel.tokenizers import from_pretrained as load_tokenizer
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes, DecodeStats, GenerationOutput

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

DEFAULT_SAMPLING = {
    "text": SamplingConfig(temperature=0.0),
    "image": SamplingConfig(temperature=0.6, guidance=1.5),
}
BATCH = 64
"""How many documents are generated side by side; more are done in turns."""


class Detokenizer(Protocol):
    """What the pipeline needs of a generative decoder."""

    def decode(self, codes: Codes, *, steps: int = ..., generator: torch.Generator | None = ...) -> Tensor:
        """Codes → pixels ``[b, 3, h, w]`` in [-1, 1] in `steps` solver steps, noise from `generator`."""
        ...

    def save_pretrained(self, save_directory: str | Path, *, dtype: torch.dtype | None = ...) -> None:
        """Write the part's own folder."""
        ...


class Pipeline:
    """Tokenizer, language model and document codec, with an optional detokenizer and small drafter.

    tokenizer_fingerprint: the tokenizer whose codes the LM was trained on, when known. sampling: defaults per
    modality; decoding: the default strategy; scenes: the procedural scenes it was trained on, where it was;
    tokenizers: further ones, by name, to reconstruct pictures with; the language model does not know them.
    Raises LexelError when the parts do not belong together, or a name is no folder's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        lm: CausalLM,
        codec: DocumentCodec,
        *,
        detokenizer: Detokenizer | None = None,
        drafter: CausalLM | None = None,
        sampling: Mapping[str, SamplingConfig] | None = None,
        decoding: DecodingConfig | None = None,
        scenes: ShapesConfig | None = None,
        tokenizer_fingerprint: str | None = None,
        tokenizers: Mapping[str, Tokenizer] | None = None,
    ) -> None:
        self.tokenizer, self.lm, self.codec = tokenizer, lm, codec
        self.detokenizer, self.drafter = detokenizer, drafter
        self.sampling = {**DEFAULT_SAMPLING, **(sampling or {})}
        self.decoding = decoding or DecodingConfig()
        self.scenes = scenes
        self.tokenizers = dict(tokenizers or {})
        self._check_parts(tokenizer_fingerprint)

    def _check_parts(self, trained_on: str | None) -> None:
        if bad := [name for name in self.tokenizers if Path(name).name != name]:
            raise LexelError(f"a tokenizer of a bundle cannot be called {bad[0]!r}; it is a folder's name.")
        own, layout = self.tokenizer.layout, self.codec.layouts.get("image")
        if layout is None or _geometry(layout) != _geometry(own):
            described = "no pictures" if layout is None else _described(layout)
            raise LexelError(
                f"the tokenizer writes {_described(own)}, but the language model's documents hold "
                f"{described}; take both from the same training run."
            )
        for name, model in (("language model", self.lm), ("drafter", self.drafter)):
            if model is not None and model.config.vocab_size < self.codec.vocabulary.size:
                raise LexelError(
                    f"the {name} knows {model.config.vocab_size} ids, but the vocabulary has "
                    f"{self.codec.vocabulary.size}; take both from the same training run."
                )
        if trained_on is not None and trained_on != (found := self.tokenizer.fingerprint()):
            raise LexelError(
                f"the language model was trained on the codes of tokenizer {trained_on}, but this is "
                f"tokenizer {found}; take both from the same training run."
            )

    # Loading and saving

    @classmethod
    def from_pretrained(cls, name: str | Path | None = None) -> Pipeline:
        """Load a bundle folder or hub id; with None the bundle that ships with Lexel.

        All parts come in eval mode and float32. Raises LexelError when the folder is missing, is no bundle,
        or holds parts that were not trained together."""
        folder = find_bundle(name)
        info = BundleInfo.read(folder)
        codec = load_codec(folder, info)
        tokenizer = load_tokenizer(folder / "tokenizer")
        fingerprint = tokenizer.fingerprint()
        for part in info.parts:
            check_trained_on(folder, part, fingerprint)
        detokenizer = None
        if "detokenizer" in info.parts:
            from lexel.models.detokenizers import from_pretrained as load_detokenizer

            detokenizer = load_detokenizer(folder / "detokenizer")
        return cls(
            tokenizer,
            CausalLM.from_pretrained(folder / "lm"),
            codec,
            detokenizer=detokenizer,
            drafter=CausalLM.from_pretrained(folder / "drafter") if "drafter" in info.parts else None,
            sampling=info.sampling,
            decoding=info.decoding,
            scenes=info.scenes,
            tokenizer_fingerprint=info.tokenizer,
            tokenizers={name: load_tokenizer(path) for name, path in tokenizer_folders(folder).items()},
        )

    def save_pretrained(
        self, folder: str | Path, *, dtype: torch.dtype | None = None, card: str | None = None
    ) -> None:
        """Write the bundle folder. dtype: cast the networks' weights, e.g. to bfloat16 for half the size;
        card: text of README.md, see `lexel.evaluate.card.model_card`.
        Raises LexelError when the disk refuses."""
        with staged(Path(folder)) as staging:
            self._write(staging, dtype, card)

    def _write(self, folder: Path, dtype: torch.dtype | None, card: str | None) -> None:
        networks = {
            "tokenizer": self.tokenizer,
            "lm": self.lm,
            "detokenizer": self.detokenizer,
            "drafter": self.drafter,
        }
        parts = tuple(name for name, model in networks.items() if model is not None)
        for name, model in networks.items():
            if model is not None:
                model.save_pretrained(folder / name, dtype=dtype)
        for name, model in self.tokenizers.items():
            model.save_pretrained(folder / FURTHER / name, dtype=dtype)
        # A cast tokenizer is another tokenizer: the bundle names the one that will be loaded.
        fingerprint = (load_tokenizer(folder / "tokenizer") if dtype else self.tokenizer).fingerprint()
        for name in parts:
            if name != "tokenizer":
                write_json(folder / name / TRAINED_ON_FILE, {"tokenizer": fingerprint})
        save_text_tokenizer(self.codec.text_tokenizer, folder / "text_tokenizer")
        write_text(folder / VOCABULARY_FILE, self.codec.vocabulary.to_json())
        if card is not None:
            write_text(folder / "README.md", card)
        BundleInfo(
            tokenizer=fingerprint,
            codebook_sizes=tuple(self.tokenizer.codebook_sizes),
            parts=parts,
            layouts=self.codec.layouts,
            sampling=self.sampling,
            decoding=self.decoding,
            scenes=self.scenes,
        ).write(folder)

    def to(self, device: torch.device | str) -> Pipeline:
        """Move every part to `device`; returns self."""
        parts = (self.tokenizer, self.lm, self.detokenizer, self.drafter, *self.tokenizers.values())
        for part in parts:
            if isinstance(part, torch.nn.Module):
                part.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        return next(self.lm.parameters()).device

    @property
    def strategies(self) -> tuple[str, ...]:
        """The decoding strategies that this bundle's parts allow."""
        absent = {"drafter"} if self.drafter is None else set()
        if len(self.lm.config.ffn_widths) < 2:
            absent.add("nested")
        if self.codec.columns > 1:  # drafters propose one code per position
            absent |= {"nested", "jacobi", "drafter"}
        return tuple(name for name in STRATEGIES if name not in absent)

    # Documents in, documents out

    def __call__(self, document: Document, *, count: int = 1, **options: object) -> GenerationOutput:
        """Complete one document `count` times; see `generate` for the options."""
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}.")
        return self.generate([document] * count, **options)  # type: ignore[arg-type]

    @torch.no_grad()
    def generate(
        self,
        documents: Sequence[Document],
        *,
        seed: int | None = None,
        sampling: SamplingConfig | Mapping[str, SamplingConfig] | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        decoding: str = "auto",
        detokenizer: bool = False,
        steps: int | None = None,
        batch_size: int = BATCH,
        text_limit: int = 256,
    ) -> GenerationOutput:
        """Fill the trailing blank segments of every document; all must have the same blanks.

        seed: repeats exactly on the same device with the same `batch_size`; None draws a fresh one. sampling:
        settings for what is generated, or per modality; guidance and temperature override single fields for
        the generated modalities. decoding: "auto" (the bundle's own choice) or one of `strategies`.
        detokenizer: draw pictures with the generative decoder in `steps` steps. Pictures of the result have
        codes and pixels. Raises LexelError for prompts that do not fit the model's context, ValueError for
        documents without blanks or unknown options."""
        if not documents or batch_size < 1:
            raise ValueError(f"give at least one document and a batch_size of at least 1, got {batch_size}.")
        plans = {self.codec.plan(document) for document in documents}
        if len(plans) > 1:
            raise ValueError(f"documents generated together must have the same blanks, got {sorted(plans)}.")
        plan = plans.pop()
        settings = self._settings(plan, sampling, guidance, temperature)
        drafter = self._drafter(decoding)
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        known: dict[int, list[Segment]] = {}
        parts = []
        for start in range(0, len(documents), batch_size):
            # The same document object, repeated, is encoded once.
            batch = [self._encoded(d, known) for d in documents[start : start + batch_size]]
            parts.append(self._generate_batch(batch, plan, text_limit, settings, drafter, generator))
        output = _joined(parts)
        return self._with_pixels(output, len(plan), detokenizer, steps, generator)

    def _generate_batch(
        self,
        documents: Sequence[Document],
        plan: Sequence[str],
        text_limit: int,
        settings: Mapping[str, SamplingConfig],
        drafter: Drafter | None,
        generator: torch.Generator,
    ) -> GenerationOutput:
        prompts = [self.codec.prompt(document) for document in documents]
        guided = any(settings[modality].guidance != 1.0 for modality in plan)
        nulls = [self.codec.unconditional(document) for document in documents] if guided else None
        grammar = self._grammar(plan, max(len(prompt) for prompt in prompts + (nulls or [])), text_limit)
        ids, logprobs, stats = generate(
            self.lm,
            prompts,
            grammar,
            unconditional=nulls,
            sampling=dict(settings),
            drafter=drafter,
            generator=generator,
        )
        ids = [row.cpu() for row in ids]
        return GenerationOutput(
            documents=[self._completed(d, p, row, plan) for d, p, row in zip(documents, prompts, ids)],
            ids=ids,
            lengths=[len(row) for row in ids],
            logprobs=logprobs,
            stats=stats,
        )

    def _completed(
        self, document: Document, prompt: TokenSequence, ids: Tensor, plan: Sequence[str]
    ) -> list[Segment]:
        """The given segments, then the generated ones read back from `ids`."""
        given = [segment for segment in document if not segment.is_blank]
        opening = len(self.codec.scripts[plan[0]][0]) if plan[0] != "text" else 0
        written = self.codec.parse(torch.cat([prompt.ids[len(prompt) - opening :], ids]))
        for modality in plan:
            # An empty text leaves no ids behind, but it has a place in the document.
            empty = not written or written[0].modality != modality
            given.append(Text("") if empty else written.pop(0))
        return given

    def _grammar(self, plan: Sequence[str], prompt: int, text_limit: int) -> Grammar:
        """The grammar of `plan` with texts as long as fit behind a prompt of that many tokens.
        Raises LexelError when not even one token per text and all codes do."""
        shortest = Grammar(self.codec, plan, text_limit=1)
        needed = shortest.remaining(State(0, 0, prompt, plan[0]))
        spare = self.lm.config.max_length - prompt - needed
        if spare < 0:
            raise LexelError(
                f"the prompt takes {prompt} tokens and {needed} must follow, but the model's context holds "
                f"{self.lm.config.max_length}; shorten the prompt by {-spare} tokens."
            )
        texts = max(1, plan.count("text"))
        return Grammar(self.codec, plan, text_limit=min(text_limit, 1 + spare // texts))

    def _settings(
        self,
        plan: Sequence[str],
        sampling: SamplingConfig | Mapping[str, SamplingConfig] | None,
        guidance: float | None,
        temperature: float | None,
    ) -> dict[str, SamplingConfig]:
        if isinstance(sampling, SamplingConfig):
            sampling = dict.fromkeys(plan, sampling)
        given = dict(sampling or {})
        if unknown := sorted(set(given) - {"text", *self.codec.layouts}):
            raise ValueError(f"the model has no modality {', '.join(unknown)} to set the sampling of.")
        plain = dict.fromkeys(self.codec.vocabulary.modalities, SamplingConfig())
        settings = {**plain, **self.sampling, **given}
        overrides = {"guidance": guidance, "temperature": temperature}
        changes: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
        return {modality: replace(settings[modality], **changes) for modality in plan}

    def _drafter(self, decoding: str) -> Drafter | None:
        name = self.decoding.strategy if decoding == "auto" else decoding
        if name not in self.strategies:
            known = (
                "this bundle's parts do not allow it" if name in STRATEGIES else "there is no such strategy"
            )
            raise LexelError(f"decoding={name}: {known}; choose auto, {', '.join(self.strategies)}.")
        window = self.decoding.window
        if name == "nested":
            return NestedDrafter(self.lm, width=min(self.lm.config.ffn_widths), window=window)
        if name == "jacobi":
            return JacobiDrafter(window=window)
        return ModelDrafter(self.drafter, window=window) if name == "drafter" and self.drafter else None

    def _encoded(self, document: Document, known: dict[int, list[Segment]]) -> list[Segment]:
        """The document with codes for every picture that came as pixels."""
        if id(document) not in known:
            known[id(document)] = [
                replace(segment, codes=self.tokenizer.encode(self._batch_of_one(segment.pixels)).to("cpu"))
                if isinstance(segment, Image) and segment.codes is None and segment.pixels is not None
                else segment
                for segment in document
            ]
        return known[id(document)]

    def _batch_of_one(self, pixels: Tensor) -> Tensor:
        if tuple(pixels.shape) != (3, *self.tokenizer.image_size):
            height, width = self.tokenizer.image_size
            raise ValueError(
                f"a picture must be [3, {height}, {width}] for this tokenizer, got {list(pixels.shape)}; "
                "Pipeline.read_picture resizes files and PIL pictures."
            )
        return pixels[None].to(self.device)

    def _with_pixels(
        self,
        output: GenerationOutput,
        generated: int,
        detokenizer: bool,
        steps: int | None,
        generator: torch.Generator,
    ) -> GenerationOutput:
        """Decode all generated pictures, `BATCH` at a time."""
        documents = [list(document) for document in output.documents]
        places, drawn = [], []
        for row, document in enumerate(documents):
            for column in range(len(document) - generated, len(document)):
                segment = document[column]
                if isinstance(segment, Image) and segment.codes is not None:
                    places.append((row, column))
                    drawn.append(segment.codes)
        for start in range(0, len(places), BATCH):
            codes = concat_codes(drawn[start : start + BATCH])
            pixels = self.decode(codes, detokenizer=detokenizer, steps=steps, generator=generator)
            for number, picture in enumerate(pixels.cpu(), start=start):
                row, column = places[number]
                documents[row][column] = Image(drawn[number], picture)
        return replace(output, documents=[*documents])

    # Pictures

    @torch.no_grad()
    def decode(
        self,
        codes: Codes,
        *,
        detokenizer: bool = False,
        steps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Codes → pixels ``[b, 3, h, w]`` in [-1, 1], by the tokenizer's decoder or the generative one.
        Raises LexelError when the bundle has no detokenizer."""
        codes = codes.to(self.device)
        if not detokenizer:
            return self.tokenizer.decode(codes).clamp(-1, 1)
        if self.detokenizer is None:
            raise LexelError("this bundle has no detokenizer; leave it off, or train one and add it.")
        options = {} if steps is None else {"steps": steps}
        return self.detokenizer.decode(codes, generator=generator, **options).clamp(-1, 1)

    def read_picture(self, picture: str | Path | Picture | Tensor) -> Tensor:
        """Pixels ``[3, h, w]`` at the tokenizer's size from a file, a PIL picture, or such pixels themselves.
        Raises LexelError for unreadable or huge files."""
        if isinstance(picture, Tensor):
            return picture
        if isinstance(picture, (str, Path)):
            return read_pixels(picture, self.tokenizer.image_size)
        return to_pixels(picture.convert("RGB"), self.tokenizer.image_size)

    def draw(self, text: str, **options: object) -> Tensor:
        """Pictures of a text, ``[count, 3, h, w]`` in [-1, 1]; options as for calling the pipeline."""
        output = self([Text(text), Image.blank()], **options)  # type: ignore[arg-type]
        return torch.stack([document[-1].pixels for document in output.documents])  # type: ignore[union-attr, misc]

    def describe(self, picture: str | Path | Picture | Tensor, **options: object) -> str:
        """The caption of a picture; options as for calling the pipeline."""
        document = [Image(pixels=self.read_picture(picture)), Text.blank()]
        return self.caption(self(document, **options).documents[0])  # type: ignore[arg-type]

    @staticmethod
    def caption(document: Document) -> str:
        """The text that ends a document, without spaces around it; empty when it does not end in text."""
        last = document[-1]
        return (last.text or "").strip() if isinstance(last, Text) else ""

    @torch.no_grad()
    def encode(self, pictures: Tensor, length: int | None = None) -> Codes:
        """Pixels ``[b, 3, h, w]`` → codes; `length` limits the codes of a flexible tokenizer.
        Raises LexelError when the tokenizer cannot shorten, or not to that length."""
        layout = self.tokenizer.layout
        if length is not None and not (layout.flexible and 1 <= length <= layout.positions):
            able = f"1 to {layout.positions}" if layout.flexible else f"always {layout.positions}"
            raise LexelError(f"this tokenizer writes {able} tokens per picture, got length {length}.")
        return self.tokenizer.encode(pictures.to(self.device), length)

    def reconstruct(
        self,
        picture: str | Path | Picture | Tensor,
        length: int | None = None,
        *,
        detokenizer: bool = False,
        steps: int | None = None,
        seed: int = 0,
    ) -> Tensor:
        """A picture through its codes and back, ``[3, h, w]``; `length` as in `encode`."""
        codes = self.encode(self._batch_of_one(self.read_picture(picture)), length)
        generator = torch.Generator(self.device).manual_seed(seed)
        return self.decode(codes, detokenizer=detokenizer, steps=steps, generator=generator)[0].cpu()


def code_map(codes: Codes) -> Tensor:
    """The codes of one picture as a table of numbers to look at: long ``[rows, columns]``, grids as they lie,
    lines folded to about a square, further codebooks below each other; -1 where nothing is used."""
    indices = codes.indices[0].clone()
    if codes.lengths is not None:
        indices[int(codes.lengths[0]) :] = -1
    n, _ = indices.shape
    columns = codes.grid[1] if codes.grid is not None else max(1, round(n**0.5))
    padded = torch.nn.functional.pad(indices, (0, 0, 0, -n % columns), value=-1)
    return rearrange(padded, "(r c) k -> (k r) c", c=columns)


def _geometry(layout: CodeLayout) -> tuple:
    """What a tokenizer decides of a layout (the rest is how the LM writes it)."""
    return layout.codebook_sizes, layout.grid, layout.length, layout.flexible, layout.scales


def _described(layout: CodeLayout) -> str:
    return f"{layout.order} with codebooks of {', '.join(map(str, layout.codebook_sizes))} codes"


def concat_codes(parts: Sequence[Codes]) -> Codes:
    """Several batches of one tokenizer's codes as one batch. Raises ValueError when there are none."""
    if not parts:
        raise ValueError("there are no codes to put together.")

    def cat(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    indices = torch.cat([part.indices for part in parts])
    return Codes(indices, parts[0].grid, parts[0].scales, cat("lengths"), cat("keep"))


def _joined(parts: Sequence[GenerationOutput]) -> GenerationOutput:
    """The batches of one call as one output."""
    logprobs = [x for part in parts for x in part.logprobs or []]
    return GenerationOutput(
        documents=[d for part in parts for d in part.documents],
        ids=[x for part in parts for x in part.ids],
        lengths=[n for part in parts for n in part.lengths],
        logprobs=logprobs if all(part.logprobs is not None for part in parts) else None,
        stats=DecodeStats(
            accept_lengths=tuple(n for part in parts for n in part.stats.accept_lengths),
            target_forwards=sum(part.stats.target_forwards for part in parts),
            draft_forwards=sum(part.stats.draft_forwards for part in parts),
            seconds=sum(part.stats.seconds for part in parts),
        ),
    )
