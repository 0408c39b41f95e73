"""Tiny codecs and language models that the decoding tests share."""

import torch

from lexel.document import DocumentCodec, Image, Text
from lexel.models.causal_lm import CausalLMConfig
from lexel.tokenizers.layout import CodeLayout
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


def uncached(lm, codec, grammar, prompt, null, sampling, ids):
    """The distribution of each of the generated `ids` (column 0), from one uncached pass over everything; the
    reference for cached, batched and speculative decoding."""
    from lexel.document import TokenSequence
    from lexel.sample.logits import target_distribution
    from lexel.types import TokenBatch

    state, states = grammar.start(prompt), []
    places = []
    rows = ids if ids.ndim == 2 else ids[:, None]
    for token in rows[:, 0].tolist():
        states.append(state)
        places.append((grammar.modality(state), grammar.position(state)))
        state = grammar.advance(state, token)

    def logits(start):
        shift = len(start) - len(prompt)
        modality = torch.tensor([m for m, _ in places])
        positions = torch.tensor([(t + shift, row, column) for _, (t, row, column) in places])
        full = TokenSequence(
            torch.cat([start.ids, ids]),
            torch.cat([start.modality, modality]),
            torch.cat([start.positions, positions]),
            torch.zeros(len(start) + len(ids), dtype=torch.bool),
        )
        out = lm(TokenBatch(full.ids[None], full.modality[None], full.positions[None]))
        return out.logits[0, len(start) - 1 : -1]

    with torch.no_grad():
        cond, uncond = logits(prompt), None if null is None else logits(null)
        names = codec.vocabulary.modalities
        return torch.cat(
            [
                target_distribution(
                    cond[i : i + 1],
                    None if uncond is None else uncond[i : i + 1],
                    sampling[names[grammar.modality(s)]],
                    grammar.allowed(s)[None],
                )
                for i, s in enumerate(states)
            ]
        )
