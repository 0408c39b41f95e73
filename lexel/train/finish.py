"""The end of the chain: trained parts become a bundle, the bundle is measured, the figures become a
report."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexel.errors import LexelError
from lexel.train.chain import Chain, say
from lexel.train.record import DONE_FILE, plain, read_json

if TYPE_CHECKING:
    from lexel.sample.pipeline import Pipeline

OPTIONAL = ("detokenizer", "drafter")
TIMED = ("tokenizer", "codes", "lm", "detokenizer", "drafter")
DTYPES = ("float32", "bfloat16", "float16")


def finish(chain: Chain) -> None:
    """Write ``bundle/``, then ``report.json``, ``index.html`` and ``samples.png`` into the run's folder (the
    first process of a distributed run does it alone)."""
    dtype = chain.run.evaluation.dtype
    if dtype not in DTYPES:
        raise LexelError(f"evaluation.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    output = chain.run.folder
    chain.stage(
        "evaluate",
        _settings(chain),
        lambda _: _finish(chain, output / "bundle"),
        together=False,
        keep_previous=False,
        makes=[output / "bundle" / "bundle.json", output / "index.html"],
    )


def _settings(chain: Chain) -> dict[str, Any]:
    from lexel.train.stages import load_lm, sampling_of

    parts = {"tokenizer": chain.fingerprint, "lm": load_lm(chain.part_folder("lm")).fingerprint()}
    parts |= {name: load_part(chain, name).fingerprint() for name in OPTIONAL if chain.has_part(name)}
    evaluation = asdict(chain.run.evaluation)
    if chain.run.any_to_any.modalities:
        evaluation["any_to_any"] = asdict(chain.run.any_to_any)
    return plain(
        {"parts": parts, "data": chain.run.data, "evaluation": evaluation, "sampling": sampling_of(chain)}
    )


def _finish(chain: Chain, folder: Path) -> dict[str, Any]:
    import torch

    from lexel.evaluate.card import model_card
    from lexel.evaluate.evaluate import evaluate_bundle
    from lexel.evaluate.report import write_report
    from lexel.sample.pipeline import Pipeline

    evaluation, output = chain.run.evaluation, chain.run.folder
    dtype = None if evaluation.dtype == "float32" else getattr(torch, evaluation.dtype)
    say(f"evaluate: writing {folder}")
    shutil.rmtree(folder, ignore_errors=True)  # it may hold parts that this run has no more
    assemble(chain).save_pretrained(folder, dtype=dtype)
    pipeline = Pipeline.from_pretrained(folder).to(chain.device)
    say(f"evaluate: measuring on {evaluation.prompts} held-out examples of each kind")
    report = evaluate_bundle(
        pipeline,
        chain.run.data,
        count=evaluation.prompts,
        seed=chain.run.seed,
        batch_size=evaluation.batch_size,
        progress=True,
    )
    if chain.run.any_to_any.modalities and chain.run.any_to_any.count:
        from lexel.train import any_to_any

        any_to_any.report(chain, pipeline)
    report["seconds"] = {**training_seconds(output), **report.get("seconds", {})}
    assemble(chain).save_pretrained(folder, dtype=dtype, card=model_card(pipeline, report, notes(chain)))
    write_report(output, pipeline, chain.run.data, report)
    say(f"done: {output / 'index.html'}, {output / 'report.json'}, {folder}")
    return {"report": plain(report)}


def assemble(chain: Chain) -> Pipeline:
    """The trained parts as one pipeline. LexelError when they were not trained together."""
    from lexel.data.shapes import ShapesConfig
    from lexel.sample.bundle import TRAINED_ON_FILE
    from lexel.sample.pipeline import Pipeline
    from lexel.train import any_to_any
    from lexel.train.codec import load_codec
    from lexel.train.stages import load_lm, sampling_of

    folder = chain.part_folder("lm")
    trained_on = read_json(folder / TRAINED_ON_FILE) or {}
    return Pipeline(
        chain.tokenizer,
        load_lm(folder),
        load_codec(folder),
        **{name: load_part(chain, name) for name in OPTIONAL if chain.has_part(name)},
        **any_to_any.parts(chain),
        sampling=sampling_of(chain),
        scenes=chain.run.data if isinstance(chain.run.data, ShapesConfig) else None,
        tokenizer_fingerprint=trained_on.get("tokenizer"),
    )


def write_bundle(chain: Chain, lm: Path, folder: Path) -> None:
    """Write the bundle of a language model's folder with the run's tokenizer, and its detokenizer if it has
    one."""
    from lexel.sample.pipeline import Pipeline
    from lexel.train.codec import load_codec
    from lexel.train.stages import load_lm, sampling_of

    parts = {"detokenizer": load_part(chain, "detokenizer")} if chain.has_part("detokenizer") else {}
    Pipeline(
        chain.tokenizer, load_lm(lm), load_codec(lm), sampling=sampling_of(chain), **parts
    ).save_pretrained(folder)


def load_part(chain: Chain, name: str) -> Any:
    """The trained detokenizer or drafter. LexelError when it was trained on another tokenizer's codes."""
    from lexel.models import load_drafter
    from lexel.models.detokenizers import from_pretrained as load_detokenizer
    from lexel.sample.bundle import check_trained_on

    folder = chain.part_folder(name)
    check_trained_on(folder.parent, folder.name, chain.fingerprint)
    return load_drafter(folder) if name == "drafter" else load_detokenizer(folder)


def training_seconds(output: Path) -> dict[str, float]:
    """Seconds of each finished stage, interruptions included, and their sum."""
    found = {name: (read_json(output / name / DONE_FILE) or {}).get("seconds") for name in TIMED}
    seconds = {name: float(value) for name, value in found.items() if value is not None}
    return {**seconds, "training": sum(seconds.values())}


def notes(chain: Chain) -> str:
    """What the model card says of the training."""
    stages = {name: read_json(chain.run.folder / name / DONE_FILE) for name in TIMED}
    lines = [
        f"- {name}: {done['steps']} steps, {done['seconds']:.0f} s"
        for name, done in stages.items()
        if done is not None and "steps" in done
    ]
    data = ", ".join(f"{key} {value}" for key, value in plain(chain.run.data).items())
    return "\n".join([f"Trained by `lexel-train` on {data}.", "", *lines])
