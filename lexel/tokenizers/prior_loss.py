"""LARP's autoregressive prior (arXiv 2410.21264, github.com/hywang66/LARP): a small causal transformer that
learns beside a tokenizer to predict its next code, and whose loss reaches the encoder, so that codes become
easier to predict for the language model that comes later. It works on the codes of any tokenizer with one
code per position; the network is used in training only.

The prediction is a vector, compared with all rows of the codebook: with `cosine` the logits lie in [-1, 1],
so the cross-entropy of K codes cannot fall below ``ln(1 + (K - 1) e^-2)`` (7.01 nats of 9.01 for 8,192
codes): the value is a regulariser, no perplexity.

b batch · n positions · d width of a code · K codebook size
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class PriorConfig:
    """Sizes of the network (published: "gptc-S") and how its loss is taken.

    max_length: most positions. dropout: of the input, of each block's outputs; attention_dropout: of the
    attention (published code applies it in eval mode too, here it is for training only). cosine: predictions
    have unit length. rounds: predictions made one after another, each on inputs of which a part is drawn from
    the one before; average: the loss is the mean over the rounds, else that of the last; last_only: earlier
    rounds pass no gradient on and count nothing. mix: the share of drawn inputs, reached after `ramp` of the
    training (a share too; 0: at once). temperature: of the logits.
    Raises ValueError for values that make no sense.
    """

    width: int = 384
    layers: int = 12
    heads: int = 6
    max_length: int = 1024
    dropout: float = 0.1
    attention_dropout: float = 0.1
    cosine: bool = True
    rounds: int = 2
    average: bool = True
    last_only: bool = False
    mix: float = 0.5
    ramp: float = 0.3
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the prior's width of {self.width}.")
        if self.rounds < 1 or not self.temperature > 0:
            raise ValueError(
                f"rounds must be at least 1 and temperature positive, got {self.rounds}, {self.temperature}."
            )
        if not 0 <= self.mix <= 1 or not 0 <= self.ramp <= 1:
            raise ValueError(f"mix and ramp are shares in [0, 1], got {self.mix} and {self.ramp}.")

    def build(self, dim: int) -> CodePrior:
        """The prior with fresh weights, for codes of width `dim`."""
        return CodePrior(self, dim)

    def mixed(self, progress: float) -> float:
        """The share of drawn inputs after `progress` of the training (0..1)."""
        return self.mix if progress >= self.ramp else self.mix * progress / self.ramp


class CausalAttention(nn.Module):
    """Causal self-attention ``[b, n, w] -> [b, n, w]`` with three separate projections."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.key = nn.Linear(width, width)
        self.query = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        q, k, v = (
            rearrange(layer(x), "b n (g e) -> b g n e", g=self.heads)
            for layer in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.proj(rearrange(mixed, "b g n e -> b n (g e)"))


class PriorBlock(nn.Module):
    """A pre-norm block ``[b, n, w] -> [b, n, w]``."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        width = config.width
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)
        self.attn = CausalAttention(width, config.heads, config.attention_dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x + self.drop(self.attn(self.ln1(x)))
        return x + self.drop(self.mlp(self.ln2(x)))


class CodePrior(nn.Module):
    """See the module docstring. Parameter names are the published ones (`prior_model.*`)."""

    def __init__(self, config: PriorConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.input_proj = nn.Linear(dim, config.width)
        self.pos_emb = nn.Parameter(0.02 * torch.randn(1, config.max_length, config.width))
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(PriorBlock(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes ``[b, n, d]`` to what comes after each of them, ``[b, n, d]``.
        Raises ValueError for more than `max_length` positions."""
        n = codes.shape[1]
        if n > self.config.max_length:
            raise ValueError(f"the prior has {self.config.max_length} positions, got {n} codes.")
        x = self.drop(self.input_proj(codes) + self.pos_emb[:, :n])
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))

    def predict(self, codes: Tensor) -> Tensor:
        """Codes ``[b, n, d]`` to a prediction of each from those before it, ``[b, n, d]``, of unit length
        with `cosine`. The first one is given."""
        predicted = torch.cat([codes[:, :1], self(codes[:, :-1])], 1)
        return F.normalize(predicted, dim=-1) if self.config.cosine else predicted

    def logits(self, predicted: Tensor, rows: Tensor) -> Tensor:
        """Predictions ``[b, n, d]`` against the codebook ``[K, d]``: ``[b, n - 1, K]`` of positions 1 on."""
        return predicted[:, 1:] @ rows.T / self.config.temperature

    def loss(
        self,
        codes: Tensor,
        indices: Tensor,
        rows: Tensor,
        progress: float,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy (scalar, nats) of codes 1 to n - 1, and `prior_accuracy`, the share that the first
        round guesses right.

        codes: float ``[b, n, d]``, quantized with a straight-through gradient, through which the loss reaches
        the encoder; indices: long ``[b, n]``, the same codes; rows: the codebook ``[K, d]``, a constant here;
        progress: share of the training that is done, for the ramp.
        """
        config, rows, targets = self.config, rows.detach(), indices[:, 1:]
        drawn_here = _uniform(targets.shape, codes.device, generator) < config.mixed(progress)
        inputs, losses, accuracy = codes, [], codes.new_zeros(())
        for number in range(config.rounds):
            silent = config.last_only and number < config.rounds - 1
            with torch.set_grad_enabled(torch.is_grad_enabled() and not silent):
                logits = self.logits(self.predict(inputs), rows).float()
            if not silent:
                losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
            if number == 0:
                accuracy = (logits.argmax(-1) == targets).float().mean()
            if number < config.rounds - 1:
                drawn = F.embedding(_draw(logits, generator), rows).to(codes.dtype)
                inputs = torch.cat([codes[:, :1], torch.where(drawn_here[..., None], drawn, codes[:, 1:])], 1)
        loss = torch.stack(losses).mean() if config.average else losses[-1]
        return loss, {"prior_accuracy": accuracy.detach()}


def _uniform(shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Drawn on the generator's own device."""
    where = device if generator is None else generator.device
    return torch.rand(shape, generator=generator, device=where).to(device)


@torch.no_grad()
def _draw(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One code per position: ``[b, n, K]`` to long ``[b, n]``."""
    where = logits.device if generator is None else generator.device
    chances = rearrange(logits.softmax(-1), "b n k -> (b n) k").to(where)
    drawn = torch.multinomial(chances, 1, generator=generator).to(logits.device)
    return rearrange(drawn, "(b n) 1 -> b n", b=len(logits))
