"""Liquid against recorded numbers: prompt → ids → guided codes → picture, picture → text, training rows.

b rows · l positions · v vocabulary · h w grid
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lexel.document import Document, Grammar, Image, State, Text, TokenSequence
from lexel.errors import LexelError
from lexel.prompts import PromptCodec
from lexel.sample.decode import generate
from lexel.sample.liquid import VQGAN_CONFIG, load_liquid, load_vqgan, to_uint8
from lexel.sample.logits import SamplingConfig, target_distribution
from lexel.sample.pipeline import Pipeline
from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes
from lexel.verify.fixture import RULE_FILE, Fixture

IGNORED = -100
"""The label of a position that is no target."""

GREEDY = SamplingConfig(temperature=0.0)


@torch.no_grad()
def liquid(fixture: Fixture) -> dict[str, Tensor]:
    """Every recorded tensor of a Liquid fixture, whatever its backbone."""
    pipe = _pipeline(fixture)
    return {
        **drawing(pipe, fixture, guided=True),
        **drawing(pipe, fixture, guided=False),
        **reading(pipe, fixture),
        **training(pipe, fixture),
    }


def _pipeline(fixture: Fixture) -> Pipeline:
    folder = fixture.folder
    if (folder / RULE_FILE).is_file():
        fixture.weights()
        for part in ("llm", "vqgan"):
            shutil.copytree(folder / part, fixture.scratch / part, dirs_exist_ok=True)
        folder = fixture.scratch
    if not (folder / "vqgan" / VQGAN_CONFIG).is_file():
        raise LexelError(f"{folder} holds no vqgan/{VQGAN_CONFIG}; is it a fixture of Liquid?")
    sizes: Any = load_vqgan(folder / "vqgan").config
    h, w = (side * sizes.downsampling for side in fixture.config["grid"])
    return load_liquid(folder / "llm", folder / "vqgan", image_size=(h, w))


# A text becomes a picture


def drawing(pipe: Pipeline, fixture: Fixture, guided: bool) -> dict[str, Tensor]:
    """Prompts padded on the left, guided logits and filtered probabilities of the first steps, greedy ids,
    codes and pictures."""
    name = "t2i.cfg" if guided else "t2i.nocfg"
    documents: list[Document] = [[Text(text), Image.blank()] for text in fixture.config["prompts"]]
    prompts = [pipe.codec.prompt(document) for document in documents]
    nulls = [pipe.codec.unconditional(document) for document in documents]
    ids, mask = left_padded([*prompts, *nulls] if guided else prompts, pipe.codec.vocabulary.special["pad"])
    inputs = "t2i" if guided else name
    scale = fixture.config["guidance_scale"] if guided else 1.0
    output = pipe.generate(documents, sampling=replace(GREEDY, guidance=scale), decoding="plain")
    ours = {
        f"{inputs}.input_ids": ids,
        f"{inputs}.attention_mask": mask,
        f"{name}.token_ids": torch.stack(output.ids),
    }
    pictures: list[Any] = [document[-1] for document in output.documents]
    h, w = fixture.config["grid"]
    ours[f"{name}.codes"] = torch.stack([picture.codes.indices.reshape(h, w) for picture in pictures])
    # The recorded picture is the decoder's output as it is.
    raw = pipe.tokenizer.decode(Codes(ours[f"{name}.codes"].reshape(-1, h * w, 1), (h, w)))
    ours[f"{name}.image"], ours[f"{name}.image_uint8"] = raw, to_uint8(raw)
    steps = [
        fixture.recorded[f"{name}.{x}"]
        for x in ("first_logits", "filtered_probs")
        if f"{name}.{x}" in fixture
    ]
    if steps:
        count = steps[0].shape[1]
        conditional = first_logits(pipe, prompts, output.ids, count)
        unconditional = first_logits(pipe, nulls, output.ids, count) if guided else None
        ours |= _filtered(pipe, fixture, name, conditional, unconditional, scale)
    return ours


def _filtered(
    pipe: Pipeline, fixture: Fixture, name: str, cond: Tensor, uncond: Tensor | None, scale: float
) -> dict[str, Tensor]:
    """Guided logits ``[b, steps, v]``, and probabilities of the codes after the recorded filters."""
    guided = cond if uncond is None else uncond + scale * (cond - uncond)
    probe = fixture.config["sampler_probe"]
    filters = {key: probe[key] for key in ("temperature", "top_k", "top_p")}
    settings = SamplingConfig(**filters, guidance=scale)
    codes = pipe.codec.vocabulary.block("image")
    rows = [None if x is None else x.flatten(0, 1)[:, codes] for x in (cond, uncond)]
    assert rows[0] is not None
    kept = target_distribution(rows[0], rows[1], settings, codes, size=cond.shape[-1])
    return {
        f"{name}.first_logits": guided,
        f"{name}.filtered_probs": kept.dense()[:, codes].unflatten(0, cond.shape[:2]),
    }


def first_logits(pipe: Pipeline, prompts: list[TokenSequence], ids: list[Tensor], count: int) -> Tensor:
    """Logits ``[b, count, v]`` of the first tokens after each prompt, along `ids`."""
    rows = []
    for prompt, following in zip(prompts, ids):
        whole = torch.cat([prompt.ids, following[: count - 1]])
        rows.append(_logits(pipe, whole)[len(prompt) - 1 :])
    return torch.stack(rows)


def _logits(pipe: Pipeline, ids: Tensor) -> Tensor:
    """Logits ``[l, v]`` of one sequence."""
    positions = torch.zeros(len(ids), 3, dtype=torch.long)
    positions[:, 0] = torch.arange(len(ids))
    no_loss = torch.zeros_like(ids, dtype=torch.bool)
    sequence = TokenSequence(ids, pipe.codec.vocabulary.modality_of(ids), positions, no_loss)
    return pipe.lm(pipe.codec.collate([sequence])).logits[0]


def left_padded(sequences: list[TokenSequence], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask ``[b, l]`` as the published code batches prompts. Padding does not change what
    a row computes, since positions count its own tokens: the sampler here has none."""
    longest = max(map(len, sequences))
    ids = torch.stack([F.pad(s.ids, (longest - len(s), 0), value=pad) for s in sequences])
    mask = torch.stack([F.pad(torch.ones_like(s.ids), (longest - len(s), 0)) for s in sequences])
    return ids, mask


# A picture becomes a text


class AnyId(Grammar):
    """A text of any ids, as the published script samples it; it ends with ``<eos>``."""

    def allowed(self, state: State) -> Tensor:
        """Everything the model has an id for."""
        return self._masks.setdefault("any", torch.ones(self.codec.vocabulary.size, dtype=torch.bool))

    def advance(self, state: State, token: int) -> State:
        """One more token, or the end."""
        end = token == self.codec.vocabulary.special["eos"] or state.slot + 1 >= self.text_limit
        slot, index = state.slot + 1, state.index + 1
        return State(state.segment + int(end), 0 if end else slot, index, "text")


def reading(pipe: Pipeline, fixture: Fixture) -> dict[str, Tensor]:
    """Codes of the picture, the question around it as ids, the first logits and the greedy answer."""
    h, w = fixture.config["grid"]
    codes = pipe.tokenizer.encode(fixture.input("i2t.image"))
    documents: list[Document] = [
        [Image(codes[row : row + 1]), Text(fixture.config["question"]), Text.blank()]
        for row in range(len(codes))
    ]
    prompts = [pipe.codec.prompt(document) for document in documents]
    length = fixture.recorded["i2t.generated_ids"].shape[1]
    grammar = AnyId(pipe.codec, ("text",), text_limit=length)
    answers, _, _ = generate(pipe.lm, prompts, grammar, sampling={"text": GREEDY})
    pad = pipe.codec.vocabulary.special["pad"]
    return {
        "i2t.codes": codes.indices.reshape(-1, h, w),
        "i2t.input_ids": torch.stack([prompt.ids for prompt in prompts]),
        "i2t.first_logits": first_logits(pipe, prompts, answers, 1)[:, 0],
        "i2t.generated_ids": torch.stack([F.pad(ids, (0, length - len(ids)), value=pad) for ids in answers]),
    }


# Training rows


def training(pipe: Pipeline, fixture: Fixture) -> dict[str, Tensor]:
    """The recorded rows as ids and labels, and the loss of each target."""
    codec, pictures = pipe.codec, list(fixture.input("train.vq_codes"))
    assert isinstance(codec, PromptCodec)
    rows = []
    for line in fixture.config["train_rows_as_tokens"]:
        document, unconditional, wording = read_row(line, codec, pictures)
        rows.append(codec.build(document, unconditional=unconditional, wording=wording))
    batch = codec.collate(rows)
    assert batch.loss_mask is not None
    labels = batch.ids.masked_fill(~batch.loss_mask, IGNORED)
    logits = pipe.lm(batch).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED)
    return {
        "train.input_ids": batch.ids,
        "train.labels": labels,
        "train.attention_mask": (batch.ids != codec.vocabulary.special["pad"]).long(),
        "train.token_nll": losses,
        "train.loss": losses.sum() / (labels[:, 1:] != IGNORED).sum(),
    }


def read_row(line: str, codec: PromptCodec, pictures: list[Tensor]) -> tuple[Document, bool, int]:
    """A row in words, ``<bos> text <boi> {16 codes} <eoi> <eos>``, as the document that it is written from,
    whether its text was dropped, and the number of its instruction. Takes its codes from `pictures`."""
    body = line.strip().removeprefix("<bos>").removesuffix("<eos>").strip()
    before, found, after = (part.strip() for part in body.partition("<boi>"))
    if not found:
        return [Text(body)], False, 0
    picture = Image(_codes(pictures.pop(0), codec.layouts["image"]))
    after = re.sub(r"^\{.*?\}\s*<eoi>", "", after).strip()
    if not before:
        constant = codec.format.forms["image text"].before.removeprefix("{0}")
        return [picture, Text(after.removeprefix(constant).strip())], False, 0
    if before == "<unconditional>":
        return [Text(""), picture], True, 0
    for wording, instruction in enumerate(codec.format.instructions):
        if before.endswith(instruction.strip()):
            return [Text(before.removesuffix(instruction.strip()).strip()), picture], False, wording
    raise LexelError(f"the training row {line!r} has none of Liquid's instructions.")


def _codes(row: Tensor, layout: CodeLayout) -> Codes:
    return Codes(row.reshape(1, -1, 1), layout.grid)
