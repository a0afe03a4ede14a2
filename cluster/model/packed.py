"""A ragged batch packed as one row: its positions, its masks, and the cache that keeps sequences apart.

All tokens of a step are one ``[1, T]`` row. The cache stores keys and values per sequence and hands attention the
history of all of them, one after another; the mask lets a token see only its own sequence. What a model caches is
what is stored: DeepSeek's latents stay compressed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from cluster.errors import InternalError, UnsupportedModel


class SequenceKv:
    """Keys and values of one sequence, all layers, with room for ``capacity`` tokens; ``length`` are committed.

    Buffers are allocated once, when a layer stores its first tokens.
    """

    def __init__(self, capacity: int) -> None:
        self.length, self.capacity = 0, capacity
        self._keys: list[torch.Tensor | None] = []
        self._values: list[torch.Tensor | None] = []

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores ``keys`` and ``values`` [1, heads, new, dim] behind the committed ones; returns views of all."""
        while len(self._keys) <= layer:
            self._keys.append(None)
            self._values.append(None)
        end = self.length + keys.shape[2]
        key_buffer = self._keys[layer] = self._buffer(self._keys[layer], keys)
        value_buffer = self._values[layer] = self._buffer(self._values[layer], values)
        key_buffer[:, :, self.length : end] = keys
        value_buffer[:, :, self.length : end] = values
        return key_buffer[:, :, :end], value_buffer[:, :, :end]

    def _buffer(self, buffer: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
        return new.new_empty((*new.shape[:2], self.capacity, new.shape[3])) if buffer is None else buffer

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values) if t is not None)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's part of a step: ``ids`` are the tokens from position ``kv.length`` on."""

    ids: Sequence[int]
    kv: SequenceKv


class PackedBatch:
    """Index tensors of one step. ``last_T`` are the row numbers of each chunk's last token; ``spans`` and ``key_spans``
    are each sequence's (start, end) among the T rows and the S keys."""

    def __init__(self, chunks: Sequence[Chunk], device: torch.device) -> None:
        self.chunks = list(chunks)
        lengths = [len(chunk.ids) for chunk in self.chunks]
        self.spans: list[tuple[int, int]] = []
        start = 0
        for length in lengths:
            self.spans.append((start, start + length))
            start += length
        self.ids = torch.tensor([[i for chunk in self.chunks for i in chunk.ids]], dtype=torch.int64, device=device)
        starts = [chunk.kv.length for chunk in self.chunks]
        self.positions_T = torch.cat(
            [torch.arange(at, at + n, device=device) for at, n in zip(starts, lengths, strict=True)]
        )
        self.last_T = torch.tensor([end - 1 for _, end in self.spans], dtype=torch.int64, device=device)
        numbers = torch.arange(len(self.chunks), device=device)
        totals = [at + n for at, n in zip(starts, lengths, strict=True)]
        self.key_spans = [(sum(totals[:i]), sum(totals[: i + 1])) for i in range(len(totals))]
        self.key_positions_S = torch.cat([torch.arange(n, device=device) for n in totals])
        self._query_sequence_T = numbers.repeat_interleave(torch.tensor(lengths, device=device))
        self._key_sequence_S = numbers.repeat_interleave(torch.tensor(totals, device=device))

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.ids.shape[1])

    def mask(self, mask_function: Callable[..., torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [1, 1, T, S]: ``mask_function`` (the model's own: causal, windowed, ...) within a sequence,
        the lowest value of ``dtype`` elsewhere."""
        zero = torch.zeros((), dtype=torch.int64, device=self.ids.device)
        if bool(mask_function(zero, zero, zero, zero + 1)):
            raise UnsupportedModel("--model: its attention sees later tokens; only causal models are served")
        allowed = mask_function(zero, zero, self.positions_T[:, None], self.key_positions_S[None, :])
        allowed = allowed & (self._query_sequence_T[:, None] == self._key_sequence_S[None, :])
        lowest = torch.full((), torch.finfo(dtype).min, dtype=dtype, device=self.ids.device)
        return torch.where(allowed, torch.zeros((), dtype=dtype, device=self.ids.device), lowest)[None, None]

    def commit(self) -> None:
        """Makes the step's tokens part of the history."""
        for chunk in self.chunks:
            chunk.kv.length += len(chunk.ids)


class PackedCache(Cache):
    """transformers' cache interface over the sequences of one step."""

    def __init__(self, batch: PackedBatch) -> None:
        super().__init__(layers=[])
        self._batch = batch

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the step's keys and values [1, heads, T, dim]; returns those of all sequences, [1, heads, S, dim]."""
        keys, values = [], []
        for chunk, (start, end) in zip(self._batch.chunks, self._batch.spans, strict=True):
            key, value = chunk.kv.append(layer_idx, key_states[:, :, start:end], value_states[:, :, start:end])
            keys.append(key)
            values.append(value)
        if len(keys) == 1:
            return keys[0], values[0]
        return torch.cat(keys, dim=2), torch.cat(values, dim=2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Only asked for by code that does not take our positions and masks; such code has no answer here."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(keys of all sequences, 0)."""
        return int(self._batch.key_positions_S.numel()), 0


_current: ContextVar[PackedBatch] = ContextVar("expertmesh_packed_batch")


def current_batch() -> PackedBatch:
    """The batch of the step that this thread is in.

    Raises:
        InternalError: it is in none.
    """
    batch = _current.get(None)
    if batch is None:
        raise InternalError("the model was called outside a step")
    return batch


@contextmanager
def stepping(batch: PackedBatch) -> Iterator[None]:
    """While it lasts, masks that the model asks for in this thread are those of ``batch``."""
    token = _current.set(batch)
    try:
        yield
    finally:
        _current.reset(token)


def packed_mask(
    *_args: object,
    mask_function: Callable[..., torch.Tensor],
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    use_vmap: bool = False,
    **_kwargs: object,
) -> torch.Tensor:
    """Mask function of transformers' attention-mask interface, registered with the hook's own name."""
    if attention_mask is not None or use_vmap:
        raise InternalError("the model asks for a mask that a packed batch does not have")
    return current_batch().mask(mask_function, dtype)
