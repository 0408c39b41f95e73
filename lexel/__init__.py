"""Lexel: discrete visual tokenizers and autoregressive any-to-any models.

The public names load on first use, so `import lexel` itself takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lexel.document import Document, Image, Text
    from lexel.errors import LexelError
    from lexel.sample.logits import SamplingConfig
    from lexel.sample.pipeline import Pipeline
    from lexel.types import Codes, GenerationOutput

__version__ = "0.1.0"

__all__ = [
    "Codes",
    "Document",
    "GenerationOutput",
    "Image",
    "LexelError",
    "Pipeline",
    "SamplingConfig",
    "Text",
    "__version__",
]

_HOMES = {
    "Codes": "lexel.types",
    "Document": "lexel.document",
    "GenerationOutput": "lexel.types",
    "Image": "lexel.document",
    "LexelError": "lexel.errors",
    "Pipeline": "lexel.sample.pipeline",
    "SamplingConfig": "lexel.sample.logits",
    "Text": "lexel.document",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lexel' has no attribute {name!r}; it has {', '.join(__all__)}.")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
