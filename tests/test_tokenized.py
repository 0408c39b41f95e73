"""Tokenized folders, with a tokenizer whose codes are easy to predict: the mean grey of each quarter."""

import json
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate
from torch.utils.data import Dataset

from lexel.data.example import Example
from lexel.data.tokenized import Manifest, TokenizedDataset, check_codes, tokenize_dataset
from lexel.errors import LexelError
from lexel.tokenizers.base import Tokenizer
from lexel.tokenizers.layout import CodeLayout
from lexel.types import Codes

LEVELS = 16
COUNT = 11


@dataclass(frozen=True)
class GreyConfig:
    flexible: bool = False


class GreyTokenizer(Tokenizer):
    config_class: ClassVar[type] = GreyConfig
    model_type: ClassVar[str] = "grey"
    image_size = (4, 4)

    def __init__(self, config=GreyConfig(), scale=1.0):
        super().__init__()
        self.config = config
        self.scale = nn.Parameter(torch.tensor(scale))
        self.encoded = 0
        shape = {"length": 4, "flexible": True} if config.flexible else {"grid": (2, 2)}
        self.layout = CodeLayout((LEVELS,), **shape)

    def _encode(self, pixels, length):
        self.encoded += len(pixels)
        assert not self.training
        grey = adaptive_avg_pool2d(pixels.mean(1, keepdim=True), 2).flatten(1)
        indices = ((grey * self.scale + 1) / 2 * (LEVELS - 1)).round().long()[..., None]
        lengths = (indices[:, 0, 0] % 4 + 1) if self.config.flexible else None
        return Codes(indices, self.layout.grid, lengths=lengths)

    def embed(self, codes):
        return codes.indices.float() / (LEVELS - 1) * 2 - 1

    def _decode(self, latents, codes):
        return interpolate(latents.view(-1, 1, 2, 2), scale_factor=2).expand(-1, 3, -1, -1)

    def forward(self, pixels, *, quantize=True, generator=None):
        raise AssertionError("tokenizing never trains")

    @property
    def last_layer(self):
        return self.scale

    def _check_size(self, pixels):
        assert pixels.shape[2:] == (4, 4)


class Greys(Dataset):
    """Picture i is made of four flat quarters; `fail_at` breaks off like a kill would."""

    def __init__(self, count=COUNT, fail_at=None, shift=0):
        self.count, self.fail_at, self.shift = count, fail_at, shift

    def __len__(self):
        return self.count

    def codes(self, index):
        return (torch.arange(4) * 3 + index + self.shift) % LEVELS

    def __getitem__(self, index):
        if index == self.fail_at:
            raise KeyboardInterrupt
        quarters = (self.codes(index).float() / (LEVELS - 1) * 2 - 1).view(1, 1, 2, 2)
        pixels = interpolate(quarters, scale_factor=2)[0].expand(3, -1, -1)
        return Example(f"grey-{index}", (f"caption {index}", "übergrau\u2028\n"), pixels)


def assert_holds(stored, dataset):
    assert len(stored) == len(dataset)
    for i in range(len(dataset)):
        assert stored[i].codes.dtype == torch.long
        assert torch.equal(stored[i].codes[:, 0], dataset.codes(i))
        assert (stored[i].key, stored[i].captions) == (dataset[i].key, dataset[i].captions)


GREYS = Greys()


def write(folder, dataset=GREYS, tokenizer=None, **options):
    options = {"batch_size": 2, "shard_size": 4, **options}
    return tokenize_dataset(tokenizer or GreyTokenizer(), dataset, folder, **options)


def test_codes_captions_and_keys_come_back(tmp_path):
    stored = write(tmp_path, source={"root": "here", "size": (4, 4)})
    assert_holds(stored, Greys())
    assert stored.manifest.grid == (2, 2)
    assert stored.manifest.codebook_sizes == (LEVELS,)
    assert stored.manifest.source == {"root": "here", "size": [4, 4]}
    assert stored[0].length is None
    assert list(stored.captions())[:2] == ["caption 0", "übergrau\u2028\n"]
    codes = stored[3].batch(GreyTokenizer().layout)
    assert GreyTokenizer().decode(codes)[0].allclose(Greys()[3].pixels, atol=1e-6)


def test_flexible_lengths_come_back(tmp_path):
    tokenizer = GreyTokenizer(GreyConfig(flexible=True))
    stored = write(tmp_path, tokenizer=tokenizer)
    assert [stored[i].length for i in range(COUNT)] == [i % 4 + 1 for i in range(COUNT)]
    layout = tokenizer.layout
    assert layout.flatten(stored[1].batch(layout))[0, :, 0].tolist() == [1, 4, -1, -1]


@pytest.mark.parametrize("threads", [0, 3])
def test_an_interrupted_run_keeps_finished_shards_and_redoes_the_partial_one(tmp_path, threads):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, Greys(fail_at=9))
    with pytest.raises(LexelError, match="lacks 1 of 3 shards"):
        TokenizedDataset(tmp_path)
    tokenizer = GreyTokenizer()
    assert_holds(write(tmp_path, tokenizer=tokenizer), Greys())
    assert tokenizer.encoded == 3  # examples 8, 9, 10 only
    write(tmp_path, tokenizer=tokenizer)
    assert tokenizer.encoded == 3
    assert not list(tmp_path.glob("*.tmp"))


def test_a_shard_without_its_tensors_is_written_again(tmp_path):
    write(tmp_path)
    (tmp_path / "codes-00001.safetensors").unlink()
    (tmp_path / "codes-00001.jsonl").write_text("half a line")
    assert_holds(write(tmp_path), Greys())


def test_training_mode_is_put_back(tmp_path):
    tokenizer = GreyTokenizer().train()
    write(tmp_path, tokenizer=tokenizer)
    assert tokenizer.training


def test_codes_of_another_tokenizer_are_refused_with_both_fingerprints(tmp_path):
    mine, other = GreyTokenizer(), GreyTokenizer(scale=0.5)
    write(tmp_path, tokenizer=mine)
    TokenizedDataset(tmp_path, mine.fingerprint())
    for attempt in (
        lambda: TokenizedDataset(tmp_path, other.fingerprint()),
        lambda: write(tmp_path, tokenizer=other),
        lambda: check_codes(tmp_path, other, Greys()),
    ):
        with pytest.raises(LexelError, match=f"{mine.fingerprint()}, not of {other.fingerprint()}"):
            attempt()


@pytest.mark.parametrize(
    ("options", "field"),
    [({"dataset": Greys(12)}, "count"), ({"shard_size": 5}, "shard_size"), ({"source": {"a": 1}}, "source")],
)
def test_a_folder_begun_with_other_data_is_refused(tmp_path, options, field):
    write(tmp_path)
    with pytest.raises(LexelError, match=f"begun with {field}"):
        write(tmp_path, **options)


def test_check_finds_nothing_in_good_codes_and_something_in_bad_ones(tmp_path):
    write(tmp_path)
    check = check_codes(tmp_path, GreyTokenizer(), Greys(), samples=5)
    assert (check.samples, check.agreement, check.decoded_difference, check.passed) == (5, 1.0, 0.0, True)
    assert check.psnr > 60
    changed = Greys(shift=1)  # the same keys, other pictures
    check = check_codes(tmp_path, GreyTokenizer(), changed, samples=100)
    assert (check.samples, check.agreement, check.passed) == (COUNT, 0.0, False)
    assert check.psnr < 40
    changed.__class__ = type("Renamed", (Greys,), {"__getitem__": lambda s, i: Greys(COUNT)[(i + 1) % COUNT]})
    with pytest.raises(LexelError, match="'grey-0', the data has 'grey-1'"):
        check_codes(tmp_path, GreyTokenizer(), changed)
    with pytest.raises(LexelError, match="holds 11 pictures, the data has 12"):
        check_codes(tmp_path, GreyTokenizer(), Greys(12))


def test_damaged_folders_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(LexelError, match=r"no manifest\.json"):
        TokenizedDataset(tmp_path)
    write(tmp_path)
    manifest = tmp_path / "manifest.json"
    good = manifest.read_text()
    manifest.write_text(json.dumps({**json.loads(good), "format_version": 99}))
    with pytest.raises(LexelError, match="format version 99"):
        TokenizedDataset(tmp_path)
    for text in ("{", "[]", json.dumps({"format_version": 1, "colour": 3})):
        manifest.write_text(text)
        with pytest.raises(LexelError, match="is not a manifest"):
            TokenizedDataset(tmp_path)
    manifest.write_text(good)
    (tmp_path / "codes-00002.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(LexelError, match="damaged"):
        TokenizedDataset(tmp_path)[10]
    (tmp_path / "codes-00000.jsonl").unlink()
    with pytest.raises(LexelError, match="missing or damaged"):
        TokenizedDataset(tmp_path)[0]


def test_data_sets_and_manifests_travel(tmp_path):
    stored = write(tmp_path)
    stored[0]
    again = ForkingPickler.loads(ForkingPickler.dumps(stored))
    assert_holds(again, Greys())
    assert Manifest.read(tmp_path) == stored.manifest
    with pytest.raises(IndexError):
        stored[COUNT]
    assert torch.equal(stored[-1].codes, stored[COUNT - 1].codes)


def test_nothing_to_tokenize_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        write(tmp_path, Greys(0))


@pytest.mark.slow
def test_processes_write_the_same_codes(tmp_path):
    write(tmp_path / "alone")
    assert_holds(write(tmp_path / "two", workers=2), Greys())
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
