"""Captions as LlamaGen's text-conditional models read them: cleaned twice, through the encoder of Flan-T5-XL,
the last hidden states of at most 120 tokens (arXiv 2406.06525; the cleaning is DeepFloyd IF's and PixArt's).

f width of the features · l tokens of a caption
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import torch
from torch import Tensor

from lexel.errors import LexelError

Repair = Callable[[str], str]

FLAN_T5_XL = "google/flan-t5-xl"
LONGEST = 120
"""Tokens of a caption that are read."""

_DOMAIN = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
_FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_DASHES = (
    r"\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030\u30A0"
    r"\uFE31\uFE32\uFE58\uFE63\uFF0D"
)
# Pattern and replacement, in order: before HTML tags are taken out, …
_LINKS = (
    ("<person>", "person"),
    (rf"\b((?:https?:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN}))", ""),
    (rf"\b((?:www:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_DOMAIN}))", ""),
)
# … after that, …
_SIGNS = (
    (r"@[\w\d]+\b", ""),  # names
    (r"[\u31c0-\u31ef\u31f0-\u31ff\u3200-\u32ff\u3300-\u33ff\u3400-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff]+", ""),
    (rf"[{_DASHES}]+", "-"),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # addresses
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{_FILES})", ""),
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]{1,}", " "),
    (r"\s+\.\s+", " "),
)
# … and after character references are resolved.
_REST = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # article numbers: jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{_FILES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes: 10x20
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
)


def compose(text: str) -> str:
    """Letters and their accents as one character each (NFC)."""
    return unicodedata.normalize("NFC", text)


def clean_caption(caption: str, repair: Repair = compose) -> str:
    """What LlamaGen's encoder is given for `caption`. repair: mends broken encodings; the publisher's code
    uses ``ftfy.fix_text``, which differs from the default on damaged text alone."""
    return _cleaned(_cleaned(caption, repair), repair)


def _cleaned(caption: str, repair: Repair) -> str:
    text = _substituted(unquote_plus(caption).strip().lower(), _LINKS)
    text = _substituted(_Text.of(text), _SIGNS)
    if len(re.findall(r"[-_]", text)) > 3:  # this-is-my-cute-cat
        text = re.sub(r"[-_]", " ", text)
    text = html.unescape(html.unescape(repair(text))).strip()
    return _substituted(text, _REST).strip()


def _substituted(text: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


class _Text(HTMLParser):
    """The text of an HTML document, without its tags, comments, scripts and styles."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent = 0

    @classmethod
    def of(cls, document: str) -> str:
        parser = cls()
        parser.feed(document)
        parser.close()
        return "".join(parser.parts)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.silent += tag in ("script", "style", "template")

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in ("script", "style", "template") and self.silent > 0

    def handle_data(self, data: str) -> None:
        if not self.silent:
            self.parts.append(data)


class CaptionEncoder:
    """A T5 encoder and its tokenizer, from transformers; repair: see `clean_caption`."""

    def __init__(self, tokenizer: Any, encoder: torch.nn.Module, repair: Repair = compose) -> None:
        self.tokenizer, self.encoder, self.repair = tokenizer, encoder.eval(), repair

    @classmethod
    def from_pretrained(
        cls, name: str | Path = FLAN_T5_XL, *, dtype: torch.dtype = torch.float32, repair: Repair = compose
    ) -> CaptionEncoder:
        """From a local folder or a hub id in transformers' format (safetensors). Raises LexelError when
        either part cannot be loaded."""
        from transformers import AutoTokenizer, T5EncoderModel

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(name))
            encoder = T5EncoderModel.from_pretrained(str(name), dtype=dtype, use_safetensors=True)
        except (OSError, ValueError, ImportError) as error:
            raise LexelError(f"caption encoder {name} could not be loaded: {error}") from error
        return cls(tokenizer, encoder, repair)

    def to(self, device: torch.device | str) -> CaptionEncoder:
        """The same, there."""
        self.encoder.to(device)
        return self

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Features float ``[l, f]`` of each caption, l its own tokens, at most 120, padding left out: what
        `lexel.sample.conditional.draw` takes."""
        batch = self.tokenizer(
            [clean_caption(caption, self.repair) for caption in captions],
            max_length=LONGEST,
            padding=True,
            truncation=True,
            return_tensors="pt",
        )
        device = next(self.encoder.parameters()).device
        ids, mask = batch["input_ids"].to(device), batch["attention_mask"].to(device)
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return [features[real] for features, real in zip(hidden, mask.bool())]


def left_padded(features: Sequence[Tensor], length: int = LONGEST) -> tuple[Tensor, Tensor]:
    """Features ``[l, f]`` of each caption as LlamaGen's code has them: ``[b, length, f]`` with zeros before
    them, and the mask float ``[b, length]``, 1 where a feature stands."""
    padded = features[0].new_zeros(len(features), length, features[0].shape[1])
    mask = padded.new_zeros(len(features), length)
    for row, one in enumerate(features):
        padded[row, length - len(one) :] = one
        mask[row, length - len(one) :] = 1
    return padded, mask
