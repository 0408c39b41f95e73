"""The same language model in transformers: what `benchmarks.sampling` compares with.

Weights are shared, not copied, wherever both keep them in the same form (everywhere: the parameter names are
equal). Only the rotary table is ours, because ours has three axes; looking it up costs transformers less than
computing its own.

b batch · l positions · e head width · v vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lexel.document import TokenSequence
from lexel.errors import LexelError
from lexel.models.causal_lm import CausalLM
from lexel.sample.logits import SamplingConfig
from lexel.sample.pipeline import Pipeline
from lexel.types import TokenBatch


class RotaryTable(nn.Module):
    """cos and sin ``[l, e]`` of every position of one kind of sequence, for transformers' attention."""

    def __init__(self, lm: CausalLM, positions: Tensor) -> None:
        super().__init__()
        halves = (table[0, 0] for table in lm.rotary(positions[None]))
        self.cos, self.sin = (torch.cat((half, half), dim=-1) for half in halves)

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states ``[b, l, d]`` (for their dtype) and indices ``[b or 1, l]`` to ``[b or 1, l, e]``."""
        return self.cos[position_ids].to(x.dtype), self.sin[position_ids].to(x.dtype)


class Allow(nn.Module):
    """A logits processor: everything but the ids of pictures is impossible."""

    def __init__(self, allowed: Tensor) -> None:
        super().__init__()
        zeros = torch.zeros(allowed.shape, device=allowed.device)
        self.penalty = zeros.masked_fill_(~allowed, float("-inf"))

    def forward(self, ids: Tensor, scores: Tensor) -> Tensor:
        """``[b, v] -> [b, v]``."""
        return scores + self.penalty


class Peer:
    """transformers' `generate()` on a pipeline's language model (float32): one code per position, a fixed
    number of codes per picture. Raises LexelError for models that it cannot express."""

    def __init__(self, pipeline: Pipeline) -> None:
        layout = pipeline.codec.layouts["image"]
        if pipeline.lm.head is not None or layout.flexible or layout.row_end:
            raise LexelError(
                "transformers' generate() is compared on plain rasters of one code per position."
            )
        self.pipeline, self.steps = pipeline, layout.steps
        self.device = pipeline.device
        self.allowed = pipeline.codec.vocabulary.mask("image").to(self.device)
        self.name = "Qwen3ForCausalLM" if pipeline.lm.config.qk_norm else "LlamaForCausalLM"

    def model(self, prompt: TokenSequence) -> Any:
        """A `Qwen3ForCausalLM` or `LlamaForCausalLM` for sequences that begin with as many tokens as
        `prompt`, on the pipeline's own weights."""
        import transformers

        config, lm = self.pipeline.lm.config, self.pipeline.lm
        sizes: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "hidden_size": config.dim,
            "intermediate_size": config.hidden_width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.key_heads,
            "head_dim": config.head_width,
            "max_position_embeddings": config.max_length,
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            "pad_token_id": config.pad_id,
        }
        made_of = getattr(transformers, self.name.replace("ForCausalLM", "Config"))(**sizes)
        with torch.device("meta"):
            model = getattr(transformers, self.name)(made_of)
        state = {
            k: v for k, v in lm.state_dict(keep_vars=True).items() if k.startswith(("model.", "lm_head."))
        }
        if config.tie_embeddings:
            state["lm_head.weight"] = lm.model.embed_tokens.weight
        model.load_state_dict(state, assign=True)
        model.model.rotary_emb = RotaryTable(lm, self._positions(prompt))
        return model.eval()

    def _positions(self, prompt: TokenSequence) -> Tensor:
        """Long ``[l, 3]`` of the prompt and the picture behind it."""
        slots = self.pipeline.codec.scripts["image"][1]
        picture = [(len(prompt) + i, slot.row, slot.column) for i, slot in enumerate(slots)]
        return torch.cat([prompt.positions, torch.tensor(picture)]).to(self.device)

    @torch.no_grad()
    def check(self, prompt: TokenSequence) -> float:
        """Largest difference between both models' logits over a prompt and a random picture."""
        ids = self.allowed.nonzero()[:, 0][
            torch.randint(int(self.allowed.sum()), (self.steps,)).to(self.device)
        ]
        ids = torch.cat([prompt.ids, ids.cpu()])[None].to(self.device)
        batch = TokenBatch(ids, torch.zeros_like(ids), self._positions(prompt)[None])
        return float((self.pipeline.lm(batch).logits - self.model(prompt)(ids).logits).abs().max())

    def prepare(
        self, prompts: Sequence[TokenSequence], nulls: Sequence[TokenSequence] | None, config: SamplingConfig
    ) -> Any:
        """A call that draws: ``() -> ids [b, steps]``. Prompts (and null prompts) must be of one length, so
        that nothing is padded. Everything that `generate` need not do for each batch is done here."""
        from transformers import UnbatchedClassifierFreeGuidanceLogitsProcessor

        model = self.model(prompts[0])
        ids = torch.stack([prompt.ids for prompt in prompts]).to(self.device)
        options: dict[str, Any] = {
            "max_new_tokens": self.steps,
            "do_sample": config.temperature > 0,
            "eos_token_id": None,
        }
        if config.temperature > 0:
            options |= {name: getattr(config, name) for name in ("temperature", "top_k", "top_p")}
        null_ids: Any = None
        if nulls is not None:
            null_ids = torch.stack([null.ids for null in nulls]).to(self.device)
        twin = (
            None if nulls is None else self.model(nulls[0])
        )  # the same weights, the null prompt's positions

        def draw() -> Tensor:
            processors: list[Any] = []
            if twin is not None:
                scale = config.guidance
                processors.append(UnbatchedClassifierFreeGuidanceLogitsProcessor(scale, twin, null_ids))
            processors.append(Allow(self.allowed))
            found = model.generate(
                ids, attention_mask=torch.ones_like(ids), logits_processor=processors, **options
            )
            return found[:, ids.shape[1] :]

        return draw
