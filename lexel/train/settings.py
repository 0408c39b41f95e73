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

STAGES = ("tokenizer", "lm", "curriculum", "self_assess", "detokenizer", "drafter", "evaluate")
"""Every stage a task may name, in the order they run."""

PRECISIONS = ("32-true", "bf16-mixed")

MIXTURE = {
    "text_to_image": 1.0,
    "image_to_text": 1.0,
    "text": 0.0,
    "image": 0.0,
    "denoise": 0.0,
    "infill": 0.0,
}
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
        "recompute",
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
    workers: data loading processes. recompute: activation checkpointing, less memory for a third more
    arithmetic; compile: `torch.compile` of each block.
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
    recompute: bool = False
    compile: bool = False

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
    of a diffusers AutoencoderKL whose weights a FlexTok's frozen VAE takes. tower: folder or hub id of a CLIP
    or SigLIP whose weights a TokenFlow's semantic encoder starts from. frozen: modules and parameters of the
    tokenizer that do not learn (``[encoder, latent_tokens]``)."""

    discriminator_lr: float = 1e-4
    vae: str | None = None
    tower: str | None = None
    frozen: list[str] = field(default_factory=list)


@dataclass
class Share:
    """How one source of documents takes part in a language model's stage. source: which of the run's data
    sources it is read from (null: the one of its own name); weight: relative; mixture, drop: as in `LMStage`;
    pictures: so many captioned pictures make one document, in turn, with the loss on all of it (1: `mixture`
    decides); supervise: loss on the ``last`` segment of a document or on ``all``; modality: what the codes of
    its pictures are called in the vocabulary."""

    source: str | None = None
    weight: float = 1.0
    mixture: dict[str, float] = field(default_factory=lambda: dict(MIXTURE))
    drop: float = 0.1
    pictures: int = 1
    supervise: str = "last"
    modality: str = "image"

    @classmethod
    def read(cls, name: str, values: Any) -> Share:
        """The share that a configuration's plain `values` describe. ValueError for an unknown option."""
        known = [f.name for f in dataclasses.fields(cls)]
        if unknown := [key for key in values or {} if key not in known]:
            raise ValueError(f"sources.{name} has no option {unknown[0]!r}; it has {', '.join(known)}.")
        return cls(**(values or {}))

    def check(self, name: str) -> None:
        """Raise ValueError naming ``sources.<name>.<field>`` when a value makes no sense."""
        if not isinstance(self.weight, int | float):
            raise ValueError(f"sources.{name}.weight must be a number, got {self.weight!r}.")
        if self.pictures < 1:
            raise ValueError(f"sources.{name}.pictures must be at least 1, got {self.pictures}.")
        if self.supervise not in ("last", "all"):
            raise ValueError(f"sources.{name}.supervise must be last or all, got {self.supervise!r}.")


@dataclass
class AdapterSettings:
    """Low-rank weights that learn in place of the network's own (`lexel.train.adapters`). kind: ``none``,
    ``lora`` or ``slide_lora``; r: rank; alpha: the sum is scaled by alpha / r; dropout: of their input;
    targets: endings of the names of the layers that have them (none: every linear layer of the blocks, for
    ``slide_lora`` the attention's projections)."""

    kind: str = "none"
    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)

    def check(self, name: str) -> None:
        """Raise ValueError naming ``stages.<name>.adapter.<field>`` when a value makes no sense."""
        if self.kind not in ("none", "lora", "slide_lora"):
            raise ValueError(f"stages.{name}.adapter.kind is none, lora or slide_lora, got {self.kind!r}.")
        if self.r < 1 or not self.alpha > 0:
            raise ValueError(
                f"stages.{name}.adapter needs r >= 1 and alpha > 0, got {self.r} and {self.alpha}."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"stages.{name}.adapter.dropout lies in [0, 1), got {self.dropout}.")


@dataclass
class LMStage(StageSettings):
    """mixture: weights of the kinds of documents (`lexel.data.documents.Mixture`); drop: share of captions
    dropped for guidance; row_length: documents are packed into rows of this many tokens (0: one document
    per row, padded); text_vocabulary: ids of the byte-level BPE trained on the captions; text_tokenizer: a
    folder or hub id of a ready one instead; pattern: order of several codebooks in the sequence (null: the
    tokenizer's own); row_end: a token after each row of the picture; narrow: probability that a step trains
    a nested narrower network instead of the full one; captions_for_vocabulary: how many captions the BPE is
    trained on; frozen: modules and parameters that do not learn (``[model]``: only the heads do);
    trainable: groups or patterns of parameters that learn, all others rest (none: all of them; the groups are
    in `lexel.train.adapters`); adapter: LoRA and the rows of added ids learn, beside `trainable`; sources:
    which sources the documents come from, by name (``data`` is the run's `data`, the others are in its
    `sources`), instead of `data` alone with `mixture` and `drop`; bundle: a bundle whose language model,
    vocabulary and text tokenizer the stage starts from (`init` takes weights only)."""

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
    trainable: list[str] = field(default_factory=list)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    sources: dict[str, Any] = field(default_factory=dict)
    bundle: str | None = None

    def __post_init__(self) -> None:
        # Typed here and not in the schema, where Hydra could not add one on the command line.
        shares = {n: s if isinstance(s, Share) else Share.read(n, s) for n, s in self.sources.items()}
        self.sources = shares

    @property
    def partial(self) -> bool:
        """Whether the network is trained through weights that it is not exported with."""
        return self.adapter.kind != "none" or "new_rows" in self.trainable

    def check(self, name: str) -> None:
        """See `StageSettings.check`."""
        super().check(name)
        self.adapter.check(name)
        if self.narrow and self.adapter.kind != "none":
            raise ValueError(
                f"stages.{name}.narrow trains slices of plain weights; set it to 0 with an adapter."
            )
        for source, share in self.sources.items():
            share.check(source)


@dataclass
class SelfAssessStage(LMStage):
    """Rounds in which the model draws, an evaluator judges and the verdicts join the training data. rounds:
    how many, each of `steps` steps; captions: pictures drawn in a round; temperature: that they are drawn at;
    share: of the documents that are verdicts, the others are those of `mixture` or `sources`; held_out:
    captions that a round is measured on."""

    rounds: int = 1
    captions: int = 2048
    temperature: float = 1.0
    share: float = 0.5
    held_out: int = 128

    def check(self, name: str) -> None:
        """See `StageSettings.check`."""
        super().check(name)
        for key in ("rounds", "captions", "held_out"):
            if getattr(self, key) < 1:
                raise ValueError(f"stages.{name}.{key} must be at least 1, got {getattr(self, key)}.")
        if not 0 < self.share < 1:
            raise ValueError(f"stages.{name}.share lies between 0 and 1, got {self.share}.")
        if not self.temperature > 0:
            raise ValueError(f"stages.{name}.temperature must be positive, got {self.temperature}.")


@dataclass
class DetokenizerStage(StageSettings):
    """steps_to_decode: solver steps of the sample grid (the detokenizer's own config says what users get).
    distil: folder or hub id of a trained detokenizer that is distilled, instead of training the one that
    ``detokenizer`` describes, into one that is drawn in `steps_to_decode` steps; teacher_steps,
    teacher_guidance: how that one draws (null: its own guidance); times_per_pair: how often each of its
    drawings is learned from, since drawing costs more than learning."""

    steps_to_decode: int = 8
    distil: str | None = None
    teacher_steps: int = 25
    teacher_guidance: float | None = None
    times_per_pair: int = 4

    def check(self, name: str) -> None:
        """See `StageSettings.check`."""
        super().check(name)
        for key in ("steps_to_decode", "teacher_steps", "times_per_pair"):
            if getattr(self, key) < 1:
                raise ValueError(f"stages.{name}.{key} must be at least 1, got {getattr(self, key)}.")


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
    self_assess: SelfAssessStage = field(default_factory=SelfAssessStage)
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
    """folder: codes that `lexel tokenize` wrote, with `train` and `validation` inside, a local folder or a
    URL of an object store (null: the run tokenizes its data itself). count: how many training pictures to
    tokenize (null: all); validation_count: the same for the validation split; workers, batch_size: of
    `tokenize_dataset`."""

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
    sampling: dict[str, dict[str, Any]] = field(default_factory=dict)
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
class Curriculum:
    """Language model stages one after the other. order: their names; stages: the settings of each (those of
    an `LMStage`) where they differ from ``stages.lm``; every: settings that hold in all of them. A stage
    starts from the bundle that the one before it ends in (the first from the run's `bundle`, or a new
    network), or from `bundle`: an earlier stage's name, a folder or a hub id."""

    order: list[str] = field(default_factory=list)
    stages: dict[str, Any] = field(default_factory=dict)
    every: dict[str, Any] = field(default_factory=dict)


@dataclass
class AnyToAny:
    """Further modalities of the procedural scenes (`lexel.data.modalities`), for a model from any to any.

    modalities: besides the caption and the picture (none: the usual chain): the views segmentation, edges,
    depth, which get a tokenizer each, and boxes, palette, metadata, layers. segments: how likely documents of
    2, 3, … segments are. bins: steps of a box's coordinates. specialists: pairs such as ``text_to_image`` (or
    ``all``) for each of which a language model is trained alone, with the same settings. pairs: the language
    model itself sees these pairs only (none: random splits). count: held-out scenes of each figure of the
    report's matrix (0: no matrix)."""

    modalities: list[str] = field(default_factory=list)
    segments: list[float] = field(default_factory=lambda: [0.5, 0.3, 0.2])
    bins: int = 1000
    specialists: list[str] = field(default_factory=list)
    pairs: list[str] = field(default_factory=list)
    count: int = 64


@dataclass
class Run:
    """Everything one ``lexel-train`` call is told. data, tokenizer, lm, detokenizer, drafter and objective
    hold the instantiated configs of their groups. examples: use only the first so many training pictures
    (null: all of them), for debugging. memory_mb: pictures kept in memory once they are drawn or read, in
    each process that loads data (0: none). bundle: what to start from, a folder, a hub id or ``shipped``:
    the parts that the task trains go on from those of the bundle, the others are taken from it. sources:
    configs of further data sources by name, for ``stages.lm.sources``."""

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
    bundle: str | None = None
    sources: dict[str, Any] = field(default_factory=dict)
    curriculum: Curriculum = field(default_factory=Curriculum)
    codes: Codes = field(default_factory=Codes)
    evaluation: Evaluation = field(default_factory=Evaluation)
    any_to_any: AnyToAny = field(default_factory=AnyToAny)
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
            if hasattr(self.stages, name):
                stage = getattr(self.stages, name)
                stage.check(name)
                if self.trainer.strategy == "fsdp2" and isinstance(stage, LMStage) and stage.partial:
                    raise ValueError(
                        f"stages.{name} trains an adapter or single rows, which fsdp2 does not shard; use "
                        "trainer=ddp."
                    )


def weight_settings(stage: StageSettings) -> dict[str, Any]:
    """The settings that decide the trained weights (all but `FREE`)."""
    return {f.name: getattr(stage, f.name) for f in dataclasses.fields(stage) if f.name not in FREE}
