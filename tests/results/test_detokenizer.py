"""Token ids to text: the pieces of a completion are its decoded text, whatever its characters are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kdpipe.results.detokenizer import Detokenizer, TokenText


@pytest.fixture(scope="module")
def bytes_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of single bytes and few merges, with a special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world hello there"] * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_the_pieces_of_any_text_are_that_text(bytes_tokenizer: Path, text: str) -> None:
    ids = Tokenizer.from_file(str(bytes_tokenizer)).encode(text).ids
    pieces = Detokenizer(bytes_tokenizer).of(ids)
    assert len(pieces) == len(ids)
    assert "".join(piece.text for piece in pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece.text for piece in pieces)


def test_a_token_that_is_part_of_a_character_has_no_text_and_the_last_part_has_it(
    bytes_tokenizer: Path,
) -> None:
    ids = Tokenizer.from_file(str(bytes_tokenizer)).encode("a🎉b").ids
    pieces = Detokenizer(bytes_tokenizer).of(ids)
    part = TokenText("", "part")
    assert pieces == [
        TokenText("a", "text"),
        part,
        part,
        part,
        TokenText("🎉", "text"),
        TokenText("b", "text"),
    ]


def test_a_character_that_is_cut_at_the_end_shows_as_one_mark(bytes_tokenizer: Path) -> None:
    ids = Tokenizer.from_file(str(bytes_tokenizer)).encode("a🎉").ids[:-1]
    assert [piece.text for piece in Detokenizer(bytes_tokenizer).of(ids)] == ["a", "", "", "\ufffd"]


def test_special_tokens_are_told_apart_and_interrupt_no_character(bytes_tokenizer: Path) -> None:
    tokenizer = Tokenizer.from_file(str(bytes_tokenizer))
    ids = tokenizer.encode("é").ids
    end = tokenizer.token_to_id("<|end|>")
    pieces = Detokenizer(bytes_tokenizer).of([ids[0], end, ids[1], end])
    assert pieces == [
        TokenText("", "part"),
        TokenText("<|end|>", "special"),
        TokenText("é", "text"),
        TokenText("<|end|>", "special"),
    ]


def test_an_alternative_is_what_it_would_have_added_there(bytes_tokenizer: Path) -> None:
    pieces, tokenizer = Detokenizer(bytes_tokenizer), Tokenizer.from_file(str(bytes_tokenizer))
    ids = tokenizer.encode("hello world").ids
    assert pieces.after(ids[:1], ids[1]) == pieces.of(ids)[1].text
    assert pieces.after([], tokenizer.token_to_id("<|end|>")) == "<|end|>"
    first_byte = tokenizer.encode("é").ids[0]
    assert pieces.after(ids, first_byte) == tokenizer.id_to_token(first_byte)


def test_without_a_tokenizer_ids_stand_for_themselves() -> None:
    assert Detokenizer(None).of([7, 11]) == [TokenText("[7]", "id"), TokenText("[11]", "id")]
