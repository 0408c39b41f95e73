"""Data: procedural scenes, folders, shards, text, pre-tokenized codes, documents and packing.

A source is a frozen config whose ``build("train" | "validation")`` gives a map-style data set of `Example`.
"""

from lexel.data.clip_folder import ClipFolderConfig
from lexel.data.clips import ClipsConfig
from lexel.data.documents import DocumentDataset, Mixture
from lexel.data.example import Example, stack_pixels
from lexel.data.folder import FolderConfig
from lexel.data.packing import pack
from lexel.data.sampler import Draw, DrawnDataset, ResumableSampler
from lexel.data.shapes import ShapesConfig
from lexel.data.shards import ShardsConfig
from lexel.data.text import TextConfig
from lexel.data.text_tokenizer import train_text_tokenizer
from lexel.data.tokenized import CodeExample, TokenizedDataset, check_codes, tokenize_dataset

__all__ = [
    "ClipFolderConfig",
    "ClipsConfig",
    "CodeExample",
    "DocumentDataset",
    "Draw",
    "DrawnDataset",
    "Example",
    "FolderConfig",
    "Mixture",
    "ResumableSampler",
    "ShapesConfig",
    "ShardsConfig",
    "TextConfig",
    "TokenizedDataset",
    "check_codes",
    "pack",
    "stack_pixels",
    "tokenize_dataset",
    "train_text_tokenizer",
]
