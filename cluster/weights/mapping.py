"""Which tensors of a checkpoint fill which parameter of transformers' model, and reading just those.

Names and conversions (experts one by one or fused, renamed blocks, transposed or interleaved matrices) come from
transformers' own conversion tables; what is added here is reading a *subset* of a layer's experts.
"""

from __future__ import annotations

import copy
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from cluster.errors import CheckpointError
from cluster.weights.checkpoint import Checkpoint
from cluster.weights.skeleton import MoeLayer, Skeleton, missing_message

log = logging.getLogger(__name__)


Read = Callable[[str, list[int] | None], torch.Tensor]
"""(tensor's name, rows of its first dimension or None for all) -> the tensor."""


class ExpertSource(NamedTuple):
    """A tensor of the checkpoint that fills a part of one expert's parameter: all of it, or a row of it."""

    name: str
    pattern: str
    rows: list[int] | None


@dataclass(slots=True)
class _Source:
    """What fills one parameter: ``converter`` is None for a plain tensor; tensor names by converter pattern."""

    converter: WeightConverter | None
    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


class WeightMap:
    """Reads trunk parameters and slices of experts of ``skeleton`` from ``checkpoint``.

    Raises:
        CheckpointError: a parameter has no tensors, or a layer lacks experts.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: Skeleton) -> None:
        self.checkpoint, self.skeleton = checkpoint, skeleton
        self._state = skeleton.model.state_dict()
        self._sources = self._match()
        self._check_complete()

    def _match(self) -> dict[str, _Source]:
        model = self.skeleton.model
        transforms = get_model_conversion_mapping(model)
        renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
        converters = [item for item in transforms if isinstance(item, WeightConverter)]
        by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
        prefix = model.base_model_prefix
        sources: dict[str, _Source] = {}
        ignored: list[str] = []
        for name in sorted(self.checkpoint.weight_names(), key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._state)
            if target not in self._state and name in self._state:
                target, pattern = name, None
            if target not in self._state:
                ignored.append(name)
                continue
            converter = by_pattern[pattern] if pattern is not None else None
            source = sources.setdefault(target, _Source(converter))
            source.names[pattern or name].append(name)
        if ignored:
            log.info(
                "%d tensors belong to no parameter of %s, such as %s", len(ignored), self.checkpoint.arch, ignored[0]
            )
        return sources

    def _check_complete(self) -> None:
        """Names what is missing now, from the headers alone, and not when processes are loading."""
        multiple = any(s.converter is not None and len(s.converter.target_patterns) > 1 for s in self._sources.values())
        # Where one tensor fills several parameters, only the conversion knows which; `read_trunk` looks again.
        missing = [] if multiple else [name for name in self.trunk_names() if name not in self._sources]
        for layer in self.skeleton.moe_layers:
            for key, _ in layer.module.named_parameters():
                target = f"{layer.prefix}.{key}"
                if target not in self._sources:
                    missing.append(target)
                    continue
                for pattern, names in self._sources[target].names.items():
                    if "*" in pattern and len(names) != layer.num_experts:
                        raise CheckpointError(
                            f"--model: layer {layer.prefix!r} has {len(names)} tensors like {names[0]!r}, "
                            f"the config says {layer.num_experts} experts"
                        )
        if missing:
            raise missing_message(self.checkpoint, missing)

    # -- trunk ---------------------------------------------------------------------------------------------------

    def trunk_names(self) -> list[str]:
        """Parameters and persistent buffers that are no routed expert's, without those tied to another."""
        tied = _tied_targets(self.skeleton.model)
        prefixes = self.skeleton.expert_prefixes()
        return [
            name
            for name in self._state
            if not name.startswith(prefixes) and not (name in tied and name not in self._sources)
        ]

    def trunk_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the trunk in ``dtype``."""
        return int(sum(self._state[name].numel() for name in self.trunk_names()) * dtype.itemsize)

    def read_trunk(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Every trunk parameter by name, in ``dtype`` or, where the model asks for it, in fp32."""
        loaded: dict[str, torch.Tensor] = {}
        wanted = self.trunk_names()
        for target in [name for name in self._sources if name in set(wanted)]:
            read = self._reading(self.dtype_of(target, dtype))
            loaded.update(self._convert(target, self._sources[target], read, None))
        missing = [name for name in wanted if name not in loaded]
        if missing:
            raise missing_message(self.checkpoint, missing)
        for name, tensor in loaded.items():
            if name in self._state and tuple(tensor.shape) != tuple(self._state[name].shape):
                expected = tuple(self._state[name].shape)
                raise CheckpointError(f"--model: {name!r} has shape {tuple(tensor.shape)}, the config says {expected}")
        return loaded

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """``dtype``, or fp32 for what the model keeps in fp32 (as transformers' ``from_pretrained`` decides)."""
        model = self.skeleton.model
        keep = set(model._keep_in_fp32_modules_strict or ()) if dtype in (torch.float16, torch.bfloat16) else set()
        if dtype == torch.float16:
            keep |= set(model._keep_in_fp32_modules or ())
        return torch.float32 if any(re.search(rf"(^|\.){re.escape(part)}(\.|$)", name) for part in keep) else dtype

    # -- experts -------------------------------------------------------------------------------------------------

    def expert_bytes(self, layer: MoeLayer, dtype: torch.dtype) -> int:
        """Bytes of one expert of the layer in ``dtype``."""
        elements = sum(parameter.numel() for parameter in layer.module.parameters())
        return int(elements // layer.num_experts * dtype.itemsize)

    def read_experts(self, layer: MoeLayer, experts: Sequence[int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Parameters of the layer's experts module (``gate_up_proj``, ...), first dimension ``len(experts)``.

        Only the bytes of these experts are read from disk.
        """
        result: dict[str, torch.Tensor] = {}
        for key, parameter in layer.module.named_parameters():
            target = f"{layer.prefix}.{key}"
            source = self._sources.get(target)
            if source is None:
                raise missing_message(self.checkpoint, [target])
            tensor = self._convert(target, source, self._reading(dtype), list(experts))[target]
            expected = (len(experts), *parameter.shape[1:])
            if tuple(tensor.shape) != expected:
                raise CheckpointError(
                    f"--model: experts of {target!r} have shape {tuple(tensor.shape)}, the config says {expected}"
                )
            result[key] = tensor.contiguous()
        return result

    def expert_sources(self, layer: MoeLayer, key: str, expert: int) -> list[ExpertSource]:
        """The tensors that fill one parameter (``key`` of the experts module) of one expert."""
        target = f"{layer.prefix}.{key}"
        source = self._sources.get(target)
        if source is None:
            raise missing_message(self.checkpoint, [target])
        if source.converter is None:
            ((pattern, names),) = source.names.items()
            return [ExpertSource(names[-1], pattern, [expert])]
        found = []
        for pattern, names in source.names.items():
            if "*" in pattern:
                found.append(ExpertSource(names[expert], pattern, None))
            else:
                found += [ExpertSource(name, pattern, [expert]) for name in names]
        return found

    def convert_expert(self, layer: MoeLayer, key: str, expert: int, read: Read) -> torch.Tensor:
        """One parameter of one expert, first dimension 1, made of what ``read`` gives."""
        target = f"{layer.prefix}.{key}"
        return self._convert(target, self._sources[target], read, [expert])[target]

    def _reading(self, dtype: torch.dtype) -> Read:
        return lambda name, rows: self.checkpoint.read(name, dtype, rows)

    def _convert(self, target: str, source: _Source, read: Read, experts: list[int] | None) -> dict[str, torch.Tensor]:
        if source.converter is None:
            (names,) = source.names.values()
            return {target: read(names[-1], experts)}
        converter: Any = copy.deepcopy(source.converter)
        for pattern, names in source.names.items():
            rows: list[int] | None = None
            if experts is not None:
                if "*" in pattern:
                    names = [names[expert] for expert in experts]
                else:
                    rows = experts
            for name in names:
                converter.add_tensor(target, name, pattern, read(name, rows))
        converted = converter.convert(target, model=self.skeleton.model, config=self.checkpoint.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def _tied_targets(model: Any) -> set[str]:
    """Parameters that ``tie_weights`` fills from another."""
    if not getattr(model.config.get_text_config(decoder=True), "tie_word_embeddings", False):
        return set()
    keys = model._tied_weights_keys or {}
    return set(keys) if isinstance(keys, (dict, list, tuple, set)) else set()
