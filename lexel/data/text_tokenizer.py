"""A small byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) trained on a data set's own captions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BYTES = 256


def train_text_tokenizer(captions: Iterable[str], vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A text tokenizer with at most `vocab_size` ids: the 256 bytes and the most frequent merges.

    Any text is encodable and ``decode(encode(text)) == text``. It has no special tokens: those belong to
    `lexel.vocabulary.Vocabulary`. The result saves with ``save_pretrained``. ValueError below 256 ids.
    """
    if vocab_size < BYTES:
        raise ValueError(f"vocab_size must be at least {BYTES} (one id per byte), got {vocab_size}.")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        # A hash set on the other side; sorted, the ids of the bytes are the same in every run.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
