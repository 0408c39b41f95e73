import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lexel.data.text import TextConfig, byte_lengths, cut_text
from lexel.data.text_tokenizer import train_text_tokenizer
from lexel.errors import LexelError

POEM = "".join(
    f"Line {i} of a poem, with a rhyme at time {i * 7}.\n" + "\n" * (i % 5 == 0) for i in range(60)
)


@given(st.text(alphabet=st.sampled_from("ab é🙂 \n\t\r\u2028"), max_size=200), st.integers(8, 30))
def test_pieces_fit_and_join_to_the_text(text, limit):
    pieces = cut_text(text, limit, byte_lengths)
    assert "".join(pieces) == text
    assert all(size <= limit for size in byte_lengths(pieces))


def test_whole_lines_stay_together_and_neighbours_do_not_fit_in_one():
    pieces = cut_text(POEM, 120, byte_lengths)
    assert all(piece.endswith("\n") for piece in pieces)
    assert all(len(a) + len(b.splitlines(keepends=True)[0]) > 120 for a, b in itertools.pairwise(pieces))


def test_long_lines_are_cut_at_spaces():
    words = "word " * 50
    assert all(
        piece.strip().split(" ") == ["word"] * piece.count("word")
        for piece in cut_text(words, 40, byte_lengths)
    )


def test_documents_are_measured_in_tokens(tmp_path):
    (tmp_path / "poem.txt").write_text(POEM)
    tokenizer = train_text_tokenizer([POEM], 400)
    config = TextConfig(str(tmp_path / "poem.txt"), max_tokens=40)
    by_tokens, by_bytes = config.build("train", tokenizer), config.build("train")
    assert len(by_tokens) < len(by_bytes)
    for dataset in (by_tokens, by_bytes):
        for i in range(len(dataset)):
            assert dataset[i].pixels is None
            assert 0 < len(tokenizer.encode(dataset[i].captions[0], add_special_tokens=False)) <= 40


def test_splits_share_nothing_and_lose_nothing(tmp_path):
    (tmp_path / "a.txt").write_text(POEM)
    (tmp_path / "b.md").write_text("one more file")
    config = TextConfig(str(tmp_path), 64, validation_share=0.3)
    train, validation = (
        [d[i] for i in range(len(d))] for d in (config.build("train"), config.build("validation"))
    )
    assert not {e.key for e in train} & {e.key for e in validation}
    assert len(train) + len(validation) == len(cut_text(POEM, 64, byte_lengths)) + 1


def test_flawed_files_are_named(tmp_path, capsys):
    (tmp_path / "good.txt").write_text(POEM)
    (tmp_path / "bad.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "empty.txt").write_text("\n")
    dataset = TextConfig(str(tmp_path)).build("train")
    assert dataset.problems.counts() == {"broken text": 1, "empty text": 1}
    assert "bad.txt" in capsys.readouterr().err
    with pytest.raises(LexelError, match="not UTF-8"):
        TextConfig(str(tmp_path), on_error="raise").build("train")


def test_missing_text_is_refused(tmp_path):
    with pytest.raises(LexelError, match="does not exist"):
        TextConfig(str(tmp_path / "no.txt")).build("train")
    with pytest.raises(LexelError, match=r"no \.txt or \.md"):
        TextConfig(str(tmp_path)).build("train")
    with pytest.raises(ValueError, match="at least 8"):
        TextConfig(str(tmp_path), max_tokens=3)
