"""Does learning to draw and to describe together cost either task, and less so in a larger model?

python -m benchmarks.liquid_claims

Liquid (arXiv 2412.04332) reports that visual generation and language tasks hurt each other in a small joint
model and that this vanishes with size. Here it is asked of small models on procedural scenes: for every width
one model learns all tasks together, and each task is learned alone twice: from as many documents of the task
as the joint model saw, and in as many steps (so from as many times more documents as there are tasks). The
cost of joint training is what it adds to a task's held-out loss over each of them, in nats per token.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from lexel.data.captions import describes_exactly
from lexel.data.checker import picture_shows
from lexel.data.shapes import ShapesConfig
from lexel.document import Document, Image, Text
from lexel.models.causal_lm import CausalLM, CausalLMConfig
from lexel.sample.logits import SamplingConfig
from lexel.sample.pipeline import Pipeline
from lexel.tokenizers import from_pretrained
from lexel.tokenizers.quantizers import QuantizerConfig
from lexel.tokenizers.vq import VQTokenizerConfig
from lexel.train.chain import run_chain
from lexel.train.codec import load_codec
from lexel.train.objectives.lm import NextTokenObjective
from lexel.train.record import DONE_FILE, read_json
from lexel.train.settings import Codes, LMStage, Parts, Run, Stages, Task, TrainerSettings

MODALITY = {"text_to_image": "image", "image_to_text": "text", "text": "text"}
"""The tasks, and what each writes."""

SCENES = ShapesConfig(
    count=10000, max_objects=2, object_weights=(0.5, 0.5), backgrounds=("light",), textured=0.0,
    variation=0.25, partial=0.0,
)  # fmt: skip
"""The quickstart's kind of scenes: plain light backgrounds and little variation."""


def tokenizer_config(size: int) -> VQTokenizerConfig:
    """The quickstart's tokenizer: 64 codes per picture of side 32."""
    return VQTokenizerConfig(
        image_size=size, encoder="patch", encoder_channels=96, stem=size // 8, channels=96, channel_mult=(1,),
        res_blocks=0, z_channels=96, embed_dim=8, attention=False,
        quantizer=QuantizerConfig("vq", codebook_size=256, cosine=True, decay=0.99, dead_below=0.1),
    )  # fmt: skip


def train(
    options: argparse.Namespace, folder: Path, dim: int, tasks: Sequence[str], steps: int
) -> dict[str, Any]:
    """A language model of width `dim` on documents of `tasks`, all equally often; its folder and seconds."""
    mixture = {task: float(task in tasks) for task in ("text_to_image", "image_to_text", "text", "image")}
    stage = LMStage(
        steps=steps,
        batch_size=options.batch,
        lr=options.lr,
        warmup=max(1, steps // 10),
        optimizer=partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.05),
        ema=0.98,
        precision=options.precision,
        validate_every=0,
        sample_every=0,
        mixture=mixture,
        drop=0.0,
    )
    network = partial(
        CausalLMConfig, dim=dim, layers=options.layers, heads=4, rope_axes=(0.5, 0.25, 0.25), qk_norm=True,
        max_length=192,
    )  # fmt: skip
    run = Run(
        task=Task(["lm"]),
        output=str(folder),
        seed=options.seed,
        data=options.scenes,
        lm=network,
        objective={"lm": partial(NextTokenObjective, z_loss=1e-4)},
        stages=Stages(lm=stage),
        parts=Parts(tokenizer=str(options.tokenizer)),
        codes=Codes(str(options.codes)),
        trainer=TrainerSettings("gpu" if options.device.startswith("cuda") else "cpu"),
    )
    run_chain(run)
    done = read_json(folder / "lm" / DONE_FILE) or {}
    return {"folder": folder / "lm", "seconds": float(done.get("seconds", 0))}


def write_codes(options: argparse.Namespace) -> None:
    """The codes of the scenes, once for all models."""
    from lexel.train.chain import Chain

    shared = Run(
        output=str(options.out), data=options.scenes, parts=Parts(tokenizer=str(options.tokenizer)),
        codes=Codes(validation_count=256, workers=0), seed=options.seed,
    )  # fmt: skip
    Chain(shared).tokenize()
    options.codes = options.out / "codes"


@torch.inference_mode()
def measure(options: argparse.Namespace, folder: Path, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Held-out loss (nats per token) and accuracy of a trained model, by task."""
    lm = CausalLM.from_pretrained(folder).to(options.device)
    greedy = SamplingConfig(temperature=0.0)
    pipe = Pipeline(
        from_pretrained(options.tokenizer).to(options.device), lm, load_codec(folder),
        sampling={"text": greedy, "image": greedy},
    )  # fmt: skip
    scenes = [options.scenes.build("validation")[row] for row in range(options.count)]
    codes = pipe.encode(torch.stack([scene.pixels for scene in scenes])).to("cpu")
    pictures = [Image(codes[row : row + 1]) for row in range(len(scenes))]
    captions = [Text(scene.captions[0]) for scene in scenes]
    known: Mapping[str, list[Document]] = {
        "text_to_image": [[c, p] for c, p in zip(captions, pictures)],
        "image_to_text": [[p, c] for c, p in zip(captions, pictures)],
        "text": [[c] for c in captions],
    }
    found = {task: {"nll": _loss(pipe, known[task], MODALITY[task])} for task in tasks}
    if "text_to_image" in tasks:
        prompts = options.scenes.prompts("one", options.count)
        asked: list[Document] = [[Text(text), Image.blank()] for text, _ in prompts]
        drawn: Any = pipe.generate(asked, seed=0, decoding="plain").documents
        shown = [picture_shows(d[-1].pixels, claim) for d, (_, claim) in zip(drawn, prompts)]
        found["text_to_image"]["accuracy"] = sum(shown) / len(shown)
    if "image_to_text" in tasks:
        told = pipe.generate([[p, Text.blank()] for p in pictures], seed=0, decoding="plain").documents
        right = [describes_exactly(pipe.caption(d), s.truth.objects) for d, s in zip(told, scenes)]
        found["image_to_text"]["accuracy"] = sum(right) / len(right)
    return found


def _loss(pipe: Pipeline, documents: Sequence[Document], modality: str) -> float:
    objective = NextTokenObjective(pipe.codec.vocabulary.modalities)
    total, tokens = 0.0, 0
    for start in range(0, len(documents), 32):
        batch = pipe.codec.collate([pipe.codec.build(d) for d in documents[start : start + 32]])
        batch = batch.to(pipe.device)
        _, metrics = objective(pipe.lm(batch), batch)
        count = int(metrics[f"tokens_{modality}"])
        total, tokens = total + float(metrics[f"loss_{modality}"]) * count, tokens + count
    return total / tokens


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = common.parser(__doc__.splitlines()[0], "liquid_claims")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="a trained one (default: train one)")
    parser.add_argument("--dims", type=int, nargs="+", default=[48, 96, 160], help="widths of the models")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each task alone")
    parser.add_argument("--batch", type=int, default=32, help="documents per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--precision", default="32-true", help="32-true or bf16-mixed")
    parser.add_argument("--count", type=int, default=128, help="held-out scenes")
    parser.add_argument("--text", action="store_true", help="captions alone are a third task")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmarks/liquid_claims"))
    options = parser.parse_args(arguments)
    options.scenes = replace(SCENES, size=options.size)
    tokenizer_steps = 800
    if options.quick:
        options.dims, options.layers, options.steps, options.batch, options.count = [8, 16], 1, 2, 4, 4
        options.scenes, tokenizer_steps = replace(options.scenes, count=16), 2
    tasks = ["text_to_image", "image_to_text", *(["text"] if options.text else [])]
    if options.tokenizer is None:
        recipe = common.Recipe(
            options.scenes, tokenizer_steps, options.batch, options.seed, options.device, 1e-3
        )
        recipe.train(options.out, tokenizer_config(options.size))
        options.tokenizer = options.out / "tokenizer"
    write_codes(options)
    results = {str(dim): compare(options, dim, tasks) for dim in options.dims}
    common.report(options, {"widths": results, "claims": claims(results, tasks)}, text(results))
    print()
    for line in claims(results, tasks).values():
        print(line)


def compare(options: argparse.Namespace, dim: int, tasks: Sequence[str]) -> dict[str, Any]:
    """Each task alone (as many documents, then as many steps) and all together at one width: per task nll and
    accuracy of the three, and the two costs."""
    rows: dict[str, Any] = {}
    longer = options.steps * len(tasks)
    joint = train(options, options.out / f"{dim}-joint", dim, tasks, longer)
    together = measure(options, joint["folder"], tasks)
    for task in tasks:
        found = {"joint": together[task]}
        for name, steps in (("alone", options.steps), ("longer", longer)):
            one = train(options, options.out / f"{dim}-{task}-{steps}", dim, [task], steps)
            found[name] = measure(options, one["folder"], [task])[task]
        rows[task] = {
            **{f"{name}_{what}": x for name, values in found.items() for what, x in values.items()},
            "cost": found["joint"]["nll"] - found["alone"]["nll"],
            "cost_longer": found["joint"]["nll"] - found["longer"]["nll"],
        }
        print(f"width {dim}, {task}: {rows[task]['cost']:+.4f}, {rows[task]['cost_longer']:+.4f}", flush=True)
    network = CausalLM.from_pretrained(joint["folder"])
    return {"parameters": common.parameters(network), "joint_seconds": joint["seconds"], "tasks": rows}


def claims(results: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, str]:
    """What the figures say of each task's cost over the widths."""
    found = {}
    for task in tasks:
        for name, what in (("cost", "equal documents"), ("cost_longer", "equal steps")):
            costs = [row["tasks"][task][name] for row in results.values()]
            change = "falls" if costs[-1] < costs[0] else "does not fall"
            listed = ", ".join(f"{cost:+.4f}" for cost in costs)
            found[f"{task}, {what}"] = (
                f"{task}, {what}: joint training costs {listed}; over the widths that {change}."
            )
    return found


def text(results: Mapping[str, Any]) -> str:
    """The table."""
    rows = []
    for dim, row in results.items():
        for task, found in row["tasks"].items():
            names = ("alone", "longer", "joint")
            shares = [found.get(f"{name}_accuracy") for name in names]
            rows.append(
                (
                    dim, f"{row['parameters'] / 1e3:.0f} k", task,
                    *(f"{found[f'{name}_nll']:.3f}" for name in names),
                    f"{found['cost']:+.3f}", f"{found['cost_longer']:+.3f}",
                    *("-" if share is None else f"{share:.1%}" for share in shares),
                )
            )  # fmt: skip
    headings = (
        "width", "parameters", "task", "alone nats", "longer nats", "joint nats", "cost", "cost, equal steps",
        "alone right", "longer right", "joint right",
    )  # fmt: skip
    return common.table(headings, rows)


if __name__ == "__main__":
    common.run(main)
