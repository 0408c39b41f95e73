"""Self-assessment in rounds (ILLUME, arXiv:2412.06673): the model draws pictures of training captions, an
evaluator judges them, and documents (caption, own picture, question, verdict) join the training data, so that
the model learns to tell its good pictures from its bad ones.

A round takes the language model that the run has so far, draws and judges in ``verdicts_<round>/`` and trains
on in ``self_assess_<round>/``, which ends in a bundle. Each is a stage: finished ones are reused, an
interrupted training goes on. What a round changes is measured on held-out captions, before and after:
``self_assessment.json``.

n code positions · k codebooks · N pictures
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from lexel.data.captions import parse_caption
from lexel.data.checker import picture_shows
from lexel.data.mixed import MixedDataset
from lexel.data.sampler import Draw, mix_seed
from lexel.data.shapes import ShapesConfig
from lexel.document import Document, DocumentCodec, Image, Text, TokenSequence
from lexel.errors import LexelError
from lexel.sample.bundle import read_json, write_json
from lexel.sample.verdict import ANSWERS, own_verdicts, verdict_document
from lexel.train.chain import Chain, is_leader, say
from lexel.train.record import DONE_FILE
from lexel.types import Codes

if TYPE_CHECKING:
    from lexel.sample.pipeline import Pipeline

PICTURES_FILE, TEXTS_FILE = "pictures.safetensors", "texts.json"
BEST_OF = 4
"""Pictures per prompt of which the model's own verdict chooses one, when a round is measured."""


class Evaluator(Protocol):
    """Whoever judges pictures."""

    def judge(self, caption: str, pixels: Tensor) -> bool | None:
        """Whether a picture ``[3, h, w]`` in [-1, 1] shows what the caption says; None: cannot tell."""
        ...


class ExactChecker:
    """The evaluator of the procedural scenes: reads the picture back into objects."""

    def judge(self, caption: str, pixels: Tensor) -> bool | None:
        """None for what is no sentence of the scenes' captions."""
        claim = parse_caption(caption)
        return None if claim is None else picture_shows(pixels, claim)


@dataclass(frozen=True)
class Verdicts:
    """Own pictures and what the evaluator said: codes of N pictures with their captions and verdicts."""

    captions: tuple[str, ...]
    codes: Codes
    right: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def accuracy(self) -> float:
        """Share of pictures that were right."""
        return sum(self.right) / len(self.right)

    def write(self, folder: Path) -> None:
        """Into two files, the texts last."""
        tensors = {"indices": self.codes.indices.int().contiguous()}
        if self.codes.lengths is not None:
            tensors["lengths"] = self.codes.lengths.int().contiguous()
        save_file(tensors, folder / PICTURES_FILE)
        write_json(folder / TEXTS_FILE, {"captions": self.captions, "right": self.right})

    @classmethod
    def read(cls, folder: Path, like: Any) -> Verdicts:
        """What `write` wrote; `like`: the pictures' layout."""
        texts, tensors = read_json(folder / TEXTS_FILE), load_file(folder / PICTURES_FILE)
        lengths = tensors["lengths"].long() if "lengths" in tensors else None
        codes = Codes(tensors["indices"].long(), like.grid, like.scales, lengths)
        return cls(tuple(texts["captions"]), codes, tuple(texts["right"]))


class VerdictDocuments(Dataset[TokenSequence]):
    """Verdicts as documents, right and wrong pictures equally often where there are both (or always saying
    yes would pay); read by `Draw`, of which `counter` decides."""

    def __init__(self, verdicts: Verdicts, codec: DocumentCodec, seed: int = 0) -> None:
        self.verdicts, self.codec, self.seed = verdicts, codec, seed
        sides = [[i for i, right in enumerate(verdicts.right) if right == side] for side in (False, True)]
        self.sides = [side for side in sides if side]

    def __len__(self) -> int:
        return len(self.verdicts)

    def __getitem__(self, draw: Draw) -> TokenSequence:
        rng = random.Random(mix_seed(self.seed, draw.counter))
        return self.verdict(rng.choice(rng.choice(self.sides)))

    def verdict(self, row: int) -> TokenSequence:
        """One of the verdicts."""
        answer, codes = ANSWERS[self.verdicts.right[row]], self.verdicts.codes[row : row + 1]
        return self.codec.build(verdict_document(self.verdicts.captions[row], codes, answer))

    def check_length(self, limit: int) -> None:
        """Raise LexelError when a verdict takes more than `limit` positions."""
        longest = max(len(self.verdict(row)) for row in range(len(self)))
        if longest > limit:
            raise LexelError(
                f"a verdict takes {longest} positions (caption, picture, question and answer), the language "
                f"model has {limit}; start from one with a larger lm.max_length."
            )


def draw_and_judge(
    pipeline: Pipeline, captions: Sequence[str], evaluator: Evaluator, *, seed: int = 0, **options: Any
) -> Verdicts:
    """Pictures of `captions` and the evaluator's verdicts; those that it cannot tell are left out. options:
    of ``Pipeline.generate``. Raises LexelError when it could not judge any."""
    documents: list[Document] = [[Text(caption), Image.blank()] for caption in captions]
    drawn: Any = pipeline.generate(documents, seed=seed, decoding="plain", **options).documents
    judged = [evaluator.judge(c, document[-1].pixels) for c, document in zip(captions, drawn)]
    known = [i for i, verdict in enumerate(judged) if verdict is not None]
    if not known:
        raise LexelError("the evaluator could judge none of the pictures; has the data another's captions?")
    from lexel.sample.codes import concat_codes

    codes = concat_codes([drawn[i][-1].codes.to("cpu") for i in known])
    return Verdicts(tuple(captions[i] for i in known), codes, tuple(bool(judged[i]) for i in known))


def measure(
    pipeline: Pipeline, captions: Sequence[str], evaluator: Evaluator, *, seed: int = 0
) -> dict[str, float]:
    """What a model draws and how it judges it. Of `captions`: `drawing`, the share of right pictures;
    `verdict`, the mean of the shares of right pictures that it calls right and of wrong ones that it calls
    wrong (chance 0.5, what a model that cannot judge or always says the same gets); `best_of`, the share of
    right pictures when its own verdict chooses one of `BEST_OF`, beside `any_of`, when the evaluator does."""
    many = [caption for caption in captions for _ in range(BEST_OF)]
    verdicts = draw_and_judge(pipeline, many, evaluator, seed=seed)
    if len(verdicts) < len(many):
        raise LexelError("the evaluator must be able to judge every held-out caption.")
    pictures = [verdicts.codes[i : i + 1] for i in range(len(verdicts))]
    belief = own_verdicts(pipeline, verdicts.captions, pictures)
    right = torch.tensor(verdicts.right)
    sides = [(belief > 0.5)[right].float(), (belief <= 0.5)[~right].float()]
    groups, chosen = right.view(-1, BEST_OF), belief.view(-1, BEST_OF).argmax(1)
    return {
        "drawing": float(right.float().mean()),
        "verdict": float(torch.stack([side.mean() for side in sides if len(side)]).mean()),
        "chance_verdict": 0.5,
        "best_of": float(groups.gather(1, chosen[:, None]).float().mean()),
        "any_of": float(groups.any(1).float().mean()),
        "prompts": len(captions),
    }


def evaluator_of(data: Any) -> Evaluator:
    """Who judges pictures of a data source. Raises LexelError when nobody does."""
    if isinstance(data, ShapesConfig):
        return ExactChecker()
    raise LexelError(
        "self-assessment needs an evaluator, which only data=shapes brings along; for other data call "
        "lexel.train.self_assessment.assess(chain, evaluator) from Python."
    )


def assess(
    chain: Chain, evaluator: Evaluator | None = None, held_out: Sequence[str] | None = None
) -> list[dict[str, float]]:
    """All rounds of ``stages.self_assess``; the run's language model is the last one's from here on.
    held_out: captions to measure on (None: the data's own held-out prompts). Returns and writes the
    measurements, the one before the first round first."""
    run, settings = chain.run, chain.run.stages.self_assess
    evaluator = evaluator or evaluator_of(run.data)
    if held_out is None:
        half = max(1, settings.held_out // 2)
        held_out = [text for kind in ("one", "two") for text, _ in run.data.prompts(kind, half, run.seed)]
    chain.tokenize()
    figures = [_measured(chain, 0, held_out, evaluator)]
    for number in range(1, settings.rounds + 1):
        verdicts = _judged(chain, number, evaluator)
        folder = _train_round(chain, number, verdicts)
        run.parts.lm = str(folder / "bundle" / "lm")
        figures.append(_measured(chain, number, held_out, evaluator))
    if is_leader():
        write_json(run.folder / "self_assessment.json", {"rounds": figures})
    return figures


def _pipeline(chain: Chain) -> Pipeline:
    from lexel.train.finish import assemble

    return assemble(chain).to(chain.device)


def _measured(chain: Chain, number: int, held_out: Sequence[str], evaluator: Evaluator) -> dict[str, float]:
    """`measure` of the run's language model after so many rounds, in ``self_assess_<number>.json``; of the
    same model and as many captions it is not done again."""
    if not is_leader():
        return {}
    from lexel.train.stages import load_lm

    path = chain.run.folder / f"self_assess_{number}.json"
    key = load_lm(chain.part_folder("lm")).fingerprint()
    known = read_json(path) if path.is_file() else {}
    if (known.get("lm"), known.get("prompts")) != (key, len(held_out)):
        known = {"lm": key, **measure(_pipeline(chain), held_out, evaluator, seed=chain.run.seed)}
        write_json(path, known)
    say(
        f"self_assess: after {number} rounds: draws {known['drawing']:.1%} right, judges its pictures at "
        f"{known['verdict']:.1%} (balanced; chance 50%), choosing one of {BEST_OF} by itself "
        f"{known['best_of']:.1%} right"
    )
    return {name: value for name, value in known.items() if name != "lm"}


def _judged(chain: Chain, number: int, evaluator: Evaluator) -> Verdicts:
    """The round's own pictures with their verdicts."""
    from lexel.train.stages import load_lm

    run, settings = chain.run, chain.run.stages.self_assess
    key = {
        "lm": load_lm(chain.part_folder("lm")).fingerprint(),
        "codes": chain.codes_settings(),
        "settings": {"captions": settings.captions, "temperature": settings.temperature},
        "seed": run.seed + number,
    }

    def work(folder: Path) -> dict[str, Any]:
        captions = _some_captions(chain, settings.captions, run.seed + number)
        options = {"temperature": settings.temperature}
        verdicts = draw_and_judge(_pipeline(chain), captions, evaluator, seed=run.seed + number, **options)
        verdicts.write(folder)
        say(f"self_assess: round {number}: {len(verdicts)} own pictures, {verdicts.accuracy:.1%} right")
        return {"pictures": len(verdicts), "right": verdicts.accuracy}

    name = f"verdicts_{number}"
    made = [run.folder / name / TEXTS_FILE]
    chain.stage(name, key, work, together=False, keep_previous=False, makes=made)
    return Verdicts.read(run.folder / name, chain.tokenizer.layout)


def _some_captions(chain: Chain, count: int, seed: int) -> list[str]:
    """Training captions, one of each picture drawn."""
    codes, rng = chain.codes("train"), random.Random(seed)
    found: list[str] = []
    for _ in range(10 * count):
        captions = codes[rng.randrange(len(codes))].captions
        found += [rng.choice(captions)] if captions else []
        if len(found) == count:
            return found
    raise LexelError("self-assessment needs captions; most of the training pictures have none.")


def _train_round(chain: Chain, number: int, verdicts: Verdicts) -> Path:
    """Train the run's language model on the usual documents and the verdicts; the folder of the round."""
    from lexel.sample.bundle import BUNDLE_FILE
    from lexel.train import stages
    from lexel.train.codec import batching, load_codec, save_codec
    from lexel.train.finish import write_bundle
    from lexel.train.lm_module import LMModule
    from lexel.train.sources import Sources

    run, stage, name = chain.run, chain.run.stages.self_assess, f"self_assess_{number}"
    before = chain.part_folder("lm")
    codec, network = load_codec(before), stages.load_lm(before)
    sources, folder = Sources(chain, stage), run.folder / name
    own = VerdictDocuments(verdicts, codec, run.seed)
    own.check_length(network.config.max_length)
    inputs = {
        "objective": run.objective["lm"],
        "start": network.fingerprint(),
        "verdicts": read_json(run.folder / f"verdicts_{number}" / DONE_FILE)["hash"],
        **sources.settings(),
    }

    def work(folder: Path) -> dict[str, Any]:
        torch.manual_seed(run.seed)
        save_codec(codec, folder, chain.fingerprint)
        objective = run.objective["lm"](codec.vocabulary.modalities)
        module = LMModule(network.requires_grad_(True), objective, stage, run.seed, None, codec.vocabulary)
        mixed = {"data": sources.documents(codec, "train"), "verdicts": own}
        weights = {"data": 1 - stage.share, "verdicts": stage.share}
        documents, validation = MixedDataset(mixed, weights, run.seed), sources.validation(codec)
        batches = batching(codec, stage)
        facts = stages.train_network(chain, name, module, folder, documents, validation, batches)
        if is_leader():
            write_bundle(chain, folder, folder / "bundle")
        return facts

    made = [folder / "bundle" / BUNDLE_FILE]
    stages.training_stage(chain, name, work, stage=stage, makes=made, **inputs)
    return folder
