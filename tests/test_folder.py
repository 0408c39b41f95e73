import json
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lexel.data.folder import FolderConfig
from lexel.data.source import split_keys
from lexel.errors import LexelError


def save_pictures(root, names):
    rng = np.random.default_rng(0)
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(root / name)


def write_metadata(root, rows):
    (root / "metadata.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))


def captions_of(config, split="train"):
    dataset = config.build(split)
    return {dataset[i].key: dataset[i].captions for i in range(len(dataset))}


@pytest.fixture
def flawed(tmp_path):
    """Four good pictures and one of each flaw."""
    save_pictures(tmp_path, ["a.png", "b.png", "c.jpg", "d.png", "silent.png", "blank.png"])
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:100])
    rows = [
        {"file_name": f"{name}", "text": f"picture {name}"} for name in ("a.png", "b.png", "c.jpg", "d.png")
    ]
    rows += [
        {"file_name": "silent.png"},
        {"file_name": "blank.png", "text": "  "},
        {"file_name": "broken.png", "text": "broken"},
        {"file_name": "gone.png", "text": "gone"},
        {"text": "nameless"},
        "{not json",
    ]
    write_metadata(tmp_path, rows)
    return tmp_path


def test_flaws_are_counted_named_and_skipped(flawed, capsys):
    dataset = FolderConfig(str(flawed), 8, validation_share=0).build("train")
    assert [dataset[i].key for i in range(len(dataset))] == ["a.png", "b.png", "c.jpg", "d.png"]
    assert dataset[2].captions == ("picture c.jpg",)
    assert dataset[0].pixels.shape == (3, 8, 8)
    counts = {"empty caption": 2, "missing file": 1, "bad metadata line": 2, "broken picture": 1}
    assert dataset.problems.counts() == counts
    named = {problem.name for problem in dataset.problems.entries}
    assert named == {
        "silent.png",
        "blank.png",
        "gone.png",
        "metadata.jsonl:9",
        "metadata.jsonl:10",
        "broken.png",
    }
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 empty caption" in line
    assert "silent.png" in line
    assert "and 3 more" in line


def test_flaws_are_refused_on_request(flawed):
    with pytest.raises(LexelError, match=r"Empty caption .*silent\.png"):
        FolderConfig(str(flawed), 8, on_error="raise").build("train")
    with pytest.raises(LexelError, match="must be 'skip' or 'raise'"):
        FolderConfig(str(flawed), 8, on_error="explode").build("train")


def test_unverified_broken_pictures_are_refused_when_read(flawed):
    dataset = FolderConfig(str(flawed), 8, validation_share=0, verify=False).build("train")
    with pytest.raises(LexelError, match=r"broken\.png cannot be read"):
        [dataset[i] for i in range(len(dataset))]


def test_several_captions_for_one_picture(tmp_path):
    save_pictures(tmp_path, ["a.png", "b.png"])
    rows = [{"file_name": "a.png", "text": ["one", "", "two"]}, {"file_name": "a.png", "text": "three"}]
    write_metadata(tmp_path, [*rows, {"file_name": "b.png", "text": "b"}])
    config = FolderConfig(str(tmp_path), 8, validation_share=0)
    assert captions_of(config) == {"a.png": ("one", "two", "three"), "b.png": ("b",)}


def test_metadata_csv_and_another_column(tmp_path):
    save_pictures(tmp_path, ["a.png"])
    (tmp_path / "metadata.csv").write_text('file_name,title\na.png,"red, and blue"\n')
    config = FolderConfig(str(tmp_path), 8, validation_share=0, caption_column="title")
    assert captions_of(config) == {"a.png": ("red, and blue",)}


def test_class_folders_and_pictures_without_captions(tmp_path):
    save_pictures(tmp_path, ["tiger_shark/x/1.png", "cat/1.png", "loose.png", ".hidden/1.png"])
    config = FolderConfig(str(tmp_path), 8, validation_share=0, class_template="this is a {}")
    assert captions_of(config) == {
        "cat/1.png": ("this is a cat",),
        "loose.png": (),
        "tiger_shark/x/1.png": ("this is a tiger shark",),
    }


def test_split_folders(tmp_path):
    save_pictures(tmp_path, ["train/cat/1.png", "val/cat/2.png", "extra/cat/3.png"])
    config = FolderConfig(str(tmp_path), 8)
    assert list(captions_of(config)) == ["cat/1.png"]
    assert list(captions_of(config, "validation")) == ["cat/2.png"]
    config = FolderConfig(str(tmp_path / "train"), 8, validation_root=str(tmp_path / "extra"))
    assert list(captions_of(config, "validation")) == ["cat/3.png"]


@given(st.sets(st.text(min_size=1), min_size=2, max_size=30), st.floats(0.01, 0.9))
def test_splits_are_disjoint_complete_and_never_empty(keys, share):
    keys = sorted(keys)
    train, validation = split_keys(keys, share, "train"), split_keys(keys, share, "validation")
    assert sorted(train + validation) == keys
    assert train
    assert validation


def test_a_picture_keeps_its_split_when_others_come():
    few, many = [f"{i}.png" for i in range(500)], [f"{i}.png" for i in range(1000)]
    held_out = split_keys(many, 0.1, "validation")
    assert split_keys(few, 0.1, "validation") == [key for key in held_out if key in few]
    assert 60 <= len(held_out) <= 140  # binomial(1000, 0.1): outside 4.2 sigma


def test_folders_that_hold_nothing_are_refused(tmp_path):
    with pytest.raises(LexelError, match="does not exist"):
        FolderConfig(str(tmp_path / "nowhere")).build("train")
    with pytest.raises(LexelError, match="holds no usable picture"):
        FolderConfig(str(tmp_path)).build("train")
    with pytest.raises(LexelError, match="splits are train and validation"):
        FolderConfig(str(tmp_path)).build("test")


def test_sizes_from_yaml_lists_and_wrong_ones(tmp_path):
    save_pictures(tmp_path, ["a.png"])
    config = FolderConfig(str(tmp_path), [6, 10], validation_share=0)
    assert config.image_size == (6, 10)
    assert config.build("train")[0].pixels.shape == (3, 6, 10)
    for size in (0, [], [1, 2, 3], [4, -1], [3.5, 2]):
        with pytest.raises(ValueError, match="size must be"):
            FolderConfig(str(tmp_path), size)


def test_a_data_set_travels_to_spawned_workers(flawed):
    dataset = FolderConfig(str(flawed), 8, validation_share=0).build("train")
    again = ForkingPickler.loads(ForkingPickler.dumps(dataset))
    assert again[1].pixels.equal(dataset[1].pixels)


def test_training_draws_are_varied_and_resume_alike(tmp_path):
    from torch.utils.data import Subset

    from lexel.data.sampler import Draw, DrawnDataset
    from lexel.train.chain import Remembering

    save_pictures(tmp_path, ["a.png", "b.png"])
    config = FolderConfig(str(tmp_path), 8, validation_share=0, crop=0.5, flip=True)
    assert config.varies
    assert not FolderConfig(str(tmp_path)).varies
    source = config.build("train")
    for held in (source, Subset(source, range(1))):  # `examples=1`
        drawn = DrawnDataset(Remembering(held, 10**6), seed=3)
        one, two = (drawn[Draw(0, counter)].pixels for counter in (5, 6))
        assert (drawn[Draw(0, 5)].pixels == one).all()
        assert (one != two).any()
        assert drawn[Draw(0, 5)].key == "a.png"
    assert (DrawnDataset(source)[Draw(1, 5)].pixels == source[1].pixels).all()


@pytest.mark.parametrize("crop", [0.0, 1.5])
def test_an_impossible_crop_is_refused(tmp_path, crop):
    with pytest.raises(ValueError, match="crop must be a share"):
        FolderConfig(str(tmp_path), crop=crop)
