from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cluster.engine.text import TextStream, Tokenizer, load_tokenizer
from cluster.errors import CheckpointError, InvalidArgument


def byte_tokenizer() -> Tokenizer:
    """One token a byte: the worst case for characters of several bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = RawTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw))


BYTES = byte_tokenizer()
TEXT = st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters=["\ufffd"]), max_size=30)


@settings(deadline=None)
@given(TEXT)
def test_pieces_are_whole_characters_and_add_up_to_the_text(text: str) -> None:
    stream = TextStream(BYTES, [])
    pieces = [stream.push(token)[0] for token in BYTES.encode(text)] + [stream.finish()]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


@settings(deadline=None)
@given(TEXT, st.lists(st.text(min_size=1, max_size=4, alphabet="abé "), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string_and_never_shows_a_part_of_it(text: str, stops: list[str]) -> None:
    text = text + "ab é ba" + text
    stream = TextStream(BYTES, stops)
    shown, stopped = "", False
    for token in BYTES.encode(text):
        piece, stopped = stream.push(token)
        shown += piece
        if stopped:
            break
    if not stopped:
        shown += stream.finish()
    assert all(stop not in shown for stop in stops)
    assert text.startswith(shown)
    assert stopped == any(stop in text for stop in stops)
    if not stopped:
        assert shown == text


def test_bytes_that_are_no_character_are_not_held_for_ever() -> None:
    stream = TextStream(BYTES, [])
    lonely = BYTES.encode("é")[0]
    pieces = [stream.push(lonely)[0] for _ in range(12)]
    assert "".join(pieces).count("\ufffd") >= 8


def test_without_a_tokenizer_there_is_no_text() -> None:
    stream = TextStream(None, [])
    assert stream.push(5) == ("", False)
    assert stream.finish() == ""


def test_a_directory_without_tokenizer_files_has_no_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_a_damaged_tokenizer_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_messages_need_a_chat_template() -> None:
    with pytest.raises(InvalidArgument, match="no chat template"):
        BYTES.chat([("user", "hello")])
