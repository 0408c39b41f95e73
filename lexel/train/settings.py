"""What a run can be told, as plain dataclasses: the schema of `lexel/conf/train.yaml` and, once composed, the
values the code below the entry point receives (no DictConfig travels further than `lexel.train.cli`).

Only fields that Hydra's structured configs know (numbers, strings, lists, dicts, dataclasses) occur here, and
nothing heavy is imported, so that ``lexel-train --help`` is quick.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STAGES = ("tokenizer", "lm", "detokenizer", "drafter", "evaluate")
"""Every stage a task may name, in the order they run."""

PRECISIONS = ("32-true", "bf16-mixed")

MIXTURE = {"text_to_image": 1.0, "image_to_text": 1.0, "text": 0.0, "image": 0.0}
"""How often each kind of document is drawn, unless told otherwise."""

FREE = frozenset(
    {
        "validate_every",
        "validation_batches",
        "sample_every",
        "sample_count",
        "checkpoint_every",
        "log_every",
        "workers",
    }
)
"""Settings of a stage that change what is reported or how fast, never the weights: a finished stage is reused
and an interrupted one continued when only these differ."""


@dataclass
class StageSettings:
    """How one network is trained.

    steps: optimizer steps. batch_size: examples per micro-batch and process; an optimizer step sees
    ``batch_size * accumulate * processes``. lr, warmup (steps), schedule and schedule_args: as in
    `transformers.get_scheduler`, or ``drops`` (see `lexel.train.schedule`). optimizer: a factory
    ``parameters, lr -> Optimizer``. clip: largest gradient norm (0: off). precision: ``32-true`` or
    ``bf16-mixed``. ema: decay of the averaged weights that are exported (0: export the last weights).
    init: folder or hub id of weights to start from. *_every: intervals in optimizer steps (0: never).
    workers: data loading processes.
    """

    steps: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 50
    schedule: str = "cosine"
    schedule_args: dict[str, Any] = field(default_factory=dict)
    optimizer: Any = None
    clip: float = 1.0
    precision: str = "32-true"
    ema: float = 0.99
    init: str | None = None
    validate_every: int = 200
    validation_batches: int = 4
    sample_every: int = 500
    sample_count: int = 8
    checkpoint_every: int = 200
    log_every: int = 10
    workers: int = 0

    def check(self, name: str) -> None:
        """Raise ValueError naming ``stages.<name>.<field>`` when a number makes no sense."""
        for key in ("steps", "batch_size", "accumulate", "log_every"):
            if getattr(self, key) < 1:
                raise ValueError(f"stages.{name}.{key} must be at least 1, got {getattr(self, key)}.")
        for key in (
            "warmup",
            "clip",
            "validate_every",
            "validation_batches",
            "sample_every",
            "checkpoint_every",
        ):
            if getattr(self, key) < 0:
                raise ValueError(f"stages.{name}.{key} must not be negative, got {getattr(self, key)}.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"stages.{name}.precision must be one of {PRECISIONS}, got {self.precision!r}.")
        if not 0 <= self.ema < 1:
            raise ValueError(f"stages.{name}.ema is a decay in [0, 1), got {self.ema}.")
        if not self.lr > 0:
            raise ValueError(f"stages.{name}.lr must be positive, got {self.lr}.")


@dataclass
class TokenizerStage(StageSettings):
    """discriminator_lr: learning rate of the discriminator where the objective has one. vae: folder or hub id
    of a diffusers AutoencoderKL whose weights a FlexTok's frozen VAE takes. frozen: modules and parameters of
    the tokenizer that do not learn (``[encoder, latent_tokens]``)."""

    discriminator_lr: float = 1e-4
    vae: str | None = None
    frozen: list[str] = field(default_factory=list)


@dataclass
class LMStage(StageSettings):
    """mixture: weights of the kinds of documents (`lexel.data.documents.Mixture`); drop: share of captions
    dropped for guidance; row_length: documents are packed into rows of this many tokens (0: one document per
    row, padded); text_vocabulary: ids of the byte-level BPE trained on the captions; text_tokenizer: a folder
    or hub id of a ready one instead; pattern: order of several codebooks in the sequence (null: the
    tokenizer's own); row_end: a token after each row of the picture; narrow: probability that a step trains
    a nested narrower network instead of the full one; captions_for_vocabulary: how many captions the BPE is
    trained on; frozen: modules and parameters that do not learn (``[model]``: only the heads do)."""

    mixture: dict[str, float] = field(default_factory=lambda: dict(MIXTURE))
    drop: float = 0.1
    row_length: int = 0
    text_vocabulary: int = 512
    text_tokenizer: str | None = None
    captions_for_vocabulary: int = 20000
    pattern: str | None = None
    row_end: bool = False
    narrow: float = 0.0
    frozen: list[str] = field(default_factory=list)


@dataclass
class DetokenizerStage(StageSettings):
    """steps_to_decode: solver steps of the sample grid (the detokenizer's own config says what users get)."""

    steps_to_decode: int = 8


@dataclass
class DrafterStage(LMStage):
    """distill: weight of the KL term to the frozen LM; 1 - distill weighs the cross-entropy on the data (a
    small LM). clip_by: what `clip` bounds, the gradient's ``norm`` or each ``value`` of it. For draft heads:
    noise: amplitude of the features' uniform noise at 512 tokens; token_weight: of the cross-entropy beside
    the feature loss (EAGLE-1 and 2); unroll, unroll_decay: steps of the training-time test and the weight of
    each relative to the one before (EAGLE-3)."""

    distill: float = 0.9
    clip_by: str = "norm"
    noise: float = 0.2
    token_weight: float = 0.1
    unroll: int = 7
    unroll_decay: float = 0.8

    def check(self, name: str) -> None:
        """See `StageSettings.check`."""
        super().check(name)
        if self.clip_by not in ("norm", "value"):
            raise ValueError(f"stages.{name}.clip_by must be norm or value, got {self.clip_by!r}.")
        if self.unroll < 1:
            raise ValueError(f"stages.{name}.unroll must be at least 1, got {self.unroll}.")


@dataclass
class Stages:
    """One block per stage; only those that the task names are read."""

    tokenizer: TokenizerStage = field(default_factory=TokenizerStage)
    lm: LMStage = field(default_factory=LMStage)
    detokenizer: DetokenizerStage = field(default_factory=DetokenizerStage)
    drafter: DrafterStage = field(default_factory=DrafterStage)


@dataclass
class Parts:
    """Folders or hub ids of already trained parts to use instead of those in `output`."""

    tokenizer: str | None = None
    lm: str | None = None
    detokenizer: str | None = None
    drafter: str | None = None


@dataclass
class Task:
    """stages: which of `STAGES` to run, in chain order."""

    stages: list[str] = field(default_factory=lambda: list(STAGES))

    def check(self) -> None:
        """Raise ValueError on an unknown or repeated stage."""
        if unknown := [stage for stage in self.stages if stage not in STAGES]:
            raise ValueError(f"task.stages names {unknown}; the stages are {', '.join(STAGES)}.")
        if not self.stages or len(set(self.stages)) != len(self.stages):
            raise ValueError(f"task.stages must name at least one stage, each once, got {self.stages}.")


@dataclass
class Codes:
    """folder: codes that `lexel tokenize` wrote, with `train` and `validation` inside (null: the run
    tokenizes its data itself). count: how many training pictures to tokenize (null: all); validation_count:
    the same for the validation split; workers, batch_size: of `tokenize_dataset`."""

    folder: str | None = None
    count: int | None = None
    validation_count: int = 512
    batch_size: int = 128
    workers: int = 1


@dataclass
class Evaluation:
    """prompts: held-out captions drawn and pictures described; sampling: per modality, the fields of
    `lexel.sample.logits.SamplingConfig`; dtype: floating type of the weights in the bundle."""

    prompts: int = 128
    batch_size: int = 64
    sampling: dict[str, dict[str, float]] = field(default_factory=dict)
    dtype: str = "float32"


@dataclass
class TrainerSettings:
    """Where the training runs. strategy: ``auto``, ``ddp`` or ``fsdp2``; devices: processes per machine;
    num_nodes: machines (start the same command on each, by SLURM or torchrun); backend: process group."""

    accelerator: str = "cpu"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    backend: str | None = None

    def check(self) -> None:
        """Raise ValueError on an unknown strategy or an empty machine."""
        if self.strategy not in ("auto", "ddp", "fsdp2"):
            raise ValueError(f"trainer.strategy must be auto, ddp or fsdp2, got {self.strategy!r}.")
        if self.devices < 1 or self.num_nodes < 1:
            raise ValueError(
                f"trainer needs devices and num_nodes >= 1, got {self.devices} and {self.num_nodes}."
            )
        if self.strategy == "auto" and self.devices * self.num_nodes > 1:
            raise ValueError("Several devices need trainer=ddp or trainer=fsdp2.")


@dataclass
class LoggerSettings:
    """metrics.csv is always written; wandb: also log to Weights & Biases (``WANDB_MODE=offline`` needs no
    account), into `project`, under `name` (null: the output folder's)."""

    wandb: bool = False
    project: str = "lexel"
    name: str | None = None


@dataclass
class Run:
    """Everything one ``lexel-train`` call is told. data, tokenizer, lm, detokenizer, drafter and objective
    hold the instantiated configs of their groups. examples: use only the first so many training pictures
    (null: all of them), for debugging. memory_mb: pictures kept in memory once they are drawn or read, in
    each process that loads data (0: none)."""

    task: Task = field(default_factory=Task)
    output: str = "outputs/train"
    seed: int = 0
    threads: int | None = None
    examples: int | None = None
    memory_mb: int = 512
    data: Any = None
    quantizer: Any = None
    tokenizer: Any = None
    lm: Any = None
    detokenizer: Any = None
    drafter: Any = None
    objective: Any = None
    optimizer: Any = None
    stages: Stages = field(default_factory=Stages)
    parts: Parts = field(default_factory=Parts)
    codes: Codes = field(default_factory=Codes)
    evaluation: Evaluation = field(default_factory=Evaluation)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    logger: LoggerSettings = field(default_factory=LoggerSettings)

    @property
    def folder(self) -> Path:
        """`output` as a path."""
        return Path(self.output)

    def check(self) -> None:
        """Raise ValueError on the first setting that makes no sense."""
        self.task.check()
        self.trainer.check()
        if self.examples is not None and self.examples < 1:
            raise ValueError(f"examples must be at least 1 (or null for all), got {self.examples}.")
        for name in self.task.stages:
            if name != "evaluate":
                getattr(self.stages, name).check(name)


def weight_settings(stage: StageSettings) -> dict[str, Any]:
    """The settings that decide the trained weights (all but `FREE`)."""
    return {f.name: getattr(stage, f.name) for f in dataclasses.fields(stage) if f.name not in FREE}
