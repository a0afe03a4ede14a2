"""A ragged batch packed as one row: its positions, its masks, and the cache that keeps sequences apart.

All tokens of a step are one ``[1, T]`` row. Attention does not mix sequences (`cluster.model.attention`); what of a
sequence's history a token may see is asked of the model's own mask functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import numpy as np
import torch
from transformers.cache_utils import Cache

from cluster.errors import InternalError, UnsupportedModel
from cluster.kernels.attention import Histories
from cluster.model.kv import KvStore, Runs
from cluster.model.ragged import Ragged
from cluster.model.together import Bundle, Single, bundles_of

MaskFunction = Callable[..., torch.Tensor]
MOST_ASKED = 64 * 1024**2
"""Tokens times keys of which a mask is asked at once."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence's part of a step: ``ids`` are the tokens from position ``start`` on, and ``blocks`` the blocks of
    the key-value store that hold the sequence up to the last of them."""

    ids: Sequence[int]
    start: int
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence in the batch: rows ``first`` to ``last`` of the T, positions ``start`` to ``total`` of its own, and
    ``key_first`` to ``key_last`` of the S where all histories lie one behind the other."""

    first: int
    last: int
    start: int
    total: int
    key_first: int
    key_last: int
    runs: Runs

    @property
    def num_rows(self) -> int:
        """Tokens of this step."""
        return self.last - self.first


class PackedBatch:
    """Index tensors of one step. ``last_T`` are the row numbers of each chunk's last token."""

    def __init__(self, chunks: Sequence[Chunk], store: KvStore, device: torch.device, together: bool = False) -> None:
        self.store, self.device = store, device
        self._chunks, self.together = chunks, together
        self._bundles: list[Bundle] | None = None
        self._ragged: Ragged | None = None
        self.spans: list[Span] = []
        row = key = 0
        positions, at = [], []
        for chunk in chunks:
            rows, total = len(chunk.ids), chunk.start + len(chunk.ids)
            runs = store.runs(chunk.blocks, total)
            self.spans.append(Span(row, row + rows, chunk.start, total, key, key + total, runs))
            positions.append(np.arange(chunk.start, total))
            at.append(store.positions(chunk.blocks, chunk.start, total))
            row, key = row + rows, key + total
        ids = np.fromiter((i for chunk in chunks for i in chunk.ids), np.int64, row)
        self.ids = torch.from_numpy(ids)[None].to(device)
        self.positions_T = torch.from_numpy(np.concatenate(positions)).to(device)
        self.at_T = torch.from_numpy(np.concatenate(at)).to(device)
        self.last_T = torch.tensor([span.last - 1 for span in self.spans], dtype=torch.int64, device=device)
        self.num_keys = key
        self._masks: list[BatchMask] = []

    def bundles(self) -> list[Bundle]:
        """Sequences with one token each whose attention is computed together; none where there is only one, or where
        that is not wanted."""
        if self._bundles is None:
            singles = [
                Single(span.first, span.total, span.key_first, chunk.blocks)
                for span, chunk in zip(self.spans, self._chunks, strict=True)
                if span.num_rows == 1
            ]
            wanted = self.together and len(singles) > 1
            self._bundles = bundles_of(singles, self.store.block_size, self.device) if wanted else []
        return self._bundles

    def ragged(self) -> Ragged:
        """Where all sequences begin."""
        if self._ragged is None:
            self._ragged = Ragged(
                [span.num_rows for span in self.spans], [span.runs for span in self.spans], self.device
            )
        return self._ragged

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.ids.shape[1])

    def mask(self, mask_function: MaskFunction, dtype: torch.dtype) -> torch.Tensor:
        """A tensor that stands for the mask until `mask_of` is asked for it."""
        zero = torch.zeros((), dtype=torch.int64, device=self.device)
        if bool(mask_function(zero, zero, zero, zero + 1)):
            raise UnsupportedModel("--model: its attention sees later tokens; only causal models are served")
        mask = BatchMask(self, mask_function, dtype)
        self._masks.append(mask)
        return mask.token

    def mask_of(self, token: torch.Tensor | None) -> BatchMask:
        """The mask that ``token`` stands for.

        Raises:
            UnsupportedModel: the model has made something of its own of it.
        """
        for mask in self._masks:
            if mask.token is token:
                return mask
        raise UnsupportedModel("--model: its attention changes the mask on the way; such models are not served")


class BatchMask:
    """Which keys each token of a batch may see, sequence by sequence: the model's own function (causal, windowed, ...)
    of positions."""

    def __init__(self, batch: PackedBatch, function: MaskFunction, dtype: torch.dtype) -> None:
        self.token = torch.zeros((1, 1, 1, 1), dtype=dtype, device=batch.device)
        self._batch, self._function, self._dtype = batch, function, dtype
        self._zero = torch.zeros((), dtype=torch.int64, device=batch.device)
        self._allowed: dict[int, torch.Tensor | None] = {}
        self._additive: dict[int, torch.Tensor] = {}
        self._together: dict[int, torch.Tensor] = {}
        self._additive_together: dict[int, torch.Tensor] = {}
        self._open: list[bool] | None = None
        self._causal: dict[int, bool] = {}
        self._all_causal: bool | None = None
        self._histories: Histories | None = None
        self._has_histories: bool | None = None

    def histories(self) -> Histories | None:
        """Of the sequences with one token each that see all of their history; None where there are none."""
        if self._has_histories is None:
            spans = self._batch.spans
            of = [n for n, span in enumerate(spans) if span.num_rows == 1 and self.allowed(n) is None]
            self._has_histories = bool(of)
            if of:
                self._histories = Histories([spans[n].first for n in of], [spans[n].runs for n in of], of)
        return self._histories

    def allowed(self, number: int) -> torch.Tensor | None:
        """Bool [t, S] of sequence ``number``; None where every token sees the whole history (one that decodes)."""
        if number not in self._allowed:
            span = self._batch.spans[number]
            self._allowed[number] = None if span.num_rows == 1 and self._sees_all(number) else self._evaluate(span)
        return self._allowed[number]

    def is_causal(self, number: int) -> bool:
        """Every token of sequence ``number`` sees itself and all before it."""
        if number not in self._causal:
            allowed, span, device = self.allowed(number), self._batch.spans[number], self._batch.device
            rows, keys = torch.arange(span.start, span.total, device=device), torch.arange(span.total, device=device)
            self._causal[number] = allowed is None or torch.equal(allowed, keys[None, :] <= rows[:, None])
        return self._causal[number]

    def all_causal(self) -> bool:
        """`is_causal` of all sequences, asked at once; False where there are too many tokens to ask."""
        if self._all_causal is None:
            spans, rows_T = self._batch.spans, self._batch.positions_T
            longest = max(span.total for span in spans)
            self._all_causal = len(rows_T) * longest <= MOST_ASKED
            if self._all_causal:
                keys_S = torch.arange(longest, device=self._batch.device)
                seen_TS = self._function(self._zero, self._zero, rows_T[:, None], keys_S[None, :])
                self._all_causal = bool((seen_TS == (keys_S[None, :] <= rows_T[:, None])).all())
        return self._all_causal

    def additive(self, number: int) -> torch.Tensor:
        """[1, 1, t, S] for the model's own attention: 0, or the lowest value of the dtype."""
        if number not in self._additive:
            allowed = self.allowed(number)
            span = self._batch.spans[number]
            mask = torch.zeros((span.num_rows, span.total), dtype=self._dtype, device=self._batch.device)
            if allowed is not None:
                mask.masked_fill_(~allowed, torch.finfo(self._dtype).min)
            self._additive[number] = mask[None, None]
        return self._additive[number]

    def allowed_together(self, number: int) -> torch.Tensor:
        """Bool [B, 1, 1, S] of bundle ``number`` of the batch."""
        if number not in self._together:
            self._together[number] = self._batch.bundles()[number].allowed(self._function)
        return self._together[number]

    def additive_together(self, number: int) -> torch.Tensor:
        """The same for the model's own attention: 0, or the lowest value of the dtype."""
        if number not in self._additive_together:
            allowed = self.allowed_together(number)
            mask = torch.zeros(allowed.shape, dtype=self._dtype, device=allowed.device)
            self._additive_together[number] = mask.masked_fill_(~allowed, torch.finfo(self._dtype).min)
        return self._additive_together[number]

    def _evaluate(self, span: Span) -> torch.Tensor:
        device = self._batch.device
        rows = torch.arange(span.start, span.total, device=device)
        keys = torch.arange(span.total, device=device)
        allowed = self._function(self._zero, self._zero, rows[:, None], keys[None, :])
        return allowed.expand(span.num_rows, span.total)

    def _sees_all(self, number: int) -> bool:
        """Asked at once for all sequences with one token, since there may be many."""
        if self._open is None:
            spans, device = self._batch.spans, self._batch.device
            totals_B = torch.tensor([span.total for span in spans], device=device)
            keys_S = torch.arange(int(totals_B.max()), device=device)
            seen_BS = self._function(self._zero, self._zero, totals_B[:, None] - 1, keys_S[None, :])
            self._open = (seen_BS | (keys_S[None, :] >= totals_B[:, None])).all(dim=1).tolist()
        return self._open[number]


class Layers:
    """What is known of a model's attention layers, from its own calls.

    ``direct``: the layer gives attention the very tensors that the cache returned, so the cache need not gather
    histories that attention then takes apart again. ``fast``: torch's attention gives the same; ``paged``: so does
    ours, for one token, and ``causal`` for many; ``ragged``: so does torch's for all sequences at once.
    """

    def __init__(self) -> None:
        self.direct: dict[int, bool] = {}
        self.fast: dict[int, bool] = {}
        self.paged: dict[int, bool] = {}
        self.causal: dict[int, bool] = {}
        self.ragged: dict[int, bool] = {}
        self.checked: dict[int, set[bool]] = {}


class PackedCache(Cache):
    """transformers' cache interface over the sequences of one step."""

    def __init__(self, batch: PackedBatch, layers: Layers) -> None:
        super().__init__(layers=[])
        self._batch, self.known = batch, layers
        self.layer = -1
        self._returned: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the step's keys and values [1, heads, T, dim]; returns those of all sequences, [1, heads, S, dim], or
        for a layer that is known to be direct only the step's own."""
        batch = self._batch
        batch.store.store(layer_idx, batch.at_T, key_states, value_states)
        self.layer = layer_idx
        if not self.known.direct.get(layer_idx, False):
            pairs = [batch.store.read(layer_idx, span.runs) for span in batch.spans]
            if len(pairs) == 1:
                key_states, value_states = pairs[0]
            else:
                key_states = torch.cat([keys for keys, _ in pairs], dim=2)
                value_states = torch.cat([values for _, values in pairs], dim=2)
        self._returned = (key_states, value_states)
        return self._returned

    def is_direct(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Attention got what `update` has just returned."""
        returned = self._returned
        same = returned is not None and key is returned[0] and value is returned[1]
        if self.known.direct.setdefault(self.layer, same) and not same:
            raise InternalError(f"attention layer {self.layer} no longer takes what its cache returned")
        return self.known.direct[self.layer]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Only asked for by code that does not take our positions and masks; such code has no answer here."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(keys of all sequences, 0)."""
        return self._batch.num_keys, 0


@dataclass(frozen=True, slots=True)
class Step:
    """What one step's attention needs."""

    batch: PackedBatch
    cache: PackedCache


_current: ContextVar[Step] = ContextVar("expertmesh_step")


def current_step() -> Step:
    """The step that this thread is in.

    Raises:
        InternalError: it is in none.
    """
    step = _current.get(None)
    if step is None:
        raise InternalError("the model was called outside a step")
    return step


@contextmanager
def stepping(step: Step) -> Iterator[None]:
    """While it lasts, masks and attention of this thread are those of ``step``."""
    token = _current.set(step)
    try:
        yield
    finally:
        _current.reset(token)


def packed_mask(
    *_args: object,
    mask_function: MaskFunction,
    attention_mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    use_vmap: bool = False,
    **_kwargs: object,
) -> torch.Tensor:
    """Mask function of transformers' attention-mask interface, registered with the hook's own name."""
    if attention_mask is not None or use_vmap:
        raise InternalError("the model asks for a mask that a packed batch does not have")
    return current_step().batch.mask(mask_function, dtype)
