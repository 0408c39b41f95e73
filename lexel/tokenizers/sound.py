"""Sound: the residual codecs EnCodec, Mimi, DAC and X-codec, on transformers' networks.

Papers: EnCodec 2210.13438, Mimi (Moshi) 2410.00037, DAC 2306.06546, X-codec 2408.17175. The networks are
transformers', so the numbers are too; what is added is Lexel's form of the codes: `Codes` ``[b, n, k]``, one
position per frame, k residual codebooks (coarse first), in any pattern of `CodeLayout`. The sequential one
writes the streams as MIO does its speech: content, then each stream of timbre (arXiv 2409.17692). MIO's own
SpeechTokenizer has no network in transformers; X-codec and Mimi are of its kind: a speech model teaches what
their codes hold.

A checkpoint is a folder (or hub id) in transformers' format. Codecs that divide each second by its loudness
(EnCodec at 48 kHz, stereo) are refused: their codes alone do not say how loud the sound was.

Licences: transformers' code Apache-2.0; of the weights see each row.

b batch · t samples · n frames · k codebooks
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexel.catalog import Published, System
from lexel.errors import LexelError
from lexel.hub import Pretrained, read_config, resolve_folder
from lexel.tokenizers.layout import PATTERNS, CodeLayout
from lexel.types import Codes

Pattern = Literal["parallel", "interleaved", "delayed", "sequential"]


@dataclass(frozen=True)
class SoundConfig:
    """A codec and how its codes are used.

    network: transformers' config of the codec, its `model_type` (encodec, mimi, dac or xcodec) included.
    codebooks: how many of the residual codebooks are used, from the coarsest (None: all). pattern: how a
    language model sees them (`CodeLayout.pattern`). frames: of the longest sound in a document; with the
    delayed pattern every sound has exactly as many.
    Raises ValueError for an unknown codec or pattern.
    """

    network: dict[str, Any]
    codebooks: int | None = None
    pattern: Pattern = "parallel"
    frames: int = 1500

    def __post_init__(self) -> None:
        if self.network.get("model_type") not in CODECS:
            raise ValueError(
                f"the codec must be one of {', '.join(CODECS)}, got {self.network.get('model_type')!r}."
            )
        if self.pattern not in PATTERNS:
            raise ValueError(f"pattern must be one of {', '.join(PATTERNS)}, got {self.pattern!r}.")
        if self.frames < 1:
            raise ValueError(f"a sound has at least one frame, got frames={self.frames}.")

    def build(self) -> SoundTokenizer:
        """The tokenizer with fresh weights."""
        return SoundTokenizer(self)


class SoundTokenizer(nn.Module, Pretrained):
    """Sound to codes and back. ``encode_sound: [b, 1, t] -> Codes [b, n, k]``, ``decode_sound`` the way back,
    at `sample_rate` samples and `frame_rate` frames a second.

    Laws: both are deterministic, and a row of a batch equals that row alone, whatever the lengths of the
    others: rows of different lengths never pass through the network together (only EnCodec at 24 kHz and Mimi
    are causal, and even they look at the padding of a last frame that is not full).
    Raises LexelError for a codec that its codes alone do not describe, ValueError for more codebooks than it
    has.
    """

    model_type: ClassVar[str] = "sound"
    config_class: ClassVar[type] = SoundConfig
    config: SoundConfig

    def __init__(self, config: SoundConfig) -> None:
        super().__init__()
        self.config, self.codec = config, CODECS[config.network["model_type"]]
        self.network = build_network(config.network)
        settings = self.network.config
        if getattr(settings, "normalize", False) or getattr(settings, "chunk_length_s", None):
            raise LexelError(
                "this codec divides each chunk by its loudness, which its codes do not hold; sound cannot be "
                "made from them (EnCodec at 24 and 32 kHz can)."
            )
        most = self.codec.codebooks(settings)
        used = most if config.codebooks is None else config.codebooks
        if not 1 <= used <= most:
            raise ValueError(f"this codec has {most} codebooks, {used} were asked for.")
        self.sample_rate: int = getattr(settings, "sampling_rate", None) or settings.sample_rate
        self.hop: int = self.codec.hop(settings)
        sizes = (settings.codebook_size,) * used
        self.layout = CodeLayout(
            sizes, length=config.frames, flexible=config.pattern != "delayed", pattern=config.pattern
        )

    @property
    def frame_rate(self) -> float:
        """Positions per second of sound."""
        return self.sample_rate / self.hop

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """Codes per codebook in use."""
        return self.layout.codebook_sizes

    @property
    def bandwidth(self) -> float:
        """Kilobits per second of the codes."""
        return self.frame_rate * sum(map(math.log2, self.codebook_sizes)) / 1000

    has_decoder = True
    draws_pixels = False

    @torch.no_grad()
    def encode_sound(self, wave: Tensor, lengths: Tensor | None = None) -> Codes:
        """Float ``[b, 1, t]`` in [-1, 1] at `sample_rate` to codes ``[b, n, k]``. lengths: long ``[b]``,
        samples in use of each row; the codes then have `lengths`, too, and what lies behind them is 0.
        Raises ValueError on another shape and on lengths outside of the wave."""
        if wave.ndim != 3 or wave.shape[1] != 1 or not wave.is_floating_point() or not wave.shape[2]:
            raise ValueError(
                f"a sound must be float [b, 1, t] in [-1, 1], got {wave.dtype} {list(wave.shape)}."
            )
        if lengths is None:
            return Codes(self._encode(wave))
        if lengths.shape != wave.shape[:1] or not bool(((lengths >= 1) & (lengths <= wave.shape[2])).all()):
            raise ValueError(
                f"lengths must be {len(wave)} numbers in 1..{wave.shape[2]}, got {lengths.tolist()}."
            )
        rows = _by_length(lengths, lambda chosen, length: self._encode(wave[chosen, :, :length]))
        used = torch.tensor([len(row) for row in rows], device=wave.device)
        return Codes(nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths=used)

    @torch.no_grad()
    def decode_sound(self, codes: Codes) -> Tensor:
        """Codes ``[b, n, k]`` to float ``[b, 1, t]`` in about [-1, 1] (not clamped), t about n times `hop`:
        cut it to the sound's own length. Rows with `lengths` are followed by silence. Fewer codebooks than in
        use may be given, from the coarsest. Raises ValueError for codes that the codec does not have."""
        indices = codes.indices
        sizes = torch.tensor(self.codebook_sizes[: indices.shape[2]], device=indices.device)
        if indices.shape[2] > len(self.codebook_sizes) or bool(((indices < 0) | (indices >= sizes)).any()):
            raise ValueError(
                f"codes must be [b, n, k] of codebooks {self.codebook_sizes}, got {list(indices.shape)} in "
                f"{int(indices.min())}..{int(indices.max())}."
            )
        if codes.lengths is None:
            return self._decode(indices)
        rows = _by_length(codes.lengths, lambda chosen, length: self._decode(indices[chosen, :length]))
        longest = max(row.shape[-1] for row in rows)
        return torch.stack([F.pad(row, (0, longest - row.shape[-1])) for row in rows])

    def _encode(self, wave: Tensor) -> Tensor:
        codes = self.codec.encode(self.network, wave, len(self.codebook_sizes))
        return codes.transpose(1, 2).contiguous()

    def _decode(self, indices: Tensor) -> Tensor:
        return self.codec.decode(self.network, indices.transpose(1, 2))

    # What a tokenizer of pictures has; commands that need one ask for it.

    @property
    def image_size(self) -> NoReturn:
        """Raises LexelError: there is none."""
        raise LexelError("this tokenizer reads sounds, not pictures (lexel reconstruct SOUND.wav).")

    def encode(self, *_: Any) -> NoReturn:
        """Raises LexelError: see `encode_sound`."""
        raise LexelError("this tokenizer reads sounds, not pictures; use encode_sound.")

    def decode(self, *_: Any) -> NoReturn:
        """Raises LexelError: see `decode_sound`."""
        raise LexelError("this tokenizer makes sounds, not pictures; use decode_sound.")


def _by_length(lengths: Tensor, run: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
    """The rows of a batch, passed through `run` together with those of the same length."""
    rows: dict[int, Tensor] = {}
    for length in lengths.unique().tolist():
        chosen = (lengths == length).nonzero()[:, 0]
        rows |= dict(zip(chosen.tolist(), run(chosen, length)))
    return [rows[number] for number in range(len(lengths))]


# The codecs: what their transformers classes call things


@dataclass(frozen=True)
class Codec:
    """One of transformers' codecs. network: its class; codebooks, hop: of its config; encode: network, wave
    ``[b, 1, t]`` and number of codebooks to codes ``[b, k, n]``; decode: network and codes to wave."""

    network: str
    codebooks: Callable[[Any], int]
    hop: Callable[[Any], int]
    encode: Callable[[Any, Tensor, int], Tensor]
    decode: Callable[[Any, Tensor], Tensor]


def _whole_frames(network: Any, wave: Tensor) -> Tensor:
    """Padded with silence to whole frames, as the feature extractors of DAC and X-codec do."""
    return F.pad(wave, (0, -wave.shape[2] % network.config.hop_length))


def _bandwidth(network: Any, codebooks: int) -> float:
    """The least of a network's bandwidths that has so many codebooks: it knows no other numbers."""
    found = network.quantizer.get_num_quantizers_for_bandwidth
    return next(rate for rate in sorted(network.config.target_bandwidths) if found(rate) >= codebooks)


def _encode_encodec(network: Any, wave: Tensor, k: int) -> Tensor:
    return network.encode(wave, bandwidth=_bandwidth(network, k), return_dict=True).audio_codes[0][:, :k]


def _decode_encodec(network: Any, codes: Tensor) -> Tensor:
    return network.decode(codes[None], [None], return_dict=True).audio_values


def _encode_mimi(network: Any, wave: Tensor, k: int) -> Tensor:
    return network.encode(wave, num_quantizers=k, return_dict=True).audio_codes


def _decode_mimi(network: Any, codes: Tensor) -> Tensor:
    return network.decode(codes, return_dict=True).audio_values


def _encode_dac(network: Any, wave: Tensor, k: int) -> Tensor:
    return network.encode(_whole_frames(network, wave), k, return_dict=True).audio_codes


def _decode_dac(network: Any, codes: Tensor) -> Tensor:
    return network.decode(audio_codes=codes, return_dict=True).audio_values[:, None]


def _encode_xcodec(network: Any, wave: Tensor, k: int) -> Tensor:
    rate = _bandwidth(network, k)
    return network.encode(_whole_frames(network, wave), rate, return_dict=True).audio_codes[:, :k]


def _decode_xcodec(network: Any, codes: Tensor) -> Tensor:
    return network.decode(codes, return_dict=True).audio_values


CODECS = {
    "encodec": Codec(
        "EncodecModel", lambda c: c.num_quantizers, lambda c: c.hop_length, _encode_encodec, _decode_encodec
    ),
    "mimi": Codec(
        "MimiModel",
        lambda c: c.num_quantizers,
        lambda c: round(c.sampling_rate / c.frame_rate),
        _encode_mimi,
        _decode_mimi,
    ),
    "dac": Codec("DacModel", lambda c: c.n_codebooks, lambda c: c.hop_length, _encode_dac, _decode_dac),
    "xcodec": Codec(
        "XcodecModel", lambda c: c.num_quantizers, lambda c: c.hop_length, _encode_xcodec, _decode_xcodec
    ),
}


def build_network(values: Mapping[str, Any]) -> Any:
    """transformers' network of a config (`SoundConfig.network`), in eval mode."""
    import transformers

    options = {name: value for name, value in values.items() if name != "model_type"}
    config = transformers.AutoConfig.for_model(values["model_type"], **options)
    return getattr(transformers, CODECS[values["model_type"]].network)(config).eval()


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A transformers config as a dictionary without what every one of its configs has."""
    from transformers import PretrainedConfig

    common = set(PretrainedConfig().to_dict()) - {"model_type"}
    kept = {
        name: plain(value) if isinstance(value, Mapping) and "model_type" in value else value
        for name, value in values.items()
        if name not in common and not name.startswith("_")
    }
    return kept | ({"frame_rate": values["_frame_rate"]} if values.get("_frame_rate") else {})


def open_sound(
    name: str | Path,
    family: str | None = None,
    *,
    codebooks: int | None = None,
    bandwidth: float | None = None,
    pattern: Pattern = "parallel",
    frames: int = 1500,
) -> SoundTokenizer:
    """The tokenizer of a codec in transformers' format: a local folder or hub id, in eval mode and float32.

    family: the codec that it must be. bandwidth: kilobits per second, instead of a number of codebooks: as
    many as fit. The others: see `SoundConfig`.
    Raises LexelError for a folder that holds something else or does not fit its config; weights are read from
    safetensors only.
    """
    folder = resolve_folder(name, "codec")
    found = read_config(folder).get("model_type")
    if found not in CODECS or found != (family or found):
        raise LexelError(f"{folder} holds a {found!r} model, not {family or 'one of ' + ', '.join(CODECS)}.")
    config = SoundConfig(_read_config(folder), codebooks, pattern, frames)
    with torch.device("meta"):  # what cannot be fails before weights are read
        built = config.build()
    if bandwidth is not None:
        if codebooks is not None:
            raise ValueError("give codebooks or bandwidth, not both.")
        each = built.bandwidth / len(built.codebook_sizes)
        if bandwidth < each:
            raise ValueError(f"one codebook needs {each:g} kilobits a second, {bandwidth:g} were given.")
        fitting = min(int(bandwidth / each + 1e-6), len(built.codebook_sizes))
        with torch.device("meta"):
            built = replace(config, codebooks=fitting).build()
    built.network = _read_network(folder, built.codec.network)
    return built.eval()


def _read_config(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        return plain(AutoConfig.from_pretrained(folder).to_dict())
    except (ValueError, TypeError, OSError) as error:
        raise LexelError(f"{folder} holds no config that transformers reads: {error}") from error


def _read_network(folder: Path, name: str) -> Any:
    import transformers
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        network, report = getattr(transformers, name).from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # transformers raises a wide family: no weights, damaged, another shape
        reason = " ".join(str(error).split())[:300]
        raise LexelError(f"{folder} cannot be opened as a {name}: {reason}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    if lacking := sorted(report["missing_keys"]):
        raise LexelError(f"{folder} does not fit its config: missing {', '.join(lacking[:20])}.")
    return network.eval()


def write(tokenizer: SoundTokenizer, path: str | Path, family: str) -> None:
    """Write the network as a folder in transformers' format. Raises LexelError for another codec."""
    if (found := tokenizer.config.network["model_type"]) != family:
        raise LexelError(f"this is a {found} codec, which cannot be written as a {family}.")
    tokenizer.network.save_pretrained(str(path))


# Published checkpoints. Arguments: fields of transformers' configs.


def _configure(family: str, arguments: Mapping[str, Any]) -> SoundConfig:
    return SoundConfig({"model_type": family, **arguments})


def _system(family: str, arguments: Mapping[str, Any], *rows: Published) -> System:
    return System(
        name=family,
        arguments=arguments,
        configure=partial(_configure, family),
        rows=rows,
        opens=partial(open_sound, family=family),
        writes=partial(write, family=family),
        options=("codebooks", "bandwidth", "pattern", "frames"),
    )


def _row(
    name: str, repository: str, parameters: int, rate: str, codebook: str, source: str, **arguments: Any
) -> Published:
    owner = repository.split("/")[0]
    return Published(
        name=name,
        repository=repository,
        file="",
        arguments=arguments,
        parameters=parameters,
        tokens=f"{rate} a second",
        codebook=codebook,
        code_licence="Apache-2.0 (transformers)",
        weight_licence={"kyutai": "CC-BY-4.0", "descript": "MIT"}.get(owner, "see its card"),
        source=source,
    )


ENCODEC = _system(
    "encodec",
    # facebook/encodec_24khz, as transformers' conversion script writes it.
    {
        "target_bandwidths": (1.5, 3.0, 6.0, 12.0, 24.0),
        "sampling_rate": 24_000,
        "upsampling_ratios": (8, 5, 4, 2),
        "num_filters": 32,
        "codebook_size": 1024,
        "use_causal_conv": True,
        "use_conv_shortcut": True,
    },
    _row(
        "encodec-24khz",
        "facebook/encodec_24khz",
        14_851_810,
        "75",
        "32 x 1024 x 128",
        "arXiv 2210.13438, github.com/facebookresearch/encodec",
    ),
    _row(
        "encodec-32khz",
        "facebook/encodec_32khz",
        56_884_674,
        "50",
        "4 x 2048 x 128",
        "arXiv 2306.05284, github.com/facebookresearch/audiocraft",
        target_bandwidths=(2.2,),
        sampling_rate=32_000,
        upsampling_ratios=(8, 5, 4, 4),
        num_filters=64,
        codebook_size=2048,
        use_causal_conv=False,
        use_conv_shortcut=False,
    ),
)
MIMI = _system(
    "mimi",
    {"sampling_rate": 24_000, "num_quantizers": 32, "codebook_size": 2048, "num_semantic_quantizers": 1},
    _row(
        "mimi",
        "kyutai/mimi",
        79_308_609,
        "12.5",
        "32 x 2048 x 256",
        "arXiv 2410.00037, github.com/kyutai-labs/moshi",
    ),
)
DAC_SOURCE = "arXiv 2306.06546, github.com/descriptinc/descript-audio-codec"
DAC = _system(
    "dac",
    {"sampling_rate": 16_000, "n_codebooks": 12, "downsampling_ratios": (2, 4, 5, 8)},
    _row("dac-16khz", "descript/dac_16khz", 74_141_697, "50", "12 x 1024 x 8", DAC_SOURCE),
    _row(
        "dac-24khz",
        "descript/dac_24khz",
        74_653_857,
        "75",
        "32 x 1024 x 8",
        DAC_SOURCE,
        sampling_rate=24_000,
        n_codebooks=32,
    ),
    _row(
        "dac-44khz",
        "descript/dac_44khz",
        76_620_777,
        "86.1",
        "9 x 1024 x 8",
        DAC_SOURCE,
        sampling_rate=44_100,
        n_codebooks=9,
        downsampling_ratios=(2, 4, 8, 8),
    ),
)
XCODEC_SOURCE = "arXiv 2408.17175, github.com/zhenye234/xcodec"
XCODEC = _system(
    "xcodec",
    {
        "target_bandwidths": (0.5, 1, 1.5, 2, 4),
        "sample_rate": 16_000,
        "codebook_size": 1024,
        "semantic_model_config": {"model_type": "hubert"},
    },
    *(
        _row(f"xcodec-{name}", f"hf-audio/xcodec-{name}", 160_698_625, "50", "8 x 1024 x 1024", XCODEC_SOURCE)
        for name in ("hubert-librispeech", "hubert-general", "hubert-general-balanced")
    ),
    *(
        _row(
            f"xcodec-{name}",
            f"hf-audio/xcodec-{name}",
            160_708_849,
            "50",
            "8 x 1024 x 1024",
            XCODEC_SOURCE,
            semantic_model_config={"model_type": "wavlm"},
        )
        for name in ("wavlm-mls", "wavlm-more-data")
    ),
)
SYSTEMS = (ENCODEC, MIMI, DAC, XCODEC)
