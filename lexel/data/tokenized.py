"""Pictures as stored codes: write them once with a frozen tokenizer, train language models on them.

A folder holds `manifest.json` and numbered shards: `codes-00000.safetensors` (`indices` int32 ``[N, n, k]``,
and `lengths` int32 ``[N]`` for flexible tokenizers) with `codes-00000.jsonl` (key and captions per row)
beside it. Each file is written under another name and renamed, the tensors last, so a shard exists whole or
not at all: an interrupted run is started again with the same call and continues at the first missing shard.

N pictures · n positions · k codebooks
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset

from lexel.data.example import Example, stack_pixels
from lexel.data.store import Store, is_url
from lexel.errors import LexelError
from lexel.hub import write_atomically
from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes

if TYPE_CHECKING:
    from lexel.tokenizers.base import Tokenizer
    from lexel.tokenizers.fourm import FourMTokenizer
    from lexel.tokenizers.structured import StructuredCodec

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class CodeExample:
    """One tokenized picture: key and captions of its example, codes long ``[n, k]``, and for flexible
    tokenizers how many of the n positions are in use."""

    key: str
    captions: tuple[str, ...]
    codes: Tensor
    length: int | None = None

    def batch(self, layout: CodeLayout) -> Codes:
        """The codes as a batch of one picture."""
        lengths = None if self.length is None else torch.tensor([self.length])
        return Codes(self.codes[None], layout.grid, layout.scales, lengths)


@dataclass(frozen=True)
class Manifest:
    """What a folder of codes says of itself: the tokenizer's fingerprint and geometry (one of `grid`,
    `length`, `scales`; `flexible` as in `CodeLayout`), how many pictures, and where they come from."""

    fingerprint: str
    codebook_sizes: tuple[int, ...]
    count: int
    shard_size: int
    grid: tuple[int, int] | None = None
    length: int | None = None
    flexible: bool = False
    scales: tuple[tuple[int, int], ...] | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name in ("codebook_sizes", "grid", "scales"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.count // self.shard_size)

    def rows(self, shard: int) -> range:
        """The examples that belong to one shard."""
        return range(shard * self.shard_size, min(self.count, (shard + 1) * self.shard_size))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read a folder's manifest; LexelError when it is missing, damaged or of another format version."""
        path = folder / MANIFEST_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values.get("format_version") != FORMAT_VERSION:
                raise LexelError(
                    f"{path} has format version {values.get('format_version')}, this Lexel reads "
                    f"{FORMAT_VERSION}; run `lexel tokenize` again."
                )
            return cls(**values)
        except FileNotFoundError:
            raise LexelError(
                f"{folder} holds no {MANIFEST_FILE}; write codes there with `lexel tokenize`."
            ) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise LexelError(f"{path} is not a manifest of codes ({error}).") from error


class TokenizedDataset(Dataset[CodeExample]):
    """The codes in `folder`, map-style. Shards are read on first use (memory-mapped), in each worker by
    itself; of a folder in an object store (a URL) each is copied to this machine first, see `Store`.

    fingerprint: of the tokenizer that the codes must come from. Raises LexelError when they come from another
    one (naming both fingerprints), when a shard is missing or damaged.
    """

    def __init__(self, folder: str | Path, fingerprint: str | None = None) -> None:
        self.store = Store(str(folder)) if is_url(folder) else None
        self.folder = Path(folder) if self.store is None else self.store.folder
        if self.store is not None and MANIFEST_FILE in self.store.names:
            self.store.bring(MANIFEST_FILE)
        self.manifest = Manifest.read(self.folder)
        if fingerprint is not None and fingerprint != self.manifest.fingerprint:
            raise LexelError(
                f"{folder} holds codes of tokenizer {self.manifest.fingerprint}, not of {fingerprint}; "
                "tokenize the data again with this tokenizer."
            )
        missing = [i for i in range(self.manifest.shards) if not self._holds(_tensor_file(self.folder, i))]
        if missing:
            raise LexelError(
                f"{folder} lacks {len(missing)} of {self.manifest.shards} shards (first: {missing[0]}); "
                "run the same `lexel tokenize` again to finish it."
            )
        self._shards: dict[int, tuple[list[dict[str, Any]], dict[str, Tensor]]] = {}

    def __len__(self) -> int:
        return self.manifest.count

    def __getitem__(self, index: int) -> CodeExample:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.folder} holds {len(self)} pictures, got index {index}.")
        shard, row = divmod(index % len(self), self.manifest.shard_size)
        if shard not in self._shards:
            self._bring(_tensor_file(self.folder, shard), _text_file(self.folder, shard))
            self._shards[shard] = _read_shard(self.folder, shard, len(self.manifest.rows(shard)))
        texts, tensors = self._shards[shard]
        lengths = tensors.get("lengths")
        return CodeExample(
            texts[row]["key"],
            tuple(texts[row]["captions"]),
            tensors["indices"][row].long(),
            None if lengths is None else int(lengths[row]),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}

    def _holds(self, path: Path) -> bool:
        return path.is_file() if self.store is None else path.name in self.store.names

    def _bring(self, *paths: Path) -> None:
        for path in paths:
            if self.store is not None:
                self.store.bring(path.name)

    def captions(self) -> Iterator[str]:
        """Every caption of every picture, e.g. to train the text tokenizer on."""
        for shard in range(self.manifest.shards):
            self._bring(_text_file(self.folder, shard))
            for row in _read_texts(self.folder, shard):
                yield from row["captions"]


def tokenize_dataset(
    tokenizer: Tokenizer, dataset: Dataset[Example], folder: str | Path, **options: Any
) -> TokenizedDataset:
    """Write the codes and captions of every example of `dataset` into `folder`, and open them; options and
    errors of `write_codes`."""
    write_codes(tokenizer, dataset, folder, **options)
    return TokenizedDataset(folder, tokenizer.fingerprint())


def write_codes(
    tokenizer: Tokenizer,
    dataset: Dataset[Example],
    folder: str | Path,
    *,
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
    shard_size: int = 1024,
    source: Mapping[str, Any] | None = None,
    part: tuple[int, int] = (0, 1),
) -> int:
    """Write codes and captions into `folder`; finished shards are kept. Returns how many shards are missing.

    workers: on the CPU that many processes each encode whole shards with one thread (started by "spawn", so a
    script needs its ``if __name__ == "__main__"``); on another device that many threads load the pictures.
    source: plain values describing the data, kept in the manifest. part: ``(i, n)`` writes every n-th shard
    from the i-th on, so that n machines fill one folder. Raises LexelError when the folder holds codes of
    another tokenizer, or of data with another size or description.
    """
    folder = Path(folder)
    count = len(dataset)  # type: ignore[arg-type]
    if count < 1 or batch_size < 1 or shard_size < 1:
        raise ValueError(
            f"Tokenizing needs pictures and sizes of at least 1, got {count} pictures, "
            f"batch_size {batch_size}, shard_size {shard_size}."
        )
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"a part is (i, n) with 0 <= i < n, got {part}.")
    manifest = _open_folder(folder, _manifest_of(tokenizer, count, shard_size, source or {}))
    todo = [i for i in range(part[0], manifest.shards, part[1]) if not _tensor_file(folder, i).is_file()]
    job = partial(_write_shard, dataset=dataset, folder=folder, manifest=manifest, batch_size=batch_size)
    in_processes = torch.device(device).type == "cpu" and workers > 0
    with _evaluating(tokenizer, device):
        job = partial(job, tokenizer=tokenizer, threads=0 if in_processes else workers)
        done = _in_processes(job, todo, workers) if in_processes else map(job, todo)
        for _ in _track(done, len(todo)) if progress else done:
            pass
    return sum(not _tensor_file(folder, i).is_file() for i in range(manifest.shards))


class Encoder(Protocol):
    """What writes codes: a tokenizer, or a codec of structured values."""

    @property
    def layout(self) -> CodeLayout: ...
    def fingerprint(self) -> str: ...


def tokenize_values(
    codec: StructuredCodec | FourMTokenizer,
    dataset: Dataset[Example],
    values: Callable[[Example], Any],
    folder: str | Path,
    *,
    shard_size: int = 1024,
    source: Mapping[str, Any] | None = None,
) -> TokenizedDataset:
    """`tokenize_dataset` for structured values, and for those of 4M's tokenizers (class maps, feature maps,
    vectors): `values` says which an example has. Raises LexelError as that does, ValueError for values that
    the codec refuses."""
    folder = Path(folder)
    manifest = _open_folder(folder, _manifest_of(codec, len(dataset), shard_size, source or {}))  # type: ignore[arg-type]
    for shard in range(manifest.shards):
        if not _tensor_file(folder, shard).is_file():
            examples = [dataset[row] for row in manifest.rows(shard)]
            codes = _encode_values(codec, [values(example) for example in examples])
            texts = [_text(example) for example in examples]
            _save_shard(folder, shard, manifest, texts, codes.indices, codes.lengths)
    return TokenizedDataset(folder, manifest.fingerprint)


def _encode_values(codec: StructuredCodec | FourMTokenizer, values: Sequence[Any], batch: int = 64) -> Codes:
    if not isinstance(codec, torch.nn.Module):
        return codec.encode(values)
    device = next(codec.parameters()).device
    parts = [torch.stack(list(values[i : i + batch])).to(device) for i in range(0, len(values), batch)]
    return Codes(torch.cat([codec.encode_values(part).indices.cpu() for part in parts]))


@dataclass(frozen=True)
class CodeCheck:
    """Stored codes against their pictures. samples: pictures looked at; agreement: share of stored codes that
    encoding again gives; psnr: of the decoded stored codes against the pictures, in dB on the [0, 1] range;
    decoded_difference: largest difference between pictures decoded from stored and from new codes, [-1, 1]
    range.
    """

    samples: int
    agreement: float
    psnr: float
    decoded_difference: float

    @property
    def passed(self) -> bool:
        """True when at least 99 % agree: another batch size or device may turn a near tie, no more than
        that."""
        return self.agreement >= 0.99


@torch.no_grad()
def check_codes(
    folder: str | Path, tokenizer: Tokenizer, dataset: Dataset[Example], samples: int = 16
) -> CodeCheck:
    """Encode `samples` evenly spaced examples again and compare them with the stored codes, and decode both.

    Raises LexelError when the codes are another tokenizer's or when a stored key is not the data set's key.
    """
    stored = TokenizedDataset(folder, tokenizer.fingerprint())
    if len(stored) != len(dataset):  # type: ignore[arg-type]
        raise LexelError(f"{folder} holds {len(stored)} pictures, the data has {len(dataset)}.")  # type: ignore[arg-type]
    samples = min(samples, len(stored))
    rows = [i * len(stored) // samples for i in range(samples)]
    examples = [dataset[i] for i in rows]
    for i, example in zip(rows, examples):
        if stored[i].key != example.key:
            raise LexelError(
                f"{folder} row {i} was written for {stored[i].key!r}, the data has {example.key!r} there; "
                "the data changed, tokenize it again into an empty folder."
            )
    device = next(tokenizer.parameters()).device
    pixels = stack_pixels(examples).to(device)
    old = _stored_codes(stored, rows, device)
    with _evaluating(tokenizer, device):
        new = tokenizer.encode(pixels)
        decoded, decoded_new = tokenizer.decode(old), tokenizer.decode(new)
    difference = new.indices != old.indices
    if old.lengths is not None:
        inside = torch.arange(difference.shape[1], device=device) < old.lengths[:, None]
        difference = difference[inside]
    error = ((decoded.clamp(-1, 1) - pixels) / 2).square().mean().clamp_min(1e-10)
    return CodeCheck(
        samples,
        1.0 - difference.double().mean().item(),
        -10 * error.log10().item(),
        (decoded - decoded_new).abs().max().item(),
    )


@contextmanager
def _evaluating(tokenizer: Tokenizer, device: torch.device | str) -> Iterator[None]:
    """In eval mode on `device` for a while: the caller may be in the middle of training the tokenizer."""
    training, before = tokenizer.training, next(tokenizer.parameters()).device
    try:
        tokenizer.to(device).eval()
        yield
    finally:
        tokenizer.to(before).train(training)


def _stored_codes(stored: TokenizedDataset, rows: Sequence[int], device: torch.device) -> Codes:
    items = [stored[i] for i in rows]
    lengths = None if items[0].length is None else torch.tensor([item.length for item in items])
    indices = torch.stack([item.codes for item in items])
    return Codes(indices, stored.manifest.grid, stored.manifest.scales, lengths).to(device)


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(x) for x in value) if isinstance(value, (list, tuple)) else value


def _tensor_file(folder: Path, shard: int) -> Path:
    return folder / f"codes-{shard:05d}.safetensors"


def _text_file(folder: Path, shard: int) -> Path:
    return folder / f"codes-{shard:05d}.jsonl"


def _manifest_of(tokenizer: Encoder, count: int, shard_size: int, source: Mapping[str, Any]) -> Manifest:
    layout = tokenizer.layout
    return Manifest(
        tokenizer.fingerprint(),
        layout.codebook_sizes,
        count,
        shard_size,
        layout.grid,
        layout.length,
        layout.flexible,
        layout.scales,
        # Through JSON, so that a manifest compares equal to itself read back.
        json.loads(json.dumps(source)),
    )


def _open_folder(folder: Path, manifest: Manifest) -> Manifest:
    """Start a folder or continue one that agrees with `manifest` in everything."""
    path = folder / MANIFEST_FILE
    if path.is_file():
        found = Manifest.read(folder)
        if found.fingerprint != manifest.fingerprint:
            raise LexelError(
                f"{folder} holds codes of tokenizer {found.fingerprint}, not of {manifest.fingerprint}; "
                "choose another folder or delete this one."
            )
        for name in (f.name for f in fields(Manifest)):
            if getattr(found, name) != getattr(manifest, name):
                raise LexelError(
                    f"{folder} was begun with {name} {getattr(found, name)}, not {getattr(manifest, name)}; "
                    "choose another folder or delete this one."
                )
        return found
    text = json.dumps(asdict(manifest), indent=2) + "\n"
    write_atomically(path, lambda temporary: _write_text(temporary, text))
    return manifest


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


@torch.no_grad()
def _write_shard(
    shard: int,
    *,
    tokenizer: Tokenizer,
    dataset: Dataset[Example],
    folder: Path,
    manifest: Manifest,
    batch_size: int,
    threads: int = 0,
) -> int:
    """Encode one shard and write its two files, the tensors last; returns the number of pictures."""
    device = next(tokenizer.parameters()).device
    texts, indices, lengths = [], [], []
    rows = manifest.rows(shard)
    with ThreadPoolExecutor(threads) if threads > 0 else nullcontext() as pool:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            load = pool.map if pool is not None else map
            examples = list(load(dataset.__getitem__, batch))
            codes = tokenizer.encode(stack_pixels(examples).to(device)).to("cpu")
            texts += [_text(example) for example in examples]
            indices.append(codes.indices.int())
            if codes.lengths is not None:
                lengths.append(codes.lengths.int())
    _save_shard(folder, shard, manifest, texts, torch.cat(indices), torch.cat(lengths) if lengths else None)
    return len(rows)


def _text(example: Example) -> dict[str, Any]:
    return {"key": example.key, "captions": list(example.captions)}


def _save_shard(
    folder: Path,
    shard: int,
    manifest: Manifest,
    texts: Sequence[Mapping[str, Any]],
    indices: Tensor,
    lengths: Tensor | None,
) -> None:
    """Write a shard's two files, the tensors last."""
    tensors = {"indices": indices.int()}
    if lengths is not None:
        tensors["lengths"] = lengths.int()
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    write_atomically(_text_file(folder, shard), lambda path: _write_text(path, lines))
    metadata = {"fingerprint": manifest.fingerprint}
    write_atomically(_tensor_file(folder, shard), lambda path: save_file(tensors, path, metadata))


def _read_texts(folder: Path, shard: int) -> list[dict[str, Any]]:
    path = _text_file(folder, shard)
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise LexelError(
            f"{path} is missing or damaged ({error}); delete the shard and tokenize again."
        ) from error


def _read_shard(folder: Path, shard: int, rows: int) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    texts, path = _read_texts(folder, shard), _tensor_file(folder, shard)
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises its own error type for damaged headers
        raise LexelError(f"{path} is damaged ({error}); delete it and tokenize again.") from error
    if len(texts) != rows or len(tensors["indices"]) != rows:
        raise LexelError(
            f"{path} holds {len(tensors['indices'])} rows and {len(texts)} texts, expected {rows}."
        )
    return texts, tensors


_worker_job: partial[int] | None = None


def _start_worker(job: partial[int]) -> None:
    # Sent once per process: the network travels with it.
    global _worker_job
    torch.set_num_threads(1)
    _worker_job = job


def _run_worker(shard: int) -> int:
    assert _worker_job is not None
    return _worker_job(shard)


def _in_processes(job: partial[int], shards: Sequence[int], workers: int) -> Iterator[int]:
    if not shards:
        return
    # Not "fork": a parent that has used torch's threads may leave the child's locked.
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(shards))
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(job,)) as pool:
        futures = [pool.submit(_run_worker, shard) for shard in shards]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _track(done: Iterator[int], total: int) -> Iterator[int]:
    from rich.console import Console
    from rich.progress import track

    return iter(track(done, "Tokenizing", total, console=Console(stderr=True)))
