"""Trying a downloaded checkpoint: do its keys fit, and does a tokenizer draw the test pictures again?

The pictures are made here (`sample_pictures`), so nothing has to be downloaded: two scenes of coloured
shapes and a smooth colour gradient with fine, text-like marks.

b batch · h w picture
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lexel.catalog import Layout, Published, System, read
from lexel.data.shapes import ShapesConfig
from lexel.errors import LexelError
from lexel.evaluate.metrics import psnr, sound_quality
from lexel.models import published_systems as published_models
from lexel.sample.reconstruct import reconstruct_sound
from lexel.tokenizers import load_published, published_systems
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.sound import SoundConfig

LARGEST = 256  # pixels: tokenizers that take any size are tried at this one, which a laptop can do
LISTED = 10
SUSPICIOUS = 15.0  # dB: a trained tokenizer draws these pictures better


@dataclass(frozen=True)
class CheckpointReport:
    """What a checkpoint file holds, against what its published row needs.

    row, file, layout: which checkpoint, from where, under whose names. copy: which copy of the weights was
    read. found, ignored: how many keys of the file were read, and how many are known to hold nothing of
    this network; missing, unknown: keys that the file should have and lacks, and that fit nothing;
    misshaped: key → found and expected shape. dtypes: how many of the tensors read have which. parameters:
    of the network built; expected: of the published one (None where the file or `config` says otherwise).
    size: (h, w) of the test pictures; psnr: of each, in dB; published_psnr: what the reference states; note:
    what else to know.
    """

    row: str
    file: str
    layout: str
    copy: str
    found: int
    missing: tuple[str, ...]
    unknown: tuple[str, ...]
    misshaped: Mapping[str, str]
    ignored: int
    dtypes: Mapping[str, int]
    parameters: int
    expected: int | None
    size: tuple[int, int] | None = None
    psnr: Mapping[str, float] | None = None
    published_psnr: str = "not stated"
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether every key fits, the network has the published size, and what it draws are numbers."""
        fits = not (self.missing or self.unknown or self.misshaped)
        right_size = self.expected is None or self.parameters == self.expected
        return fits and right_size and all(map(math.isfinite, (self.psnr or {}).values()))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}

    def table(self) -> str:
        """The report as lines of text."""
        lines = [
            f"checkpoint       {self.file}",
            f"read as          {self.row}, {self.layout} layout, weights {self.copy}",
            f"keys             {self.found} found, {len(self.unknown)} unknown, {len(self.missing)} missing, "
            f"{len(self.misshaped)} of a wrong shape, {self.ignored} ignored",
            *(f"  unknown        {name}" for name in self.unknown[:LISTED]),
            *(f"  missing        {name}" for name in self.missing[:LISTED]),
            *(f"  wrong shape    {name}: {shapes}" for name, shapes in list(self.misshaped.items())[:LISTED]),
            "dtypes           " + ", ".join(f"{name} ({count})" for name, count in self.dtypes.items()),
            f"parameters       {self.parameters:,}"
            + ("" if self.expected is None else f" (published: {self.expected:,})"),
        ]
        if self.psnr is not None and self.size is not None:
            lines.append(f"test pictures    {self.size[0]}x{self.size[1]}")
            lines += [f"  {name:14} {value:.2f} dB" for name, value in self.psnr.items()]
        lines.append(f"published PSNR   {self.published_psnr}")
        if self.note:
            lines.append(f"note             {self.note}")
        return "\n".join([*lines, "passed" if self.passed else "FAILED"])


def verify_checkpoint(
    system: str,
    path: str | Path,
    row: str | None = None,
    config: Mapping[str, Any] | None = None,
    key: str | None = None,
    size: int | None = None,
) -> CheckpointReport:
    """Load the checkpoint at `path` as the published `row` of `system` and try it.

    row: may be left out where the system has one. config, key: see `load_published`. size: side of the test
    pictures; None: what the tokenizer was made for, at most 256 where it takes any.
    Raises LexelError for an unknown system or row, and as `read_checkpoint` for an unreadable file; keys that
    do not fit are reported, not raised.
    """
    entry, published = _choose(system, row)
    wanted = entry.config(published.arguments, entry.stored_config(Path(path)), config)
    if isinstance(wanted, SoundConfig):
        return _try_codec(published, path, config)
    found, copy = read(entry, path, key)
    stored = entry.as_stored(wanted, found)
    state = entry.fit(stored, found)
    with torch.device("meta"):  # at no cost, until the keys are known to fit
        model = stored.build()
    layout = entry.layout_for(model, state)
    keys = compare_keys(layout, model, state)
    pictures: dict[str, Any] = {}
    if not isinstance(model, Tokenizer):
        pictures = {
            "note": "names, shapes and sizes were checked; a model without its tokenizer draws nothing."
        }
    elif not (keys["missing"] or keys["unknown"] or keys["misshaped"]):
        model = stored.build().eval()
        layout.load(model, state, str(path))
        pictures = reconstruct(model, (size, size) if size else picture_size(model))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    whole = config is None and stored == wanted
    return CheckpointReport(
        row=published.name,
        file=str(path),
        layout=layout.name,
        copy=copy,
        **keys,
        parameters=parameters,
        expected=published.parameters if whole else None,
        published_psnr=published.psnr or "not stated",
        **pictures,
    )


def _try_codec(row: Published, path: str | Path, config: Mapping[str, Any] | None) -> CheckpointReport:
    """A sound codec's folder in transformers' format, whose names transformers itself matches, tried on a
    test sound."""
    model: Any = load_published(row.name, path, config)
    state = model.network.state_dict()
    wave = sample_sound(model.sample_rate)
    quality = sound_quality(reconstruct_sound(model, wave)[0], wave)
    return CheckpointReport(
        row=row.name,
        file=str(path),
        layout="transformers",
        copy="as stored",
        found=len(state),
        missing=(),
        unknown=(),
        misshaped={},
        ignored=0,
        dtypes=dict(Counter(str(value.dtype).removeprefix("torch.") for value in state.values())),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        expected=row.parameters,
        note=f"a test sound came back with SI-SDR {quality['si_sdr']:.1f} dB, SNR {quality['snr']:.1f} dB.",
    )


def sample_sound(rate: int) -> Tensor:
    """A second of three decaying tones, float ``[1, rate]`` in [-1, 1]; always the same."""
    time = torch.arange(rate) / rate
    tones = [
        torch.sin(2 * math.pi * hertz * time) * torch.exp(-fall * time)
        for hertz, fall in ((220, 1), (587, 3), (1175, 6))
    ]
    return 0.3 * sum(tones, torch.zeros(rate))[None]


def _choose(name: str, row: str | None) -> tuple[System, Published]:
    systems = published_systems() | published_models()
    if name not in systems:
        raise LexelError(f"there is no published system {name!r}; there are: {', '.join(systems)}.")
    rows = {one.name: one for one in systems[name].rows}
    if row is None and len(rows) > 1:
        raise LexelError(f"{name} has several checkpoints; say which with --name: {', '.join(rows)}.")
    if row is not None and row not in rows:
        raise LexelError(f"{name} has no checkpoint {row!r}; it has: {', '.join(rows)}.")
    return systems[name], rows[row or next(iter(rows))]


def compare_keys(layout: Layout, model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The report's fields about keys: the file's tensors against those of `model`."""
    expected = layout.shapes(model)
    needed = dict.fromkeys(layout.names(model).values())
    read = [name for name in needed if name in state]
    others = [name for name in state if name not in expected]
    ignored = [name for name in others if layout.is_idle(name)]
    return {
        "found": len(read),
        "missing": tuple(sorted(name for name in needed if name not in state)),
        "unknown": tuple(sorted(set(others) - set(ignored))),
        "misshaped": {
            name: f"{list(state[name].shape)}, expected {list(expected[name])}"
            for name in read
            if tuple(state[name].shape) != expected[name]
        },
        "ignored": len(ignored) + sum(name in state for name in set(expected) - set(needed)),
        "dtypes": dict(Counter(str(state[name].dtype).removeprefix("torch.") for name in read)),
    }


def picture_size(model: Tokenizer) -> tuple[int, int]:
    """(h, w) at which to try a tokenizer; those with a `downsampling` take any size: not at large ones."""
    step = getattr(model.config, "downsampling", 0)
    most = LARGEST // step * step if step else max(model.image_size)
    return min(model.image_size[0], most), min(model.image_size[1], most)


@torch.no_grad()
def reconstruct(model: Tokenizer, size: tuple[int, int]) -> dict[str, Any]:
    """The report's fields about pictures of `size`: PSNR of each after encoding and decoding."""
    quality = {}
    for name, picture in sample_pictures(size).items():
        try:
            drawn = model.decode(model.encode(picture[None]))
        except (LexelError, ValueError) as error:  # an encoder alone, a tokenizer of clips or of other things
            return {"note": f"no test picture was drawn: {error}"}
        quality[name] = float(psnr(drawn, picture[None])[0])
    note = ""
    if max(quality.values()) < SUSPICIOUS:
        note = f"below {SUSPICIOUS:g} dB on every picture: are these the trained weights, of this row?"
    return {"size": size, "psnr": quality, "note": note}


def sample_pictures(size: tuple[int, int]) -> dict[str, Tensor]:
    """Named pictures of `size` (h, w), each float ``[3, h, w]`` in [-1, 1]; always the same ones."""
    h, w = size
    scenes = ShapesConfig().build("validation")
    pictures = {f"shapes {i}": scenes.scene(i).render(max(size))[:, :h, :w] for i in range(2)}
    return {**pictures, "gradient": _gradient(h, w)}


def _gradient(h: int, w: int) -> Tensor:
    """A smooth change of colour, with rows of dark marks as fine as small print in the lower half."""
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    picture = torch.stack([x, y, 1 - (x + y) / 2])
    ink = torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    ink[3::4] = False  # between the lines
    rows, columns = (y * 32 - 16).long().clamp(0, 15), (x * 64).long().clamp(0, 63)
    marks = ink[rows, columns] & (y >= 0.5)
    return torch.where(marks, 0.1, picture) * 2 - 1
