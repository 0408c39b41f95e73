"""Quantizers: vector-quantize-pytorch behind one contract (see `base`)."""

from lexel.tokenizers.quantizers.base import Quantizer, code_statistics, nearest_code
from lexel.tokenizers.quantizers.config import QuantizerConfig

__all__ = ["Quantizer", "QuantizerConfig", "code_statistics", "nearest_code"]
