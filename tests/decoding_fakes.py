"""Tiny codecs, language models and drafters that the decoding tests share."""

import itertools

import torch

from lexel.document import DocumentCodec, Image, Text
from lexel.models.causal_lm import CausalLMConfig
from lexel.models.eagle import EagleConfig
from lexel.models.neighbour_table import NeighbourTableConfig
from lexel.sample.draft_trees import TreeShape
from lexel.sample.drafters import (
    EagleDrafter,
    EagleStaticDrafter,
    EagleTreeDrafter,
    HeadsDrafter,
    JacobiDrafter,
    LookupDrafter,
    ModelDrafter,
    NestedDrafter,
    PacDrafter,
    TableDrafter,
    TableGuess,
)
from lexel.sample.logits import Distribution, target_distribution
from lexel.tokenizers.layout import CodeLayout
from lexel.types import TokenBatch
from lexel.vocabulary import Vocabulary


class Letters:
    """A text tokenizer of one id per character."""

    alphabet = "ab "

    def encode(self, text, *, add_special_tokens=False):
        return [self.alphabet.index(character) for character in text]

    def decode(self, token_ids):
        return "".join(self.alphabet[i] for i in token_ids)


def codec(layout, **options):
    vocabulary = Vocabulary.build(len(Letters.alphabet), {"image": layout.codebook_sizes}, **options)
    return DocumentCodec(vocabulary, Letters(), {"image": layout})


RASTER = CodeLayout((6,), grid=(2, 3))


def model(codec, seed=0, dtype=torch.float64, scale=0.4, **options):
    """A random model whose distributions are far from uniform, in eval mode."""
    vocabulary, layout = codec.vocabulary, codec.layouts["image"]
    options = {"future_heads": 2} | options
    if layout.columns > 1:
        offsets = tuple(int(vocabulary.block("image", j)[0]) for j in range(layout.k))
        options = {
            "head": "factorized",
            "codebook_sizes": layout.codebook_sizes,
            "code_offsets": offsets,
        } | options
    defaults = {
        "dim": 16,
        "layers": 2,
        "heads": 2,
        "ffn_dim": 32,
        "ffn_widths": (0.25, 1.0),
        "max_length": 64,
    }
    config = CausalLMConfig(vocabulary.size, **{**defaults, "pad_id": vocabulary.special["pad"], **options})
    lm = config.build().to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * scale)
    return lm


def prompts(codec, texts, unconditional=False):
    """Prompts that ask for a picture after each text."""
    write = codec.unconditional if unconditional else codec.prompt
    return [write([Text(text), Image.blank()]) for text in texts]


def uncached(lm, kit, grammar, prompt, null, sampling, ids):
    """The distribution of each of the generated `ids` (column 0), dense ``[l, v]``, from one uncached pass
    over everything; the reference for cached, batched and speculative decoding."""
    return _forced(lm, kit, grammar, prompt, null, sampling, ids)[0]


def log_probabilities(lm, kit, grammar, prompt, null, sampling, ids):
    """The logarithm of the probability of each generated position, all columns together: ``[l]``."""
    first, *further = _forced(lm, kit, grammar, prompt, null, sampling, ids)
    rows = ids if ids.ndim == 2 else ids[:, None]
    total = first.gather(1, rows[:, :1])[:, 0].log()
    for column, probs in enumerate(further, start=1):
        total = total + probs.gather(1, rows[:, column : column + 1])[:, 0].log()
    return total


def _forced(lm, kit, grammar, prompt, null, sampling, ids):
    """The distributions of each column at each generated position, given all ids before: dense ``[l, v]``."""
    states, places = [grammar.start(prompt)], []
    for token in (ids if ids.ndim == 1 else ids[:, 0]).tolist():
        places.append((grammar.modality(states[-1]), grammar.position(states[-1])))
        states.append(grammar.advance(states[-1], token))
    with torch.no_grad():
        passes = [_whole_pass(lm, prompt, prompt, places, ids)]
        passes += [] if null is None else [_whole_pass(lm, prompt, null, places, ids)]
    columns = []
    for column in range(kit.columns):
        parts = []
        for i, state in enumerate(states[:-1]):
            support = _support(kit, grammar, state, ids[i], column)
            at = support if column == 0 else torch.arange(len(support))
            if column and len(support) == 1:  # padding
                parts.append(Distribution.certain(support, kit.vocabulary.size))
                continue
            cond, uncond = [one[column][i : i + 1, at] for one in passes] + [None] * (2 - len(passes))
            config, step = sampling[kit.vocabulary.modalities[grammar.modality(state)]], grammar.step(state)
            config = (config if step is None else config.at(*step)).column(column)
            parts.append(target_distribution(cond, uncond, config, support, size=kit.vocabulary.size))
        columns.append(Distribution.cat(parts).dense())
    return columns


def _whole_pass(lm, prompt, start, places, ids):
    """Logits of each column at each generated position after `start`."""
    shift = len(start) - len(prompt)
    positions = torch.tensor([(t + shift, row, column) for _, (t, row, column) in places])
    modality = torch.cat([start.modality, torch.tensor([m for m, _ in places])])
    batch = TokenBatch(
        torch.cat([start.ids, ids])[None], modality[None], torch.cat([start.positions, positions])[None]
    )
    output = lm(batch)
    return [logits[0, len(start) - 1 : -1] for logits in (output.logits, *output.code_logits)]


def _support(kit, grammar, state, ids, column):
    """The ids that may stand in a column, given those before it."""
    if column == 0:
        return grammar.allowed(state).nonzero()[:, 0]
    books, pad = grammar.columns(state), torch.tensor([kit.vocabulary.special["pad"]])
    name = kit.vocabulary.modalities[grammar.modality(state)]
    if not books or books[column] is None:
        return pad
    code = books[0] is None or int(ids[0]) in kit.vocabulary.block(name, books[0])
    return kit.vocabulary.block(name, books[column]) if code else pad


def little(kit, like):
    """A smaller random model to draft with, in the dtype of another."""
    return model(kit, seed=9, dim=8, layers=1).to(next(like.parameters()).dtype)


def table(kit):
    """A random table of neighbours."""
    layout = kit.layouts["image"]
    built = NeighbourTableConfig(layout.codebook_sizes, layout.grid, layout.length).build()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return built


def eagle(like):
    """A random draft head for another model."""
    head = EagleConfig(like.config.vocab_size, like.config.dim, heads=2, ffn_dim=32).build()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    head.adopt_embedding(like.model.embed_tokens.weight)
    return head.to(next(like.parameters()).dtype).eval()


BRANCHED = TreeShape.of([(0,), (1,), (0, 0), (0, 1), (1, 0)])


# Every way to draft: (target, codec, depth of a draft) -> drafter. `model` gives the target the heads for
# later tokens that "heads" needs.
DRAFTERS = {
    "plain": lambda lm, kit, window: None,
    "nested": lambda lm, kit, window: NestedDrafter(lm, 0.25, window),
    "model": lambda lm, kit, window: ModelDrafter(little(kit, lm), window),
    "model-guided": lambda lm, kit, window: ModelDrafter(little(kit, lm), window, guided=True),
    "sjd": lambda lm, kit, window: JacobiDrafter(window, coupling="independent"),
    "sjd-repeat": lambda lm, kit, window: JacobiDrafter(window, "repeat", "independent"),
    "jacobi": lambda lm, kit, window: JacobiDrafter(window),
    "jacobi-repeat": lambda lm, kit, window: JacobiDrafter(window, "repeat"),
    "jacobi-table": lambda lm, kit, window: JacobiDrafter(window, TableGuess(table(kit))),
    "gumbel": lambda lm, kit, window: JacobiDrafter(window, coupling="gumbel"),
    "gumbel-repeat": lambda lm, kit, window: JacobiDrafter(window, "repeat", "gumbel"),
    "pac": lambda lm, kit, window: PacDrafter(window, 2, 1),
    "pac-wide": lambda lm, kit, window: PacDrafter(window, 3, min(2, window)),
    "heads": lambda lm, kit, window: HeadsDrafter(lm, window),
    "lookup": lambda lm, kit, window: LookupDrafter(window),
    "table": lambda lm, kit, window: TableDrafter(table(kit), window),
    "eagle": lambda lm, kit, window: EagleDrafter(lm, eagle(lm), window),
    "eagle-tree": lambda lm, kit, window: EagleTreeDrafter(lm, eagle(lm), window, 2, 5),
    "eagle-static": lambda lm, kit, window: EagleStaticDrafter(lm, eagle(lm), BRANCHED.clipped(window)),
}
# Those that draft several codes per position; of codes that are delayed all but the table.
SEVERAL_CODES = [name for name in DRAFTERS if name.split("-")[0] not in ("pac", "eagle")]
DELAYED_CODES = [name for name in SEVERAL_CODES if name != "table"]
# Gumbel noise is compared as a whole vector, which cannot be split into a few outcomes.
COUNTABLE = [name for name in DRAFTERS if not name.startswith("gumbel")]


def whole_sequences(kit, grammar, prompt):
    """Every sequence the grammar allows after a prompt: long ``[l]`` or ``[l, k]``."""
    partial = [([], grammar.start(prompt))]
    while partial:
        line, state = partial.pop()
        if grammar.done(state):
            rows = torch.tensor(line)
            yield rows[:, 0] if kit.columns == 1 else rows
            continue
        for token in grammar.allowed(state).nonzero()[:, 0].tolist():
            after, first = grammar.advance(state, token), torch.tensor([token])
            further = [_support(kit, grammar, state, first, c).tolist() for c in range(1, kit.columns)]
            partial += [([*line, ids], after) for ids in itertools.product([token], *further)]
