import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lexel.data.text_tokenizer import train_text_tokenizer

CAPTIONS = ["a red circle left of a blue square", "two green triangles on grey"] * 20
TOKENIZER = train_text_tokenizer(CAPTIONS, 320)


@given(st.text())
@example(" a  b\n\n n't . , \r\n\u0000 <|endoftext|> é\U0001f642 ")
def test_any_text_survives(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    assert TOKENIZER.decode(ids) == text
    assert len(ids) <= len(text.encode())
    assert all(0 <= i < len(TOKENIZER) for i in ids)


def test_training_is_deterministic_and_shortens_the_captions():
    again = train_text_tokenizer(iter(CAPTIONS), 320)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    assert len(TOKENIZER) <= 320
    assert len(TOKENIZER.encode(CAPTIONS[0])) < len(CAPTIONS[0]) / 3


def test_saved_and_loaded_it_is_the_same(tmp_path):
    from transformers import PreTrainedTokenizerFast

    TOKENIZER.save_pretrained(tmp_path)
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in [*CAPTIONS[:2], " x , y .", "né"]:
        assert loaded.encode(text) == TOKENIZER.encode(text)
        assert loaded.decode(loaded.encode(text)) == text


def test_too_few_ids_for_the_bytes_are_refused():
    with pytest.raises(ValueError, match="at least 256"):
        train_text_tokenizer(CAPTIONS, 255)
