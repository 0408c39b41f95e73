"""The bundle folder: every part of a trained chain, each loadable alone.

    bundle.json       format version, parts, layouts, sampling defaults, the tokenizer's fingerprint
    tokenizer/  lm/  detokenizer/ (optional)  drafter/ (optional)     config.json + model.safetensors
    text_tokenizer/   transformers' files;  vocabulary.json;  README.md (model card)
    tokenizers/NAME/ (optional)    further tokenizers: of the language model's modality of that name, or to
                                   reconstruct pictures with; copy their folders in
    drafters/NAME/ (optional)      further drafters, each a decoding strategy of that name

`trained_on.json` beside the weights of every part that reads codes names the tokenizer they come from, so
that parts of different bundles cannot be mixed by accident.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexel.data.shapes import ShapesConfig
from lexel.document import DocumentCodec, TextTokenizer
from lexel.errors import LexelError
from lexel.hub import CONFIG_FILE, decode_config, resolve_folder, write_atomically
from lexel.prompts import make_codec
from lexel.sample.logits import SamplingConfig
from lexel.tokenizers import from_pretrained as load_tokenizer
from lexel.tokenizers import list_published, load_published
from lexel.tokenizers.layout import CodeLayout
from lexel.tokenizers.structured import STRUCTURED, StructuredCodec
from lexel.vocabulary import Vocabulary

if TYPE_CHECKING:
    from lexel.tokenizers.base import Tokenizer

FORMAT = 1
BUNDLE_FILE = "bundle.json"
VOCABULARY_FILE = "vocabulary.json"
TRAINED_ON_FILE = "trained_on.json"
FURTHER = "tokenizers"
DRAFTERS = "drafters"
SHIPPED = "shapes"
"""The bundle in the package's own folder. Its weights (8 MB) are tracked: drawing needs no download."""


@dataclass(frozen=True)
class DecodingConfig:
    """How a bundle decodes unless told otherwise. strategy: one of `Pipeline.strategies`, or "auto": the
    fastest on the machine at hand (`lexel.sample.tuning`); window: how many tokens are drafted at once by the
    speculative ones (None: the strategy's usual number)."""

    strategy: str = "auto"
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"the drafting window must be at least 1, got {self.window}.")


@dataclass(frozen=True)
class BundleInfo:
    """What `bundle.json` says. tokenizer: fingerprint of the tokenizer whose codes the LM was trained on;
    codebook_sizes: of that tokenizer; parts: the folders present; layouts and sampling: per modality;
    scenes: the procedural scenes it was trained on, where it was; structured: codecs of the modalities that
    hold structured values, by kind; views: fingerprints of the tokenizers of its other modalities."""

    tokenizer: str
    codebook_sizes: tuple[int, ...]
    parts: tuple[str, ...]
    layouts: Mapping[str, CodeLayout]
    sampling: Mapping[str, SamplingConfig]
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    scenes: ShapesConfig | None = None
    structured: Mapping[str, StructuredCodec] = field(default_factory=dict)
    views: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Write `bundle.json` (last of all files, so that a half-written folder is not a bundle)."""
        write_json(folder / BUNDLE_FILE, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> BundleInfo:
        """Read `bundle.json`. Raises LexelError when it is missing, damaged or of another format."""
        path = folder / BUNDLE_FILE
        if not path.is_file():
            raise LexelError(f"{folder} is not a bundle (it holds no {BUNDLE_FILE}).")
        values = read_json(path)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else None
            raise LexelError(f"{path} has format {found}; this version of Lexel reads format {FORMAT}.")
        try:
            return cls(
                tokenizer=values["tokenizer"],
                codebook_sizes=tuple(values["codebook_sizes"]),
                parts=tuple(values["parts"]),
                layouts={name: decode_config(CodeLayout, x) for name, x in values["layouts"].items()},
                sampling={name: decode_config(SamplingConfig, x) for name, x in values["sampling"].items()},
                decoding=decode_config(DecodingConfig, values["decoding"]),
                scenes=decode_config(ShapesConfig, values["scenes"]) if values.get("scenes") else None,
                structured={
                    name: decode_config(STRUCTURED[name], x)
                    for name, x in values.get("structured", {}).items()
                },
                views=values.get("views", {}),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LexelError(f"{path} is damaged ({type(error).__name__}: {error}).") from error


def find_bundle(name: str | Path | None) -> Path:
    """The folder of a bundle: a local folder, a hub id, or with None the one shipped with Lexel.
    Raises LexelError when there is none."""
    if name is not None:
        return resolve_folder(name, "bundle")
    path = Path(str(resources.files("lexel"))) / "bundles" / SHIPPED
    if not path.is_dir():
        raise LexelError(
            f"this installation of Lexel ships no bundle ({path} is missing); train one with "
            "`lexel-train experiment=quickstart` and name its folder (--bundle DIR)."
        )
    return path


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder` whose files are moved to their places when the block ends well, so that
    a full disk or an error leaves what was there as it was. Raises LexelError when the disk refuses."""
    staging = folder / ".incoming"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        files = [path for path in staging.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == BUNDLE_FILE):
            target = folder / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    except OSError as error:
        raise LexelError(
            f"could not save to {folder}: {error.strerror or error}; what was there before is kept."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def save_text_tokenizer(tokenizer: TextTokenizer, folder: Path) -> None:
    """Write transformers' files of a text tokenizer. Raises OSError when the disk refuses."""
    try:
        tokenizer.save_pretrained(str(folder))  # type: ignore[attr-defined]
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises a bare Exception for failed writes
        raise OSError(f"the text tokenizer could not be written ({error})") from error


def read_json(path: Path) -> Any:
    """The parsed JSON file. Raises LexelError when it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise LexelError(f"{path} is not readable JSON ({error}).") from None


def write_json(path: Path, values: Any) -> None:
    """Write `values` as JSON, atomically. Raises LexelError when the disk refuses."""
    write_text(path, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically. Raises LexelError when the disk refuses."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def tokenizer_folders(bundle: Path) -> dict[str, Path]:
    """The further tokenizers of a bundle folder, by name."""
    found = sorted(path.parent for path in (bundle / FURTHER).glob(f"*/{CONFIG_FILE}"))
    return {folder.name: folder for folder in found}


def drafter_folders(bundle: Path) -> dict[str, Path]:
    """The further drafters of a bundle folder, by name."""
    found = sorted(path.parent for path in (bundle / DRAFTERS).glob(f"*/{CONFIG_FILE}"))
    return {folder.name: folder for folder in found}


def load_tokenizer_of(
    name: str | Path | None,
    *,
    bundle: str | Path | None = None,
    checkpoint: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> Tokenizer:
    """A tokenizer in eval mode by what a user may call it.

    name: one of the further tokenizers of `bundle`, a published checkpoint (`list_published`), a tokenizer
    folder or a bundle (folder or hub id); None is the own tokenizer of `bundle` (None: the shipped one).
    checkpoint, config: of a published one, the local file and the hyper-parameters (the reference's names)
    that differ from the published ones. Raises LexelError when there is none of that name.
    """
    published = name is not None and str(name) in {row.name for row in list_published()}
    if not published and (checkpoint is not None or config is not None):
        raise LexelError(
            f"a checkpoint and its config need the name of a published tokenizer, got {name}; "
            "`lexel published` lists them."
        )
    if published:
        return load_published(str(name), checkpoint, config)
    if name is None:
        return load_tokenizer(_own(find_bundle(bundle)))
    further = {} if bundle is None else tokenizer_folders(find_bundle(bundle))
    return load_tokenizer(further.get(str(name)) or _own(_named_folder(name)))


def _own(folder: Path) -> Path:
    """The tokenizer folder of a bundle; any other folder is one itself."""
    return folder / "tokenizer" if (folder / BUNDLE_FILE).is_file() else folder


def _named_folder(name: str | Path) -> Path:
    if "/" not in str(name) and not Path(name).expanduser().exists():
        raise LexelError(
            f"there is no tokenizer {name}: give a folder, a hub id, or a name that `lexel published` lists."
        )
    return resolve_folder(name, "tokenizer")


def check_trained_on(folder: Path, part: str, fingerprint: str) -> None:
    """Refuse a part (LM, detokenizer, drafter) that was trained on another tokenizer's codes.
    Raises LexelError naming both tokenizers."""
    path = folder / part / TRAINED_ON_FILE
    if not path.is_file():
        return
    found = read_json(path).get("tokenizer")
    if found != fingerprint:
        raise LexelError(
            f"{folder / part} was trained on the codes of tokenizer {found}, but {folder / 'tokenizer'} is "
            f"tokenizer {fingerprint}; take both from the same bundle."
        )


def check_views(folder: Path, info: BundleInfo, tokenizers: Mapping[str, Tokenizer]) -> None:
    """Refuse a further tokenizer that is not the one whose codes the language model was trained on.
    Raises LexelError naming it."""
    for name, fingerprint in info.views.items():
        found = tokenizers[name].fingerprint() if name in tokenizers else "missing"
        if found != fingerprint:
            raise LexelError(
                f"the language model of {folder} was trained on the codes of tokenizer {fingerprint} for "
                f"{name}, but {folder / FURTHER / name} is {found}; take both from the same bundle."
            )


def load_text_tokenizer(folder: Path) -> TextTokenizer:
    """A transformers tokenizer from a local folder. Raises LexelError when it cannot be read."""
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise LexelError(f"{folder} holds no tokenizer.json; the bundle's text tokenizer is missing.")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers raises a bare Exception for damaged files
        raise LexelError(f"{folder} is not a readable text tokenizer ({error}).") from error


def load_codec(folder: Path, info: BundleInfo) -> DocumentCodec:
    """The document codec of a bundle: vocabulary, text tokenizer and layouts.
    Raises LexelError when one is missing or they do not fit together."""
    path = folder / VOCABULARY_FILE
    if not path.is_file():
        raise LexelError(f"{folder} holds no {VOCABULARY_FILE}; the bundle is incomplete.")
    try:
        vocabulary = Vocabulary.from_json(path.read_text(encoding="utf-8"))
        return make_codec(vocabulary, load_text_tokenizer(folder / "text_tokenizer"), info.layouts)
    except (KeyError, TypeError, ValueError) as error:
        raise LexelError(f"{path} does not fit the bundle ({error})") from error
