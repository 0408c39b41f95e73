"""Plain text files as documents of bounded length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch.utils.data import Dataset

from lexel.data.example import Example
from lexel.data.problems import OnError, Problems
from lexel.data.source import Split, check_share, check_split, split_keys
from lexel.document import TextTokenizer
from lexel.errors import LexelError

EXTENSIONS = (".txt", ".md")
Measure = Callable[[Sequence[str]], list[int]]
_SMALLEST = 8


@dataclass(frozen=True)
class TextConfig:
    """A UTF-8 text file, or a folder of ``.txt`` and ``.md`` files, cut into documents.

    max_tokens: a document is as many whole lines as fit; longer lines are cut at spaces. validation_share of
    the documents is held out by a hash of their names. on_error: a file that is not UTF-8, or empty, is
    counted, named and skipped ("skip") or refused ("raise").
    """

    root: str
    max_tokens: int = 256
    validation_share: float = 0.05
    on_error: OnError = "skip"

    def __post_init__(self) -> None:
        if self.max_tokens < _SMALLEST:
            raise ValueError(f"max_tokens must be at least {_SMALLEST}, got {self.max_tokens}.")
        check_share(self.validation_share)

    def build(self, split: Split, text_tokenizer: TextTokenizer | None = None) -> TextDataset:
        """The documents of one split, measured by `text_tokenizer`; without one a byte counts as a token,
        which a byte-level tokenizer never exceeds. LexelError when the path is missing or holds no text."""
        return TextDataset(self, split, text_tokenizer)


class TextDataset(Dataset[Example]):
    """See `TextConfig`. An example's one caption is the text; keys are ``<file>:<number>``."""

    def __init__(self, config: TextConfig, split: Split, text_tokenizer: TextTokenizer | None = None) -> None:
        self.config = config
        check_split(split)
        self.problems = Problems(config.root, config.on_error)
        measure = byte_lengths if text_tokenizer is None else _token_lengths(text_tokenizer)
        documents: dict[str, str] = {}
        for path in _files(Path(config.root).expanduser()):
            text = _read(path, self.problems)
            chunks = (chunk for chunk in cut_text(text, config.max_tokens, measure) if chunk.strip())
            documents |= {f"{path.name}:{number}": chunk for number, chunk in enumerate(chunks)}
        self.problems.report()
        keys = split_keys(list(documents), config.validation_share, split)
        if not keys:
            raise LexelError(f"{config.root} holds no text for the {split} split.")
        self.items = [(key, documents[key]) for key in keys]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        key, text = self.items[index]
        return Example(key, (text,), None)


def byte_lengths(texts: Sequence[str]) -> list[int]:
    """Length of each text in UTF-8 bytes."""
    return [len(text.encode()) for text in texts]


def cut_text(text: str, limit: int, measure: Measure) -> list[str]:
    """Cut `text` into pieces of at most `limit` by `measure`, as few as whole lines allow; joined they are
    the text again. A line that is too long is halved at a space (or anywhere) until its parts fit."""
    lines = _fitting(text.splitlines(keepends=True), limit, measure)
    pieces: list[str] = []
    total = limit + 1
    for line, size in zip(lines, measure(lines)):
        if total + size <= limit:
            pieces[-1] += line
            total += size
        else:
            pieces.append(line)
            total = size
    # A tokenizer may need more ids for joined lines than for each: measured once more.
    return _fitting(pieces, limit, measure)


def _fitting(pieces: list[str], limit: int, measure: Measure) -> list[str]:
    fitting: list[str] = []
    for piece, size in zip(pieces, measure(pieces)):
        if size <= limit or len(piece) < 2:
            fitting.append(piece)
        else:
            fitting += _fitting(_halves(piece), limit, measure)
    return fitting


def _halves(piece: str) -> list[str]:
    middle = len(piece) // 2
    for mark in ("\n", " "):
        cut = piece.find(mark, middle, len(piece) - 1) + 1
        if cut > 0:
            return [piece[:cut], piece[cut:]]
    return [piece[:middle], piece[middle:]]


def _token_lengths(tokenizer: TextTokenizer) -> Measure:
    return lambda texts: [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise LexelError(f"The text {root} does not exist.")
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())
    if not files:
        raise LexelError(f"{root} holds no {' or '.join(EXTENSIONS)} file.")
    return files


def _read(path: Path, problems: Problems) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problems.add("broken text", str(path), f"not UTF-8 (byte {error.start})")
        return ""
    if not text.strip():
        problems.add("empty text", str(path), "there is nothing in it")
    return text
