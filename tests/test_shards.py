import io
import json
import tarfile
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from lexel.data.images import read_pixels
from lexel.data.sampler import DrawnDataset, ResumableSampler
from lexel.data.shards import ShardsConfig
from lexel.errors import LexelError


def picture(seed, kind="PNG"):
    buffer = io.BytesIO()
    array = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(number):
    return [(f"{number:03d}.png", picture(number)), (f"{number:03d}.txt", f"number {number}".encode())]


@pytest.fixture
def shards(tmp_path):
    """Three tars of 5, 5 and 4 samples."""
    for shard, numbers in enumerate((range(5), range(5, 10), range(10, 14))):
        write_tar(tmp_path / f"s{shard}.tar", [file for n in numbers for file in sample(n)])
    return tmp_path


def build(root, **options):
    return ShardsConfig(str(root), 8, validation_share=0, **options).build("train")


def keys_of(examples):
    return [example.key for example in examples]


def identity(items):
    return items


def test_samples_are_read_by_number_in_any_order(shards):
    dataset = build(shards)
    assert len(dataset) == 14
    example = dataset[12]
    assert (example.key, example.captions) == ("s2/012", ("number 12",))
    assert example.pixels.equal(read_pixels(picture(12), 8))
    assert dataset.problems.counts() == {}


def test_a_training_draw_may_vary_its_picture(shards):
    dataset = build(shards, crop=0.5)
    one, two = (dataset.varied(12, seed) for seed in (1, 2))
    assert one.key == two.key == "s2/012"
    assert one.pixels.shape == (3, 8, 8)
    assert not one.pixels.equal(two.pixels)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_nothing_is_lost_or_repeated_by_ranks_workers_and_a_kill(shards):
    dataset, seen = build(shards), []
    for start, batches in ((0, 2), (2, 5)):  # killed after two batches, resumed
        for rank in range(2):
            sampler = ResumableSampler(len(dataset), 2, 1, rank, 2, start)
            loader = DataLoader(
                DrawnDataset(dataset), batch_sampler=sampler, num_workers=2 * rank, collate_fn=identity
            )
            for number, batch in enumerate(islice(loader, batches)):
                seen += [(start + number, j, rank, example.key) for j, example in enumerate(batch)]
    order = [key for *_, key in sorted(seen)]
    assert len(order) == 28
    assert sorted(order[:14]) == sorted(order[14:]) == sorted(keys_of(dataset[i] for i in range(14)))
    assert order[:14] != order[14:]


def test_json_captions_folders_and_upper_case(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [
            ("x/1.JPG", picture(1, "JPEG")),
            ("x/1.json", json.dumps({"text": ["one", "eins"]}).encode()),
            ("y/1.webp", picture(2, "WEBP")),
            ("y/1.cls", b"3"),
            ("y/1.txt", b"two\n"),
        ],
    )
    dataset = build(tmp_path)
    assert {dataset[i].key: dataset[i].captions for i in range(2)} == {
        "a/x/1": ("one", "eins"),
        "a/y/1": ("two",),
    }


def test_flawed_samples_are_counted_named_and_skipped(tmp_path, capsys):
    files = sample(0)
    files += [
        ("1.png", picture(1)),
        ("1.txt", b" "),
        ("2.png", picture(2)),
        ("2.json", b"{"),
        ("3.txt", b"x"),
    ]
    files += [("4.png", picture(4)[:60]), ("4.txt", b"broken"), *sample(5)]
    write_tar(tmp_path / "a.tar", files)
    dataset = build(tmp_path)
    assert keys_of(dataset[i] for i in range(len(dataset))) == ["a/000", "a/005"]
    assert dataset.problems.counts() == {"empty caption": 2, "missing file": 1, "broken picture": 1}
    assert {p.name for p in dataset.problems.entries} == {"a/1", "a/2", "a/3", "a/4"}
    assert len(capsys.readouterr().err.splitlines()) == 1
    with pytest.raises(LexelError, match="Empty caption"):
        build(tmp_path, on_error="raise")


def test_a_truncated_tar_keeps_what_is_whole_wherever_it_is_cut(shards):
    """Every cut: no crash, no half sample, and the damage is named."""
    path = shards / "s1.tar"
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [(info.name, info.offset_data + info.size) for info in tar]
        end_mark = tar.offset
    for cut in [0, 100, 512, *range(700, end_mark + 512, 333), end_mark, end_mark + 100]:
        path.write_bytes(data[:cut])
        dataset = build(shards)
        whole = {name for name, end in ends if end <= cut}
        kept = [n for n in range(5, 10) if {f"{n:03d}.png", f"{n:03d}.txt"} <= whole]
        expected = [n for n in range(14) if not 5 <= n < 10 or n in kept]
        assert keys_of(dataset[i] for i in range(len(dataset))) == [
            f"s{min(n // 5, 2)}/{n:03d}" for n in expected
        ]
        assert dataset.problems.counts()["truncated tar"] == 1
    with pytest.raises(LexelError, match=r"Truncated tar .*s1\.tar"):
        build(shards, on_error="raise")


def test_a_damaged_header_is_noticed(shards):
    path = shards / "s0.tar"
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    data = bytearray(path.read_bytes())
    data[third : third + 512] = b"x" * 512
    path.write_bytes(data)
    dataset = build(shards)
    assert keys_of([dataset[0], dataset[1]]) == ["s0/000", "s1/005"]
    assert [p.name for p in dataset.problems.entries] == [str(path)]


def test_split_folders_and_missing_ones(tmp_path):
    write_tar(tmp_path / "train" / "a.tar", sample(1))
    write_tar(tmp_path / "val" / "a.tar", sample(2))
    config = ShardsConfig(str(tmp_path), 8)
    assert config.build("train")[0].captions == ("number 1",)
    assert config.build("validation")[0].captions == ("number 2",)
    with pytest.raises(LexelError, match="does not exist"):
        ShardsConfig(str(tmp_path / "none")).build("train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LexelError, match=r"no \.tar shard"):
        ShardsConfig(str(tmp_path / "empty")).build("train")
    (tmp_path / "empty" / "x.tar").write_bytes(b"\x1f\x8b compressed")
    with pytest.raises(LexelError, match="no usable sample"):
        ShardsConfig(str(tmp_path / "empty")).build("train")
