"""Training a language model: tokens per second and peak memory against transformers' model of the same size.

Both train in the same loop (same documents, AdamW, clipping, precision, threads) from the same weights: the
first loss of both must agree. Three forms are timed, interleaved, so that a busy machine slows all alike:

* `transformers`: `LlamaForCausalLM` on padded batches with an attention mask and labels of -100 where nothing
  is to be learned;
* `lexel`: `CausalLM` on the same padded batches, logits only where a target is predicted;
* `lexel, packed`: the documents packed into rows of `--row` tokens, attention document by document.

Tokens are those of documents, without padding. `mfu` is the share of this machine's own matrix rate (see
`lexel.train.flops`). Peak memory is measured in a process per form.

    python -m benchmarks.train_lm [--model small] [--dtype bfloat16] [--quick] [--json FILE]

r rows · l row length · v vocabulary
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import resource
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from lexel.data.packing import pack
from lexel.document import TokenSequence
from lexel.errors import LexelError
from lexel.models.backbones import exported
from lexel.models.causal_lm import CausalLM, CausalLMConfig
from lexel.train.flops import matrix_rate, tokens, training_flops
from lexel.train.objectives.lm import NextTokenObjective, predicting
from lexel.types import TokenBatch

# dim, layers, heads, feed-forward, vocabulary
SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "debug": (64, 2, 2, 128, 512),
    "tiny": (256, 6, 4, 704, 2048),
    "small": (512, 8, 8, 1408, 8704),
    "300m": (1024, 20, 16, 2816, 40960),
}
CODES = {"debug": 16, "tiny": 64, "small": 256, "300m": 576}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMS = ("transformers", "lexel", "lexel, packed")
PAD, EOI = 0, 1
CAPTION = (4, 40)
"""Fewest and most tokens of a caption."""

Step = Callable[[], Tensor]


def documents(count: int, codes: int, vocabulary: int, seed: int) -> list[TokenSequence]:
    """Random captions and pictures: half the documents draw (targets: the codes), half describe (targets: the
    caption), as `lexel-train task=lm` mixes them."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        caption = draw.randint(*CAPTION)
        length = caption + codes + 3
        ids = torch.tensor([draw.randrange(2, vocabulary) for _ in range(length)])
        loss = torch.zeros(length, dtype=torch.bool)
        loss[-(codes + 1) if number % 2 else -(caption + 1) :] = True
        positions = torch.zeros(length, 3, dtype=torch.long)
        positions[:, 0] = torch.arange(length)
        made.append(TokenSequence(ids, torch.zeros(length, dtype=torch.long), positions, loss))
    return made


def padded(sequences: Sequence[TokenSequence], pad: int = PAD) -> TokenBatch:
    """Right-padded rows, causal attention."""

    def stack(name: str) -> Tensor:
        parts = [getattr(sequence, name) for sequence in sequences]
        return nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=pad)

    return TokenBatch(
        stack("ids"), stack("modality"), stack("positions"), loss_mask=stack("loss_mask").bool()
    )


class Contest:
    """Both models with their optimizers, and one batch in both forms."""

    def __init__(self, options: argparse.Namespace, forms: Sequence[str] = FORMS) -> None:
        dim, layers, heads, ffn, vocabulary = SIZES[options.model]
        self.options, self.device = options, options.device
        self.dtype = DTYPES[options.dtype]
        sequences = documents(options.batch, CODES[options.model], vocabulary, options.seed)
        longest = max(map(len, sequences))
        self.batches = {
            "lexel": padded(sequences).to(self.device),
            "lexel, packed": pack(sequences, options.row or 4 * longest, PAD).to(self.device),
        }
        torch.manual_seed(options.seed)
        config = CausalLMConfig(
            vocabulary, dim=dim, layers=layers, heads=heads, ffn_dim=ffn, tie_embeddings=False, pad_id=PAD
        )
        self.lm = config.build().to(self.device).train()
        self.objective = NextTokenObjective(("text",)).to(self.device)
        self.losses: dict[str, Step] = {}
        self.steps: dict[str, Step] = {}
        for form in forms:
            network = _twin(self.lm) if form == "transformers" else self.lm
            self.losses[form] = self._theirs(network) if network is not self.lm else self._ours(form)
            self.steps[form] = self._step(network, self.losses[form])

    def _ours(self, form: str) -> Step:
        batch = self.batches[form]

        def loss() -> Tensor:
            return self.objective(self.lm(batch, select=predicting(batch)), batch)[0]

        return loss

    def _theirs(self, network: Any) -> Step:
        batch = self.batches["lexel"]
        assert batch.loss_mask is not None
        labels = batch.ids.masked_fill(~batch.loss_mask, -100)
        mask = (batch.ids != PAD).long()

        def loss() -> Tensor:
            return network(input_ids=batch.ids, attention_mask=mask, labels=labels, use_cache=False).loss

        return loss

    def _step(self, network: nn.Module, loss: Step) -> Step:
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

        def step() -> Tensor:
            with torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
                value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return value.detach()

        return step

    def check(self) -> None:
        """Raises LexelError unless all forms have the same loss before they begin."""
        with torch.no_grad(), torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32):
            losses = {form: float(loss()) for form, loss in self.losses.items()}
        first = losses["transformers"]
        worst = max(abs(value - first) for value in losses.values())
        if worst > (0.05 if self.dtype != torch.float32 else 1e-3) * first:
            raise LexelError(f"the models are not the same: their first losses are {losses}.")

    def rows(self, memory: dict[str, float]) -> list[dict[str, Any]]:
        """The figures of every form, medians of interleaved steps."""
        seconds: dict[str, list[float]] = {form: [] for form in self.steps}
        for number in range(self.options.repeats + 1):
            for form, step in self.steps.items():
                start = time.perf_counter()
                float(step())  # waits for the device
                if number:  # the first warms up
                    seconds[form].append(time.perf_counter() - start)
        rate = matrix_rate(self.device, self.dtype)
        read = int(tokens(self.batches["lexel"], PAD))
        middle = {form: median(times) for form, times in seconds.items()}
        rows = []
        for form, value in middle.items():
            batch = self.batches["lexel, packed" if form == "lexel, packed" else "lexel"]
            ratios = [theirs / ours for theirs, ours in zip(seconds["transformers"], seconds[form])]
            rows.append(
                {
                    "form": form,
                    "tokens_per_second": read / value,
                    "ratio_to_transformers": median(ratios),
                    "mfu": float(training_flops(self.lm, batch)) / value / rate,
                    "peak_memory_mb": memory.get(form),
                    "seconds_per_step": value,
                }
            )
        return rows


def _twin(lm: CausalLM) -> Any:
    """transformers' `LlamaForCausalLM` with the weights of `lm`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs: Any = LlamaForCausalLM(LlamaConfig.from_dict(exported(lm.config, "llama")))
    theirs.load_state_dict(lm.state_dict())
    return theirs.to(next(lm.parameters()).device).train()


def peak_memory(options: argparse.Namespace, form: str) -> float:
    """Megabytes that a process which trains one form needs at most, over what it needs to start (on CUDA:
    what is allocated there)."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return float(pool.apply(_peak, (options, form)))


def _peak(options: argparse.Namespace, form: str) -> float:
    torch.set_num_threads(options.threads)
    import transformers.models.llama.modeling_llama  # noqa: F401  # both pay for the import

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    contest = Contest(options, [form])
    if form == "transformers":
        contest.lm.to("meta")
    for _ in range(3):
        float(contest.steps[form]())
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    made = common.parser("Training a language model against transformers.", "train_lm")
    made.add_argument("--model", choices=SIZES, default="small")
    made.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="autocast, or float32 throughout")
    made.add_argument("--batch", type=int, default=8, help="documents per step")
    made.add_argument(
        "--row", type=int, help="tokens of a packed row (default: four of the longest document)"
    )
    made.add_argument("--repeats", type=int, default=9, help="timed steps of each form")
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = made.parse_args(arguments)
    if options.quick:
        options.model, options.repeats, options.batch = "debug", 3, 4
    torch.set_num_threads(options.threads)
    memory = {form: peak_memory(options, form) for form in FORMS}
    contest = Contest(options)
    contest.check()
    rows = contest.rows(memory)
    parameters = sum(p.numel() for p in contest.lm.parameters())
    headings = ("form", "tokens/s", "to transformers", "mfu", "peak MB")
    lines = [
        (
            row["form"],
            f"{row['tokens_per_second']:.0f}",
            f"{row['ratio_to_transformers']:.2f}×",
            f"{row['mfu']:.1%}",
            f"{row['peak_memory_mb']:.0f}",
        )
        for row in rows
    ]
    about = f"{parameters / 1e6:.1f} million parameters, {options.dtype}, {options.batch} documents a step"
    facts = {"model": options.model, "parameters": parameters, "dtype": options.dtype, "rows": rows}
    common.report(options, facts, about, common.table(headings, lines))


if __name__ == "__main__":
    common.run(main)
