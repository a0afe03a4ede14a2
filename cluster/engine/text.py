"""Text in and out: the checkpoint's tokenizer, pieces that never split a character, and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from cluster.errors import CheckpointError, InvalidArgument

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_INCOMPLETE = "\ufffd"
_MAX_INCOMPLETE_TOKENS = 4
"""A UTF-8 character has four bytes at most, and a token one byte at least."""


class Tokenizer:
    """The checkpoint's tokenizer, or None where it has none (see `load_tokenizer`)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of ``text``."""
        return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=special)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ``ids``; bytes that are no character become U+FFFD."""
        text: str = self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        return text

    def chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of a conversation through the chat template, ready for an answer.

        Raises:
            InvalidArgument: the checkpoint has no chat template, or the template refuses the roles.
        """
        if not self._tokenizer.chat_template:
            raise InvalidArgument("messages", f"{len(messages)} messages", "this checkpoint has no chat template")
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            text = self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        except (TemplateError, ValueError, KeyError, TypeError) as exc:
            problem = " ".join(str(exc).split())[:200]
            raise InvalidArgument(
                "messages", [role for role, _ in messages], f"the chat template refuses them: {problem}"
            ) from exc
        return self.encode(text, special=False)


def load_tokenizer(path: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, None if it has no tokenizer files.

    Raises:
        CheckpointError: there are tokenizer files, and they cannot be read.
    """
    if not any((path / name).exists() for name in _TOKENIZER_FILES):
        return None
    try:
        return Tokenizer(AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False))
    except Exception as exc:
        raise CheckpointError(f"--model: the tokenizer of {str(path)!r} cannot be read: {exc}") from exc


class TextStream:
    """Tokens of one sequence in, text pieces out.

    A piece never splits a character, and never holds the beginning of something that may become a stop string.
    Without a tokenizer there are no pieces.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop_strings: Sequence[str]) -> None:
        self._tokenizer, self._stop_strings = tokenizer, tuple(stop_strings)
        self._ids: list[int] = []
        self._prefix = 0  # decoding starts here: some tokenizers drop or add a space at the start of a text
        self._read = 0  # tokens up to here are in the text already
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """(text that is ready, whether a stop string has appeared)."""
        if self._tokenizer is None:
            return "", False
        self._ids.append(token)
        return self._release(self._decode(last=False))

    def finish(self) -> str:
        """What was held back, when the sequence ends for another reason than a stop string."""
        if self._tokenizer is None:
            return ""
        text, stopped = self._release(self._decode(last=True))
        if not stopped:
            text, self._held = text + self._held, ""
        return text

    def _decode(self, last: bool) -> str:
        assert self._tokenizer is not None
        before = self._tokenizer.decode(self._ids[self._prefix : self._read])
        now = self._tokenizer.decode(self._ids[self._prefix :])
        incomplete = now.endswith(_INCOMPLETE) and len(self._ids) - self._read < _MAX_INCOMPLETE_TOKENS
        if (incomplete and not last) or len(now) <= len(before):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def _release(self, new: str) -> tuple[str, bool]:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop_strings) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = 0
        for stop in self._stop_strings:
            for length in range(min(len(stop) - 1, len(text)), keep, -1):
                if text.endswith(stop[:length]):
                    keep = length
                    break
        self._held = text[len(text) - keep :] if keep else ""
        return text[: len(text) - keep], False
