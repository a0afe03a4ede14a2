"""The store of keys and values: what one that follows another has, and which of its memory is there."""

from __future__ import annotations

import ctypes
import mmap

import torch

from cluster.model.kv import KvStore

BLOCKS, SIZE, HEADS, DIM = 4096, 16, 4, 64  # 64 MiB of keys a layer
BYTES_PER_TOKEN = 2 * 2 * HEADS * DIM * 4


def used(layers: int = 2) -> KvStore:
    store = KvStore(1, 4)
    for layer in range(layers):
        store.store(layer, torch.arange(3), torch.randn(1, HEADS, 3, DIM), torch.randn(1, HEADS, 3, DIM))
    return store


def resident(buffer: torch.Tensor) -> list[bool]:
    """Of each page that lies in it as a whole."""
    page = mmap.PAGESIZE
    first, end = -(-buffer.data_ptr() // page), (buffer.data_ptr() + buffer.nbytes) // page
    found = (ctypes.c_ubyte * (end - first))()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mincore(ctypes.c_void_p(first * page), ctypes.c_size_t((end - first) * page), found) == 0
    return [bool(each & 1) for each in found]


def test_memory_of_the_first_blocks_is_there() -> None:
    tokens = BLOCKS * SIZE // 4
    store = used().followed_by(BLOCKS, SIZE, tokens * BYTES_PER_TOKEN)
    for layer in range(2):
        for buffer in store.layer(layer):
            assert buffer.shape == (BLOCKS * SIZE, HEADS, DIM)
            assert all(resident(buffer[:tokens]))
            assert not all(resident(buffer[2 * tokens :]))


def test_no_more_than_there_is_and_nothing_where_nothing_is_wanted() -> None:
    assert all(all(resident(buffer)) for buffer in used(1).followed_by(8, SIZE, 10**12).layer(0))
    assert not all(resident(used(1).followed_by(BLOCKS, SIZE, 0).layer(0)[0]))
    assert not KvStore(1, 4).followed_by(8, SIZE, 10**12).has(0)


def test_it_keeps_nothing_of_the_one_before_and_stores_as_any_other() -> None:
    store = used().followed_by(8, SIZE, 5 * BYTES_PER_TOKEN)
    assert store.bytes_per_token == BYTES_PER_TOKEN
    keys, values = torch.randn(1, HEADS, 20, DIM), torch.randn(1, HEADS, 20, DIM)
    at = torch.from_numpy(store.positions([5, 2], 0, 20))
    store.store(1, at, keys, values)
    got = store.read(1, store.runs([5, 2], 20))
    assert torch.equal(got[0], keys)
    assert torch.equal(got[1], values)
    assert not store.layer(0)[0][:5].any()
