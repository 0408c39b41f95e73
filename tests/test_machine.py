"""What is kept between processes, and that nothing depends on it."""

import pytest

from lexel.machine import cache_folder, processor, recall, remember


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("LEXEL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_entries_are_added_to_a_record(folder):
    assert cache_folder() == folder
    assert recall("times") == {}
    remember("times", {"a": 1})
    remember("times", {"b": [2.5]})
    remember("times", {"a": 3})
    assert recall("times") == {"a": 3, "b": [2.5]}
    assert recall("other") == {}


@pytest.mark.parametrize("damage", ["{", "[1]", "\udcff"])
def test_a_damaged_record_is_an_empty_one(folder, damage):
    folder.mkdir()
    (folder / "times.json").write_bytes(damage.encode("utf-8", "surrogateescape"))
    assert recall("times") == {}
    remember("times", {"a": 1})
    assert recall("times") == {"a": 1}


def test_a_folder_that_cannot_be_written_to_is_no_error(folder):
    folder.write_text("a file stands in the way")
    remember("times", {"a": 1})
    assert recall("times") == {}


def test_the_users_cache_folder_is_the_default(monkeypatch, tmp_path):
    monkeypatch.delenv("LEXEL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lexel"


def test_the_processor_has_a_name():
    assert "cores" in processor()
