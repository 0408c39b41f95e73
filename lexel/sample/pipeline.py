"""The whole chain as one object: a document with blanks goes in, a complete document comes out.

    pipe = Pipeline.from_pretrained()                       # the bundle shipped with Lexel
    pipe([Text("a red circle"), Image.blank()], count=4)    # draw
    pipe([Image(pixels=picture), Text.blank()])             # describe

b batch · n code positions · l generated tokens
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lexel.data.images import load_image, on_square, to_pixels
from lexel.data.shapes import ShapesConfig
from lexel.document import Document, DocumentCodec, Grammar, Image, Segment, State, Text
from lexel.errors import LexelError
from lexel.models import load_drafter, load_lm
from lexel.models.causal_lm import CausalLM
from lexel.models.detokenizers.base import Detokenizer
from lexel.sample.acceptance import Acceptance, exact
from lexel.sample.bundle import (
    DRAFTERS,
    FURTHER,
    TRAINED_ON_FILE,
    VOCABULARY_FILE,
    BundleInfo,
    DecodingConfig,
    check_trained_on,
    check_views,
    drafter_folders,
    find_bundle,
    load_codec,
    save_text_tokenizer,
    staged,
    tokenizer_folders,
    write_json,
    write_text,
)
from lexel.sample.codes import concat_codes
from lexel.sample.completion import Box, cells_outside, completion
from lexel.sample.decode import run, seeds
from lexel.sample.detokenize import detokenize
from lexel.sample.engine import Engine
from lexel.sample.generator import Request
from lexel.sample.logits import SamplingConfig
from lexel.sample.lossy import AcceptanceConfig, greedy_rule, make_acceptance
from lexel.sample.partial import Job, Partials, completed
from lexel.sample.policy import Choice, Policy
from lexel.sample.zipar import ZIPAR
from lexel.tokenizers import from_pretrained as load_tokenizer
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.structured import StructuredCodec
from lexel.types import Codes, DecodeStats, GenerationOutput

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

DEFAULT_SAMPLING = {
    "text": SamplingConfig(temperature=0.0),
    "image": SamplingConfig(temperature=0.6, guidance=1.5),
}
BATCH = 64
"""How many documents are generated side by side; others wait until one of them is done."""

_LOCK = threading.Lock()
"""Threads that share a pipeline share its engine."""


class Pipeline:
    """Tokenizer, language model and document codec, with an optional detokenizer and drafters.

    tokenizer_fingerprint: the tokenizer whose codes the LM was trained on, when known. sampling: defaults per
    modality; decoding: the default strategy; scenes: the procedural scenes it was trained on, where it was;
    tokenizers: further ones, by name: those of the language model's other modalities that are drawn like
    pictures, and any to reconstruct pictures with; structured: codecs of its modalities of structured values.
    drafter, drafters: trained ones for speculative decoding (`drafter` under that very name).
    Raises LexelError when the parts do not belong together, or a name is no folder's.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        lm: CausalLM,
        codec: DocumentCodec,
        *,
        detokenizer: Detokenizer | None = None,
        drafter: Any = None,
        drafters: Mapping[str, Any] | None = None,
        sampling: Mapping[str, SamplingConfig] | None = None,
        decoding: DecodingConfig | None = None,
        scenes: ShapesConfig | None = None,
        tokenizer_fingerprint: str | None = None,
        tokenizers: Mapping[str, Tokenizer] | None = None,
        structured: Mapping[str, StructuredCodec] | None = None,
    ) -> None:
        self.tokenizer, self.lm, self.codec = tokenizer, lm, codec
        self.detokenizer = detokenizer
        self.drafters = {**({} if drafter is None else {"drafter": drafter}), **(drafters or {})}
        self.sampling = {**DEFAULT_SAMPLING, **(sampling or {})}
        self.decoding = decoding or DecodingConfig()
        self.scenes = scenes
        self.tokenizers = dict(tokenizers or {})
        self.structured = dict(structured or {})
        self.dtype: str | None = None
        self._engine: Engine | None = None
        self._choices: dict[bytes, Choice] = {}
        self._rules: dict[tuple[AcceptanceConfig, bool], Acceptance] = {}
        self._check_parts(tokenizer_fingerprint)

    def _check_parts(self, trained_on: str | None) -> None:
        if bad := [name for name in (*self.tokenizers, *self.drafters) if Path(name).name != name]:
            raise LexelError(f"a part of a bundle cannot be called {bad[0]!r}; it is a folder's name.")
        own, layout = self.tokenizer.layout, self.codec.layouts.get("image")
        if layout is None or _geometry(layout) != _geometry(own):
            described = "no pictures" if layout is None else _described(layout)
            raise LexelError(
                f"the tokenizer writes {_described(own)}, but the language model's documents hold "
                f"{described}; take both from the same training run."
            )
        coders: dict[str, Any] = {**self.tokenizers, **self.structured}
        for name in set(self.codec.layouts) - {"image"}:
            if name not in coders or _geometry(coders[name].layout) != _geometry(self.codec.layouts[name]):
                raise LexelError(
                    f"the language model has a modality {name}, but there is no tokenizer or codec {name} "
                    "that writes its codes; take all parts from the same training run."
                )
        for name, model in (("language model", self.lm), *self.drafters.items()):
            reads_all = model is self.lm or isinstance(model, CausalLM)
            if reads_all and model.config.vocab_size < self.codec.vocabulary.size:
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
        """Load a bundle folder or hub id; with None the bundle that ships with Lexel. A folder with ``llm``
        and ``vqgan`` in it is a published Liquid, see `lexel.sample.liquid`.

        All parts come in eval mode and float32. Raises LexelError when the folder is missing, is no bundle,
        or holds parts that were not trained together."""
        folder = find_bundle(name)
        if (folder / "llm").is_dir() and (folder / "vqgan").is_dir():
            from lexel.sample.liquid import load_liquid

            return load_liquid(folder / "llm", folder / "vqgan")
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
        tokenizers = {name: load_tokenizer(path) for name, path in tokenizer_folders(folder).items()}
        check_views(folder, info, tokenizers)
        return cls(
            tokenizer,
            load_lm(folder / "lm"),
            codec,
            detokenizer=detokenizer,
            drafter=load_drafter(folder / "drafter") if "drafter" in info.parts else None,
            drafters={name: load_drafter(path) for name, path in drafter_folders(folder).items()},
            sampling=info.sampling,
            decoding=info.decoding,
            scenes=info.scenes,
            tokenizer_fingerprint=info.tokenizer,
            tokenizers=tokenizers,
            structured=info.structured,
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
        for name, model in self.drafters.items():
            if name != "drafter":
                model.save_pretrained(folder / DRAFTERS / name, dtype=dtype)
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
            structured=self.structured,
            views={
                name: (load_tokenizer(folder / FURTHER / name) if dtype else model).fingerprint()
                for name, model in self.tokenizers.items()
                if name in self.codec.layouts
            },
        ).write(folder)

    def to(self, device: torch.device | str) -> Pipeline:
        """Move every part to `device`; returns self."""
        parts = (self.tokenizer, self.lm, self.detokenizer)
        for part in (*parts, *self.drafters.values(), *self.tokenizers.values()):
            if isinstance(part, torch.nn.Module):
                part.to(device)
        self._engine = None
        self._rules.clear()
        self._choices.clear()
        return self

    @property
    def drafter(self) -> Any:
        """The drafter of that name, the bundle's part `drafter/`; None without one."""
        return self.drafters.get("drafter")

    @property
    def device(self) -> torch.device:
        """Where the language model is."""
        return next(self.lm.parameters()).device

    @property
    def strategies(self) -> tuple[str, ...]:
        """The decoding strategies that this bundle's parts allow."""
        return self.engine.names

    # Documents in, documents out

    def __call__(self, document: Document, *, count: int = 1, **options: object) -> GenerationOutput:
        """Complete one document `count` times; see `stream` for the options."""
        return self.stream(document, count=count, **options).wait()  # type: ignore[arg-type]

    def generate(self, documents: Sequence[Document], **options: object) -> GenerationOutput:
        """Complete documents, which need not have the same blanks; see `stream` for the options."""
        return self.stream(documents, **options).wait()  # type: ignore[arg-type]

    @torch.no_grad()
    def stream(
        self,
        documents: Document | Sequence[Document],
        *,
        count: int = 1,
        every: int | None = None,
        seed: int | None = None,
        sampling: SamplingConfig | Mapping[str, SamplingConfig] | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        decoding: str = "auto",
        acceptance: AcceptanceConfig | str = "exact",
        detokenizer: bool = False,
        steps: int | None = None,
        batch_size: int = BATCH,
        text_limit: int = 256,
    ) -> Partials:
        """Fill the trailing blank segments of every document (or of one, `count` times): partial results as
        they come, and `Partials.output` in the end.

        every: tokens of a document between two of them, see `Partials`. seed: repeats exactly on the same
        device with the same `batch_size`; None draws a fresh one. sampling: settings for what is generated,
        or per modality; guidance and temperature override single fields for the generated modalities.
        decoding: "auto" (the bundle's own choice) or one of `strategies`. acceptance: "exact", or for speed
        at the price of the distribution "lantern", "grouped" or an `AcceptanceConfig`; it matters to
        strategies that draft. detokenizer: draw pictures with the generative decoder in `steps` steps.
        batch_size: documents generated side by side; the others wait for room. Pictures of the result have
        codes and pixels. Raises LexelError for prompts that do not fit the model's context, ValueError for
        documents without blanks or unknown options."""
        if count < 1 or not documents or batch_size < 1:
            raise ValueError(
                "give at least one document, a count and a batch_size of at least 1, "
                f"got {count} and {batch_size}."
            )
        several: Any = [documents] if isinstance(documents[0], (Text, Image)) else documents
        every_one: list[Document] = [document for document in several for _ in range(count)]
        generator = self._random(seed)
        jobs = self._jobs(every_one, sampling, guidance, temperature, text_limit, generator)
        requests = [job.request for job in jobs]
        rule, key = self._acceptance(AcceptanceConfig.of(acceptance), requests)
        queue = self.engine.queue(decoding, requests, batch_size, rule, key)

        def finish(ids: list[Tensor], logprobs: list[Tensor], stats: DecodeStats) -> GenerationOutput:
            given = [[segment for segment in job.document if not segment.is_blank] for job in jobs]
            filled = [completed(self.codec, job, row) for job, row in zip(jobs, ids)]
            whole: list[Document] = [[*before, *after] for before, after in zip(given, filled)]
            output = GenerationOutput(whole, ids, [len(row) for row in ids], logprobs, stats)
            return self._with_pixels(output, [len(job.plan) for job in jobs], detokenizer, steps, generator)

        return Partials(self, queue, jobs, finish, every)

    def _acceptance(
        self, config: AcceptanceConfig, requests: Sequence[Request]
    ) -> tuple[Acceptance, tuple[AcceptanceConfig, bool] | None]:
        """The rule, made once, and what tells it from others."""
        if config.rule == "exact":
            return exact, None
        key = config, greedy_rule(config, {request.policy for request in requests})
        if key not in self._rules:
            made = make_acceptance(config, self.tokenizer, self.lm, self.codec.vocabulary, greedy=key[1])
            self._rules[key] = made
        return self._rules[key], key

    def _random(self, seed: int | None) -> torch.Generator:
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return generator

    def _jobs(
        self,
        documents: Sequence[Document],
        sampling: SamplingConfig | Mapping[str, SamplingConfig] | None,
        guidance: float | None,
        temperature: float | None,
        text_limit: int,
        generator: torch.Generator,
    ) -> list[Job]:
        """What is to be generated of each document; those of one plan share their policy."""
        known: dict[int, list[Segment]] = {}
        plans: dict[tuple[str, ...], list[int]] = {}
        for number, document in enumerate(documents):
            plans.setdefault(tuple(self.codec.plan(document)), []).append(number)
        jobs: dict[int, Job] = {}
        every = seeds(len(documents), generator)
        for plan, numbers in plans.items():
            settings = self._settings(plan, sampling, guidance, temperature)
            guided = any(settings[modality].guided for modality in plan)
            # The same document object, repeated, is encoded once.
            filled = [self._encoded(documents[number], known) for number in numbers]
            prompts = [self.codec.prompt(document) for document in filled]
            nulls = [self.codec.unconditional(document) if guided else None for document in filled]
            longest = max(len(prompt) for prompt in (*prompts, *nulls) if prompt is not None)
            policy = Policy(
                self._grammar(plan, longest, text_limit), settings, (), self.device, self._choices
            )
            for number, document, prompt, null in zip(numbers, filled, prompts, nulls):
                jobs[number] = Job(document, plan, Request(prompt, null, policy, every[number]))
        return [jobs[number] for number in range(len(documents))]

    @property
    def engine(self) -> Engine:
        """The networks in the form they decode in; anew when the language model was exchanged."""
        with _LOCK:
            made = self._engine
            if made is None or made.source is not self.lm or made.decoding != self.decoding:
                made = self._engine = Engine(self.lm, self.drafters, self.decoding, self.dtype)
            return made

    def pack(self, dtype: str | None = "float32") -> Pipeline:
        """Decode with weights packed for small batches in "float32", "bfloat16" or "int8" (a copy; None goes
        back to the networks themselves); returns self. Raises LexelError for another dtype."""
        self.dtype, self._engine = dtype, None
        return self

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
        known = ("text", *self.codec.layouts)
        if absent := [modality for modality in plan if modality not in known]:
            raise ValueError(f"the model has no modality {absent[0]!r}; it has {', '.join(known)}.")
        given = dict(sampling or {})
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"the model has no modality {', '.join(unknown)} to set the sampling of.")
        plain = dict.fromkeys(self.codec.vocabulary.modalities, SamplingConfig())
        settings = {**plain, **self.sampling, **given}
        overrides = {"guidance": guidance, "temperature": temperature}
        changes: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
        return {modality: settings[modality].with_every(**changes) for modality in plan}

    def _encoded(self, document: Document, known: dict[int, list[Segment]]) -> list[Segment]:
        """The document with codes for every picture that came as pixels."""
        if id(document) not in known:
            known[id(document)] = [
                replace(segment, codes=self._codes_of(segment.pixels, segment.modality))
                if isinstance(segment, Image) and segment.codes is None and segment.pixels is not None
                else segment
                for segment in document
            ]
        return known[id(document)]

    def tokenizer_of(self, modality: str) -> Tokenizer:
        """The tokenizer of a modality that is drawn like a picture. Raises LexelError without one."""
        if modality != "image" and modality not in self.tokenizers:
            raise LexelError(f"{modality} is no picture for this bundle: it has no tokenizer of that name.")
        return self.tokenizer if modality == "image" else self.tokenizers[modality]

    def segment(self, modality: str, values: Any) -> Image:
        """Structured values as a segment of a document; the inverse of `values`. Raises LexelError for a
        modality without a codec, ValueError for values that it refuses."""
        return Image(self._structured(modality).encode([values]), modality=modality)

    def values(self, segment: Segment) -> Any:
        """The structured values of a segment with codes, such as a list of boxes."""
        codec = self._structured(segment.modality)
        if not isinstance(segment, Image) or segment.codes is None:
            raise ValueError(f"this segment of {segment.modality} has no codes to read values from.")
        return codec.decode(segment.codes)[0]

    def _structured(self, modality: str) -> StructuredCodec:
        if modality not in self.structured:
            known = ", ".join(self.structured) or "none"
            raise LexelError(f"there is no structured modality {modality}; this bundle has {known}.")
        return self.structured[modality]

    def _codes_of(self, pixels: Tensor, modality: str) -> Codes:
        return self.tokenizer_of(modality).encode(self._batch_of_one(pixels)).to("cpu")

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
        generated: Sequence[int],
        detokenizer: bool,
        steps: int | None,
        generator: torch.Generator,
    ) -> GenerationOutput:
        """Decode all generated pictures, `BATCH` of one modality at a time."""
        documents = [list(document) for document in output.documents]
        places: dict[str, list[tuple[int, int]]] = {}
        for row, document in enumerate(documents):
            for column in range(len(document) - generated[row], len(document)):
                if document[column].modality not in ("text", *self.structured):
                    places.setdefault(document[column].modality, []).append((row, column))
        for modality, found in places.items():
            for start in range(0, len(found), BATCH):
                some = found[start : start + BATCH]
                segments: list[Any] = [documents[row][column] for row, column in some]
                codes = concat_codes([segment.codes for segment in segments])
                options: dict[str, Any] = {"steps": steps, "generator": generator}
                drawn = detokenizer and modality == "image"
                texts = [self._text_before(documents[row], column) for row, column in some]
                pixels = self.decode(codes, modality=modality, detokenizer=drawn, text=texts, **options)
                for (row, column), segment, picture in zip(some, segments, pixels.cpu()):
                    documents[row][column] = replace(segment, pixels=picture)
        return replace(output, documents=[*documents])

    @staticmethod
    def _text_before(document: Document, column: int) -> str | None:
        """The text nearest before a segment, which a detokenizer may read; None without one."""
        texts = [segment.text for segment in document[:column] if isinstance(segment, Text)]
        return texts[-1].strip() if texts and texts[-1] else None

    # Pictures

    @torch.no_grad()
    def decode(
        self,
        codes: Codes,
        *,
        modality: str = "image",
        detokenizer: bool = False,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        text: Sequence[str | None] | None = None,
    ) -> Tensor:
        """Codes of `modality` → pixels ``[b, 3, h, w]`` in [-1, 1], by its tokenizer's decoder or (pictures
        only) the generative one, which also stands in for a tokenizer that does not draw. text: what each
        picture shows, for a detokenizer that reads it. Raises LexelError when the bundle has none."""
        codes, own = codes.to(self.device), self.tokenizer_of(modality)
        stands_in = modality == "image" and self.detokenizer is not None and not own.draws_pixels
        if not detokenizer and not stands_in:
            return own.decode(codes).clamp(-1, 1)
        if self.detokenizer is None:
            raise LexelError("this bundle has no detokenizer; leave it off, or train one and add it.")
        options = {"text": text, "steps": steps, "generator": generator}
        return detokenize(own, self.detokenizer, codes, **options).clamp(-1, 1)  # type: ignore[arg-type]

    def read_picture(self, picture: str | Path | Picture | Tensor) -> Tensor:
        """Pixels ``[3, h, w]`` at the tokenizer's size from a file, a PIL picture, or such pixels themselves.
        Raises LexelError for unreadable or huge files."""
        if isinstance(picture, Tensor):
            return picture
        image = load_image(picture) if isinstance(picture, (str, Path)) else picture.convert("RGB")
        if self.codec.square is not None:
            return on_square(image, self.tokenizer.image_size, self.codec.square)
        return to_pixels(image, self.tokenizer.image_size)

    @torch.no_grad()
    def complete(
        self,
        picture: str | Path | Picture | Tensor | Codes,
        keep: Tensor | None = None,
        *,
        box: Box | None = None,
        caption: str | None = None,
        count: int = 1,
        seed: int | None = None,
        sampling: SamplingConfig | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        decoding: str = "plain",
        detokenizer: bool = False,
        steps: int | None = None,
        batch_size: int = BATCH,
    ) -> GenerationOutput:
        """Draw a part of a picture anew, inside of it or around it; all other codes stay as they are.

        keep: bool, over the code positions (of any shape with as many entries, such as the grid's): which
        codes stay. box: instead, (x0, y0, x1, y1) in pixels of the tokenizer's picture size, what is drawn
        anew: every code whose cell it touches. caption: what the whole picture shall show (None: anything;
        guidance needs one). The other options are those of `stream`; documents of the result are the caption,
        if any, and the picture. A decoder looks around, so pixels next to the part change a little, too.
        Raises LexelError for a model that was not trained with ``stages.lm.mixture.infill``, ValueError
        unless just one of `keep` and `box` says what to draw."""
        if (keep is None) == (box is None) or count < 1:
            raise ValueError("complete needs either keep or box, and a count of at least 1.")
        if decoding == ZIPAR:
            raise LexelError("ZipAR draws whole pictures; complete one with decoding=plain.")
        layout = self.codec.layouts["image"]
        if keep is None:
            assert box is not None
            keep = cells_outside(box, layout, self.tokenizer.image_size)
        codes = picture if isinstance(picture, Codes) else self.encode(self.read_picture(picture)[None])
        job = completion(self.codec, codes.to("cpu"), keep.flatten().cpu().bool(), caption)
        settings = self._settings(("image",), sampling, 1.0 if caption is None else guidance, temperature)
        policy = Policy(job.grammar, settings, (), self.device, self._choices)
        generator = self._random(seed)
        null = job.null if policy.guided else None
        requests = [Request(job.prompt, null, policy, number) for number in seeds(count, generator)]
        queue = self.engine.queue(decoding, requests, batch_size)
        ids, logprobs, stats = run(queue, [queue.submit(request) for request in requests])
        given: list[Segment] = [] if caption is None else [Text(caption)]
        whole: list[Document] = [[*given, job.read(row)] for row in ids]
        output = GenerationOutput(whole, ids, [len(row) for row in ids], logprobs, stats)
        return self._with_pixels(output, [1] * count, detokenizer, steps, generator)

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
        """Pixels ``[b, 3, h, w]`` → codes; `length` limits the codes of a flexible or multi-scale tokenizer.
        Raises LexelError when the tokenizer cannot shorten, or not to that length."""
        layout = self.tokenizer.layout
        if length is not None and length not in layout.lengths:
            able = layout.described_lengths
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


def _geometry(layout: CodeLayout) -> tuple:
    """What a tokenizer decides of a layout (the rest is how the LM writes it)."""
    return layout.codebook_sizes, layout.grid, layout.length, layout.flexible, layout.scales


def _described(layout: CodeLayout) -> str:
    return f"{layout.order} with codebooks of {', '.join(map(str, layout.codebook_sizes))} codes"
