"""A checkpoint directory in the Hugging Face layout: config and safetensors, read tensor by tensor or by slices.

DeepSeek's block-scaled fp8 (``weight`` in float8_e4m3fn with ``weight_scale_inv``, one fp32 scale a 128 x 128 block)
is dequantised on reading; no other quantisation is. Nothing is unpickled, no code of a checkpoint is run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

from cluster.errors import CheckpointError, UnsupportedModel

SCALE_SUFFIX = "_scale_inv"
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor is, and its shape. ``dtype`` is safetensors' name of it, such as ``BF16``."""

    file: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class Checkpoint:
    """Read access to one checkpoint directory.

    Opening reads the config and the headers of all files, and no weights.

    Raises:
        CheckpointError: no such directory, no or unreadable config.json, a missing, truncated or foreign shard.
        UnsupportedModel: a quantisation that is not dequantised here.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"--model: {str(path)!r} is no directory; expected a checkpoint with config.json")
        self.config_dict = self._read_json("config.json")
        self.fp8_block = self._fp8_block()
        self.config = self._load_config()
        self._handles: dict[str, Any] = {}
        self._views: dict[str, torch.Tensor] = {}
        self.tensors = self._index()

    @property
    def num_elements(self) -> int:
        """Of all weights."""
        return sum(tensor.num_elements for tensor in self.tensors.values())

    # -- opening -------------------------------------------------------------------------------------------------

    def _read_json(self, name: str) -> dict[str, Any]:
        file = self.path / name
        try:
            loaded = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError as exc:
            raise CheckpointError(f"--model: {str(self.path)!r} is no checkpoint: it has no {name}") from exc
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as exc:
            raise CheckpointError(f"--model: {str(file)!r} cannot be read: {exc}") from exc
        if not isinstance(loaded, dict):
            raise CheckpointError(f"--model: {str(file)!r} must hold an object, got {type(loaded).__name__}")
        return loaded

    def _fp8_block(self) -> tuple[int, int] | None:
        quantization = self.config_dict.get("quantization_config")
        if not quantization:
            return None
        fields = quantization if isinstance(quantization, dict) else {}
        method, block = fields.get("quant_method", "unknown"), fields.get("weight_block_size")
        good = isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
        if method == "fp8" and block is not None and good:
            return block[0], block[1]
        raise UnsupportedModel(
            f"--model: {str(self.path)!r} is quantised with {method!r}; only DeepSeek's block-scaled fp8 "
            "(quant_method fp8 with weight_block_size) is read: dequantise the checkpoint first"
        )

    def _load_config(self) -> PretrainedConfig:
        if "model_type" not in self.config_dict:
            raise CheckpointError(f"--model: {str(self.path / 'config.json')!r} has no model_type")
        try:
            config = AutoConfig.from_pretrained(self.path, local_files_only=True, trust_remote_code=False)
        except Exception as exc:
            reason = " ".join(str(exc).split())[:200]
            raise UnsupportedModel(
                f"--model: transformers cannot read the config of model_type {self.arch!r}: {reason}"
            ) from exc
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # weights are dequantised by this reader
        known_config: PretrainedConfig = config
        return known_config

    def _index(self) -> dict[str, TensorEntry]:
        index_file = self.path / "model.safetensors.index.json"
        if index_file.exists():
            weight_map = self._read_json(index_file.name).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"--model: {str(index_file)!r} has no weight_map")
            if not all(isinstance(file, str) for file in weight_map.values()):
                raise CheckpointError(f"--model: {str(index_file)!r} names files that are no text")
            files = sorted(set(weight_map.values()))
        elif (self.path / "model.safetensors").exists():
            weight_map, files = None, ["model.safetensors"]
        else:
            other = [p.name for p in self.path.glob("*.bin")]
            hint = "; pickled weights (*.bin) are never loaded: convert them to safetensors" if other else ""
            raise CheckpointError(f"--model: {str(self.path)!r} has no model.safetensors{hint}")
        tensors: dict[str, TensorEntry] = {}
        for file in files:
            if Path(file).name != file:
                raise CheckpointError(f"--model: index names {file!r}, which is outside the checkpoint directory")
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                view = handle.get_slice(name)
                tensors[name] = TensorEntry(file, tuple(view.get_shape()), view.get_dtype())
        for name, file in (weight_map or {}).items():
            if name not in tensors or tensors[name].file != file:
                raise CheckpointError(f"--model: the index says that {file!r} holds {name!r}, and it does not")
        return tensors

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            path = self.path / file
            if not path.is_file():
                raise CheckpointError(f"--model: shard {file!r} of {str(self.path)!r} is missing")
            try:
                self._handles[file] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as exc:
                raise CheckpointError(
                    f"--model: shard {file!r} of {str(self.path)!r} ({path.stat().st_size} bytes) is damaged or "
                    f"truncated: {' '.join(str(exc).split())[:160]}"
                ) from exc
        return self._handles[file]

    # -- facts ---------------------------------------------------------------------------------------------------

    @property
    def arch(self) -> str:
        """``model_type`` of the config."""
        return str(self.config_dict["model_type"])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the config names; fp32 where it names none."""
        dtype = getattr(self.config, "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    @cached_property
    def fingerprint(self) -> str:
        """Hash of config and tensor index: the same for the two ends of a link that serve the same checkpoint."""
        digest = hashlib.sha256(json.dumps(self.config_dict, sort_keys=True).encode())
        for name in sorted(self.tensors):
            entry = self.tensors[name]
            digest.update(f"{name}:{entry.dtype}:{entry.shape}\n".encode())
        return digest.hexdigest()[:32]

    def weight_names(self) -> list[str]:
        """Names of all tensors that are no scale of another."""
        if self.fp8_block is None:
            return list(self.tensors)
        return [
            n for n in self.tensors if not (n.endswith(SCALE_SUFFIX) and n.removesuffix(SCALE_SUFFIX) in self.tensors)
        ]

    def stored_bytes(self, name: str) -> int:
        """Bytes that the tensor takes on disk."""
        entry = self.tensors[name]
        return entry.num_elements * _SIZES.get(entry.dtype, 4)

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, name: str, dtype: torch.dtype | None, rows: Sequence[int] | None = None) -> torch.Tensor:
        """A copy of the tensor, dequantised, as ``dtype`` (None keeps the stored one).

        ``rows`` picks indices of the first dimension, in that order; only their bytes are read.
        """
        entry = self.tensors[name]
        scale_name = name + SCALE_SUFFIX
        scaled = entry.dtype.startswith("F8") and scale_name in self.tensors
        if entry.dtype.startswith("F8") and not scaled:
            raise CheckpointError(f"--model: {name!r} is fp8 and has no scales ({scale_name!r})")
        if scaled and rows is not None and len(entry.shape) < 3:
            raise CheckpointError(f"--model: rows of the block-scaled matrix {name!r} cannot be read alone")
        tensor = self._raw(name, rows)
        if scaled:
            assert self.fp8_block is not None
            tensor = dequantize_blocks(tensor, self._raw(scale_name, rows), self.fp8_block)
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        return tensor

    def view(self, name: str, rows: Sequence[int] | None = None) -> torch.Tensor | None:
        """The stored values where the file is mapped; None where they must be dequantised or picked.

        Reading it faults pages in from the disk where the system has not got them.
        """
        entry = self.tensors[name]
        if entry.dtype.startswith("F8") or (rows is not None and len(rows) != 1):
            return None
        tensor = self._views.get(name)
        if tensor is None:
            tensor = self._views[name] = self._open(entry.file).get_tensor(name)
        return tensor if rows is None else tensor[rows[0]]

    def _raw(self, name: str, rows: Sequence[int] | None) -> torch.Tensor:
        """An own copy of the stored bytes: a view of the mapped file would fault in pages during the first request."""
        handle = self._open(self.tensors[name].file)
        if rows is None:
            tensor: torch.Tensor = handle.get_tensor(name).clone()
            return tensor
        view = handle.get_slice(name)
        first = rows[0]
        if list(rows) == list(range(first, first + len(rows))):
            picked: torch.Tensor = view[first : first + len(rows)].clone()
            return picked
        return torch.cat([view[row : row + 1] for row in rows])


def dequantize_blocks(weight: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """``weight`` [..., R, C] fp8 times ``scale`` [..., ceil(R / block[0]), ceil(C / block[1])] fp32, as fp32.

    The format is that of DeepSeek-V3's published weights (technical report, arXiv 2412.19437, section 3.3).
    """
    rows, columns = weight.shape[-2:]
    full = scale.float().repeat_interleave(block[0], dim=-2)[..., :rows, :]
    full = full.repeat_interleave(block[1], dim=-1)[..., :columns]
    return weight.float() * full
