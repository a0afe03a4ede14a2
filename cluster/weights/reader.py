"""Reading experts one at a time, straight from the mapped files to where they will lie.

transformers' conversions (stack, concatenate, transpose, interleave) only move elements. Where to is found out once for
each kind of layer, by sending the numbers of the elements through the conversion: where every tensor comes out as a
strided block, loading an expert is one copy for each of its tensors, and nothing is allocated. What comes out otherwise
goes the long way through the conversion, each time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from cluster.weights.direct import DirectFile, DirectRead, Range
from cluster.weights.mapping import ExpertSource, WeightMap
from cluster.weights.skeleton import MoeLayer

log = logging.getLogger(__name__)

MAX_PROBE_ELEMENTS = 1 << 31
"""The probe numbers elements in int32."""


class Place(NamedTuple):
    """Where a tensor lies in a parameter of one expert: a strided block."""

    offset: int
    strides: tuple[int, ...]
    shape: tuple[int, ...]


class _Plan(NamedTuple):
    """How to read one expert: ``views`` of the files, or of what is read past the page cache before (None where values
    must be dequantised each time), and the places that they go to. None of ``sources``: through the conversion."""

    sources: list[ExpertSource] | None
    places: tuple[tuple[str, Place], ...] = ()
    views: Sequence[torch.Tensor | None] = ()
    file: DirectFile | None = None
    reading: DirectRead | None = None


class Target:
    """Where one expert is written to: its parameters, contiguous, without the dimension of experts."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self._views: dict[tuple[tuple[str, Place], ...], list[torch.Tensor]] = {}

    def views(self, places: tuple[tuple[str, Place], ...]) -> list[torch.Tensor]:
        """The strided blocks of (parameter, place); made once."""
        views = self._views.get(places)
        if views is None:
            views = self._views[places] = [_block(self.tensors[key], place) for key, place in places]
        return views


def _block(tensor: torch.Tensor, place: Place) -> torch.Tensor:
    return tensor.as_strided(place.shape, place.strides, tensor.storage_offset() + place.offset)


class ExpertReader:
    """Fills single experts of ``weights`` in ``dtype``. Thread-safe, but with ``direct``: then one thread reads, past
    the page cache where the file system can.

    Keeps a view of the mapped files for each tensor that was read: addresses, no copies.
    """

    def __init__(self, weights: WeightMap, dtype: torch.dtype, direct: bool = False) -> None:
        self._weights, self._dtype, self._direct = weights, dtype, direct
        self._files: dict[str, DirectFile | None] = {}
        self._places: dict[object, list[Place] | None] = {}
        self._plans: dict[tuple[int, int], _Plan] = {}

    def fill(self, layer: MoeLayer, expert: int, target: Target) -> None:
        """Writes the parameters of one expert.

        Raises:
            CheckpointError: a tensor is missing or cannot be read, or has another shape than the config says.
        """
        key = layer.layer, expert
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plans[key] = self._plan_of(layer, expert)
        if plan.sources is None:
            for name, tensor in self._weights.read_experts(layer, [expert], self._dtype).items():
                target.tensors[name].copy_(tensor[0])
            return
        if plan.file is not None and plan.reading is not None:
            plan.file.read(plan.reading)
        for view, block, source in zip(plan.views, target.views(plan.places), plan.sources, strict=True):
            if view is None:
                view = self._weights.checkpoint.read(source.name, self._dtype, source.rows).view(block.shape)
            block.copy_(view)

    @property
    def is_direct(self) -> bool:
        """Some file is read past the page cache."""
        return any(file is not None for file in self._files.values())

    def _file(self, name: str) -> DirectFile | None:
        checkpoint = self._weights.checkpoint
        file = checkpoint.tensors[name].file
        if file not in self._files:
            self._files[file] = DirectFile.open(checkpoint.path / file)
            if self._files[file] is None:
                log.warning("%s cannot be read past the page cache; it is mapped", file)
        return self._files[file]

    def read(self, layer: MoeLayer, experts: Sequence[int], threads: int = 1) -> dict[str, torch.Tensor]:
        """Parameters of the layer's experts module, first dimension ``len(experts)``, read by ``threads`` threads, or
        with ``direct`` by one: readings of a file share a buffer."""
        tensors = {
            key: torch.empty((len(experts), *parameter.shape[1:]), dtype=self._dtype)
            for key, parameter in layer.module.named_parameters()
        }

        # Tensors made in inference mode can be written in inference mode only, which a new thread is not in.
        @torch.inference_mode()
        def fill(slot: int) -> None:
            self.fill(layer, experts[slot], Target({key: tensor[slot] for key, tensor in tensors.items()}))

        if threads == 1 or self._direct or len(experts) < 2:
            for slot in range(len(experts)):
                fill(slot)
        else:
            with ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool:
                list(pool.map(fill, range(len(experts))))
        return tensors

    def _plan_of(self, layer: MoeLayer, expert: int) -> _Plan:
        sources: list[ExpertSource] = []
        places: list[tuple[str, Place]] = []
        for key, parameter in layer.module.named_parameters():
            of_key = self._weights.expert_sources(layer, key, expert)
            shapes = tuple(self._shape(source) for source in of_key)
            kind = key, tuple(parameter.shape[1:]), tuple(source.pattern for source in of_key), shapes
            if kind not in self._places:
                self._places[kind] = self._probe(layer, key, expert, of_key)
            found = self._places[kind]
            if found is None:
                return _Plan(None)
            sources += of_key
            places += [(key, place) for place in found]
        views = [
            _shaped(self._weights.checkpoint.view(source.name, source.rows), place.shape)
            for source, (_, place) in zip(sources, places, strict=True)
        ]
        plan = _Plan(sources, tuple(places), views)
        return self._past_the_cache(plan) if self._direct else plan

    def _past_the_cache(self, plan: _Plan) -> _Plan:
        """The same, if one file has all of it and can be read like this."""
        sources, views = plan.sources or [], [view for view in plan.views if view is not None]
        files = {self._weights.checkpoint.tensors[source.name].file for source in sources}
        file = self._file(sources[0].name) if len(files) == 1 and len(views) == len(sources) else None
        if file is None:
            return plan
        ranges = []
        for source, view in zip(sources, views, strict=True):
            start, end = file.range_of(source.name)
            if source.rows is not None:
                start += source.rows[0] * view.nbytes
                end = start + view.nbytes
            ranges.append(Range(start, end))
        reading = file.prepare(ranges)
        read = [raw.view(view.dtype).view(view.shape) for raw, view in zip(reading.tensors, views, strict=True)]
        return plan._replace(views=read, file=file, reading=reading)

    def _shape(self, source: ExpertSource) -> tuple[int, ...]:
        shape = self._weights.checkpoint.tensors[source.name].shape
        return shape if source.rows is None else (1, *shape[1:])

    def _probe(self, layer: MoeLayer, key: str, expert: int, sources: Sequence[ExpertSource]) -> list[Place] | None:
        """Where each source comes out of the conversion; None where that is no strided block."""
        numbers: dict[str, torch.Tensor] = {}
        first = 0
        for source in sources:
            shape = self._shape(source)
            count = torch.Size(shape).numel()
            if first + count >= MAX_PROBE_ELEMENTS:
                return None
            numbers[source.name] = torch.arange(first, first + count, dtype=torch.int32).view(shape)
            first += count
        try:
            outcome = self._weights.convert_expert(layer, key, expert, lambda name, _rows: numbers[name])
        except Exception as exc:  # noqa: BLE001 (whatever a conversion wants of real values)
            log.info("experts of %s are converted one by one: %s", layer.prefix, exc)
            return None
        wanted = next(tuple(p.shape[1:]) for name, p in layer.module.named_parameters() if name == key)
        if outcome.dtype is not torch.int32 or tuple(outcome.shape) != (1, *wanted) or outcome.numel() != first:
            return None
        flat = outcome.reshape(-1)
        place_of = torch.empty(first, dtype=torch.int64)
        place_of[flat.long()] = torch.arange(first)
        places = [_place(flat, place_of, numbers[source.name]) for source in sources]
        found = [place for place in places if place is not None]
        return found if len(found) == len(places) else None


def _shaped(view: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor | None:
    return None if view is None else view.view(shape)


def _place(flat: torch.Tensor, place_of: torch.Tensor, numbers: torch.Tensor) -> Place | None:
    """The strided block of ``flat`` that holds ``numbers``."""
    numbers = numbers.squeeze(0) if numbers.dim() > 1 and numbers.shape[0] == 1 else numbers
    first = int(numbers.reshape(-1)[0])
    offset = int(place_of[first])
    strides, step = [], 1
    for size in reversed(numbers.shape):
        strides.append(int(place_of[first + step]) - offset if size > 1 else 1)
        step *= size
    strides.reverse()
    last = offset + sum(stride * (size - 1) for stride, size in zip(strides, numbers.shape, strict=True))
    if min(strides, default=1) < 0 or last >= flat.numel():
        return None
    block = flat.as_strided(numbers.shape, strides, offset)
    return Place(offset, tuple(strides), tuple(numbers.shape)) if torch.equal(block, numbers) else None
