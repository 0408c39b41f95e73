"""Codes and pictures in an object store (fsspec's own in-memory one), and codes written in parts."""

import io
import tarfile
from pathlib import Path

import fsspec
import pytest
import torch

from lexel.cli import main
from lexel.data.images import to_image
from lexel.data.shards import ShardsConfig
from lexel.data.store import Store, join
from lexel.data.tokenized import TokenizedDataset, tokenize_dataset, write_codes
from lexel.errors import LexelError
from tests.test_tokenized import GREYS, Greys, GreyTokenizer

URL = "memory://bucket/codes"


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def upload(memory, folder: Path, url: str) -> None:
    for file in folder.iterdir():
        memory.pipe_file(f"{url.removeprefix('memory:/')}/{file.name}", file.read_bytes())


def test_codes_of_a_store_are_those_of_the_folder(tmp_path: Path, memory):
    tokenizer = GreyTokenizer()
    local = tokenize_dataset(tokenizer, GREYS, tmp_path / "codes", shard_size=4)
    upload(memory, tmp_path / "codes", URL)
    remote = TokenizedDataset(URL, tokenizer.fingerprint())
    assert not list(remote.folder.glob("*.safetensors"))  # nothing is copied before it is asked for
    assert len(remote) == len(local)
    assert torch.equal(remote[5].codes, local[5].codes)
    assert [path.name for path in remote.folder.glob("*.safetensors")] == ["codes-00001.safetensors"]
    assert list(remote.captions()) == list(local.captions())


def test_a_folder_that_was_written_again_is_read_again(tmp_path: Path, memory):
    for shift in (0, 1):
        local = tokenize_dataset(GreyTokenizer(), Greys(shift=shift), tmp_path / str(shift))
        upload(memory, tmp_path / str(shift), URL)
        assert torch.equal(TokenizedDataset(URL)[0].codes, local[0].codes)


def test_a_store_that_lacks_a_shard_or_everything_says_so(tmp_path: Path, memory):
    tokenizer = GreyTokenizer()
    tokenize_dataset(tokenizer, GREYS, tmp_path / "codes", shard_size=4)
    upload(memory, tmp_path / "codes", URL)
    memory.rm("/bucket/codes/codes-00001.safetensors")
    with pytest.raises(LexelError, match=r"memory://bucket/codes lacks 1 of 3 shards"):
        TokenizedDataset(URL)
    with pytest.raises(LexelError, match="cannot be listed"):
        TokenizedDataset("memory://nowhere/codes")
    with pytest.raises(LexelError, match="cannot be opened"):
        TokenizedDataset("nosuch://bucket/codes")
    with pytest.raises(LexelError, match="cannot be read"):
        Store(URL).bring("absent")
    assert not (Store(URL).folder / "absent").exists()


def test_shards_of_pictures_are_read_from_a_store(memory):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(3):
            picture = io.BytesIO()
            to_image(torch.full((3, 8, 8), number / 3)).save(picture, format="PNG")
            for name, content in ((f"{number}.png", picture.getvalue()), (f"{number}.txt", b"grey")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    memory.pipe_file("/bucket/pictures/a.tar", buffer.getvalue())
    dataset = ShardsConfig("memory://bucket/pictures", size=8, validation_share=0.0).build("train")
    assert len(dataset) == 3
    assert dataset[1].captions == ("grey",)


def test_two_machines_fill_one_folder(tmp_path: Path):
    tokenizer = GreyTokenizer()
    whole = tokenize_dataset(tokenizer, GREYS, tmp_path / "whole", shard_size=2)
    assert write_codes(tokenizer, GREYS, tmp_path / "parts", shard_size=2, part=(0, 2)) == 3
    with pytest.raises(LexelError, match="lacks 3 of 6 shards"):
        TokenizedDataset(tmp_path / "parts")
    assert write_codes(tokenizer, GREYS, tmp_path / "parts", shard_size=2, part=(1, 2)) == 0
    parts = TokenizedDataset(tmp_path / "parts")
    assert all(torch.equal(parts[i].codes, whole[i].codes) for i in range(len(whole)))
    with pytest.raises(ValueError, match=r"a part is \(i, n\)"):
        write_codes(tokenizer, GREYS, tmp_path / "parts", part=(2, 2))


def test_the_command_names_a_wrong_part(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["tokenize", "shapes", "--out", "codes", "--part", "8/8"])
    assert "must be I/N with 0 <= I < N" in capsys.readouterr().err


def test_names_are_joined_as_paths_or_urls():
    assert join("s3://bucket/codes/", "train") == "s3://bucket/codes/train"
    assert join("codes", "train") == Path("codes/train")
