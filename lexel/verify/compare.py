"""Recomputing every tensor that a fixture records, and saying how far ours are off.

The rule: integers must be identical; a float tensor agrees when max |ours - theirs| <= 1e-4 * max |theirs|
(for an all-zero tensor, when ours is within 1e-6 of zero). A recorded tensor that is neither an input nor
recomputed is a failure.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexel.errors import LexelError
from lexel.verify.fixture import CONFIG_FILE, IO_FILE, Fixture

RELATIVE = 1e-4
ZERO = 1e-6

# System → the function that recomputes its recorded tensors: Fixture → name → tensor.
SYSTEMS = {
    "flextok": "flextok:flextok",
    "fourm_vq": "fourm:vq",
    "fourm_vq_semseg": "fourm:vq",
    "fourm_vq_featuremap": "fourm:vq",
    "fourm_vq_global": "fourm:vq",
    "fourm_divae": "fourm:divae",
    "llamagen_vq": "vq:llamagen",
    "titok": "titok:titok",
    "one_d_piece": "titok:one_d_piece",
    "janus_vq": "vq:janus",
    "open_magvit2_lfq": "open_magvit2:image",
    "open_magvit2_video": "open_magvit2:video",
    "ibq": "ibq:ibq",
    "chameleon_vq": "chameleon:chameleon",
    "emu3_vq": "emu3:emu3",
    "fqgan_dual": "factorized:dual",
    "fqgan_triple": "factorized:triple",
    "elm_bae": "bae:bae",
    "seed": "seed:seed",
    "seed_reverse": "seed:seed_reverse",
    "lantern": "lantern:lantern",
    "eagle_head": "eagle:heads",
    "llamagen_gpt_c2i": "raster:llamagen_c2i",
    "llamagen_gpt_t2i": "raster:llamagen_t2i",
    "larp": "larp:larp",
    "larp_ar": "raster:larp",
    "fqgan_ar_dual": "raster_columns:fqgan_dual",
    "fqgan_ar_triple": "raster_columns:fqgan_triple",
    "elm_ar": "raster_columns:elm",
    "open_magvit2_ar": "raster_columns:open_magvit2",
    "liquid": "liquid:liquid",
    "liquid_llama": "liquid:liquid",
    "lavit": "lavit:lavit",
    "tokenflow": "tokenflow:clip",
    "tokenflow_siglip": "tokenflow:siglip",
}
Recompute = Callable[[Fixture], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Comparison:
    """One recorded tensor: `status` is ``equal`` (integers), ``close``, ``input``, ``different`` or
    ``missing``; absolute and relative are the largest errors (None where nothing was compared);
    reason: why not, in words."""

    name: str
    status: str
    absolute: float | None = None
    relative: float | None = None
    reason: str = ""

    @property
    def passed(self) -> bool:
        """Whether this tensor speaks for the implementation (or was only an input)."""
        return self.status in ("equal", "close", "input")


@dataclass(frozen=True)
class Report:
    """All tensors of a fixture, sub-folders included."""

    system: str
    folder: str
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Whether something was compared and everything agrees."""
        compared = any(comparison.status != "input" for comparison in self.comparisons)
        return compared and all(comparison.passed for comparison in self.comparisons)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "system": self.system,
            "folder": self.folder,
            "passed": self.passed,
            "rule": f"integers identical; floats max|a-b| <= {RELATIVE:g} * max|b|",
            "tensors": [asdict(comparison) for comparison in self.comparisons],
        }

    def table(self) -> str:
        """One line per tensor and a verdict."""
        width = max(len(comparison.name) for comparison in self.comparisons)
        lines = [f"{'tensor':{width}}  {'max abs':>9}  {'relative':>9}  status"]
        for one in self.comparisons:
            numbers = ["" if value is None else f"{value:.2e}" for value in (one.absolute, one.relative)]
            reason = f": {one.reason}" if one.reason else ""
            lines.append(f"{one.name:{width}}  {numbers[0]:>9}  {numbers[1]:>9}  {one.status}{reason}")
        failed = sum(not one.passed for one in self.comparisons)
        compared = sum(one.status not in ("input", "missing") for one in self.comparisons)
        verdict = "passed" if self.passed else f"FAILED ({failed} of {len(self.comparisons)})"
        rule = f"integers identical, floats max|a-b| <= {RELATIVE:g} max|b|"
        return "\n".join([*lines, f"{self.system}: {compared} tensors compared, {verdict} ({rule})"])


def verify(system: str, folder: str | Path) -> Report:
    """Recompute the fixture in `folder` and in those of its sub-folders that are fixtures.
    Raises LexelError for an unknown system or a folder that is no fixture."""
    if system not in SYSTEMS:
        raise LexelError(f"there is no system {system!r} to verify; there are: {', '.join(sorted(SYSTEMS))}.")
    folder = Path(folder)
    inner = sorted(
        path.parent for path in folder.glob(f"*/{IO_FILE}") if (path.parent / CONFIG_FILE).is_file()
    )
    own = [folder] if (folder / IO_FILE).is_file() or not inner else []
    comparisons: list[Comparison] = []
    for one in own + inner:
        prefix = "" if one == folder else f"{one.name}/"
        comparisons += verify_folder(system, one, prefix)
    return Report(system, str(folder), tuple(comparisons))


def verify_folder(system: str, folder: Path, prefix: str = "") -> list[Comparison]:
    """The comparisons of one folder, names after `prefix`."""
    name, function = SYSTEMS[system].split(":")
    module = import_module(f"lexel.verify.{name}")
    recompute: Recompute = getattr(module, function)
    with tempfile.TemporaryDirectory() as scratch:
        # Records that are not a network's come in a form of their own.
        fixture: Fixture = getattr(module, "FIXTURE", Fixture)(folder, Path(scratch))
        with _one_thread():
            ours = recompute(fixture)
    return [
        compare(prefix + name, ours.get(name), expected, name in fixture.inputs)
        for name, expected in sorted(fixture.recorded.items())
    ]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums split over threads are rounded differently, and an entropy at temperature 0.01 magnifies that some
    600 times (IBQ). One thread gives the same numbers on any number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def compare(name: str, ours: Tensor | None, expected: Tensor, is_input: bool = False) -> Comparison:
    """Judge one tensor by the module's rule."""
    if ours is None:
        if is_input:
            return Comparison(name, "input")
        return Comparison(name, "missing", reason="this version does not recompute it")
    ours = ours.detach().cpu()
    if ours.shape != expected.shape and ours.numel() == expected.numel() == 1:
        ours = ours.reshape(expected.shape)  # a scalar, recorded as [] or [1]
    if ours.shape != expected.shape:
        return Comparison(
            name, "different", reason=f"shape {list(ours.shape)}, recorded {list(expected.shape)}"
        )
    if not expected.is_floating_point():
        wrong = int((ours.long() != expected.long()).sum())
        reason = f"{wrong} of {expected.numel()} differ" if wrong else ""
        return Comparison(name, "different" if wrong else "equal", reason=reason)
    absolute = float((ours.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    scale = float(expected.double().abs().max()) if expected.numel() else 0.0
    relative = absolute / scale if scale else None
    close = relative <= RELATIVE if relative is not None else absolute <= ZERO
    return Comparison(name, "close" if close else "different", absolute, relative)
