"""The trunk of one model, ready to step: everything but routed experts, which are asked for through a dispatcher."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from cluster.core import Clock
from cluster.errors import InternalError
from cluster.kernels.linear import SMALL_BYTES, KernelTable
from cluster.model.ahead import AheadOfTime, shared_experts_of
from cluster.model.faster import speed_up, speed_up_norms
from cluster.model.gates import Choice, Gates
from cluster.model.hook import NAME, attach, check_attention, register
from cluster.model.kv import KvStore
from cluster.model.layers import Steps, speed_up_layers
from cluster.model.packed import Chunk, Layers, PackedBatch, PackedCache, Step, stepping
from cluster.routing.step import StepContext
from cluster.telemetry.ledger import Stage
from cluster.weights.checkpoint import Checkpoint
from cluster.weights.dtypes import settle
from cluster.weights.mapping import WeightMap
from cluster.weights.skeleton import Skeleton, build_skeleton

Meanwhile = Callable[[], None] | None
Dispatch = Callable[[StepContext, int, torch.Tensor, torch.Tensor, torch.Tensor, Meanwhile], torch.Tensor]
"""(step, MoE layer, hidden [T, H], expert index [T, K], gate weight [T, K], the router's own work while the experts are
on their way) -> fp32 [T, H]."""


@dataclass(frozen=True, slots=True)
class Prewarm:
    """``depth()``: how many layers ahead somebody wants to be told, 0 for not at all; ``order(step, layer, ...)`` tells
    them what a `Choice` says."""

    depth: Callable[[], int]
    order: Callable[[StepContext, int, torch.Tensor, int], None]


class Trunk:
    """transformers' own model with the trunk's weights and a dispatcher in place of the experts.

    Used by one thread at a time.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        tensors: dict[str, torch.Tensor],
        dispatch: Dispatch,
        device: torch.device,
        clock: Clock = time.monotonic,
    ) -> None:
        self.model, self.device, self._dispatch, self._clock = skeleton.model, device, dispatch, clock
        self.num_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        _assign(self.model, tensors, device)
        for moe_layer in skeleton.moe_layers:
            shared = shared_experts_of(self.model, moe_layer.module)
            attach(moe_layer.module, self._hook(moe_layer.layer, None if shared is None else AheadOfTime(shared)))
        takes = inspect.signature(self.model.forward).parameters
        self._takes_logits_to_keep = "logits_to_keep" in takes
        self._layers = Layers()
        self.gates = Gates(self.model, skeleton.moe_layers)
        self._prewarm: Prewarm | None = None
        self._seen: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None
        self.together = device.type != "cpu"
        """Sequences with one token each have their attention computed in one call (see `cluster.model.together`)."""
        self.store = KvStore(1, 1)
        """Where keys and values go; to be replaced before the first step."""
        self._looked: Steps | None = None
        self._step: StepContext | None = None
        self._mark_s = 0.0

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, dispatch: Dispatch
    ) -> tuple[Trunk, Skeleton]:
        """Builds the model on the meta device and reads the trunk's tensors, and no expert's.

        Raises:
            CheckpointError: tensors are missing or have other shapes than the config says.
            UnsupportedModel: the model cannot be served exactly.
        """
        register()
        skeleton = build_skeleton(checkpoint, dtype, attention=NAME, experts=NAME)
        check_attention(skeleton.model)
        tensors = WeightMap(checkpoint, skeleton).read_trunk(dtype)
        trunk = cls(skeleton, tensors, dispatch, device)
        if device.type == "cpu" and dtype is torch.float32 and trunk.num_bytes > SMALL_BYTES:
            speed_up(trunk.model, KernelTable.measure())
            trunk._looked = speed_up_layers(trunk.model)
        elif device.type != "cpu":
            speed_up_norms(trunk.model)
            # cuDNN's makes a plan for each new length, which takes it half a second and longer (H100, torch 2.11).
            torch.backends.cuda.enable_cudnn_sdp(False)
        return trunk, skeleton

    def _hook(
        self, layer: int, ahead: AheadOfTime | None
    ) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
        def call(hidden_TH: torch.Tensor, index_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
            step = self._step
            if step is None:
                raise InternalError("experts were called outside a step")
            if self._seen is not None:
                self._seen(layer, hidden_TH, index_TK)
            if self._prewarm is not None:
                self._look_ahead(step, layer, hidden_TH)
            settle(self.device)  # the dispatcher reads the gate's choice first thing and would wait for it all the same
            step.ledger.add(Stage.TRUNK, self._clock() - self._mark_s)
            meanwhile = None if ahead is None else partial(ahead.run, hidden_TH)
            output_TH = self._dispatch(step, layer, hidden_TH, index_TK, weight_TK, meanwhile)
            self._mark_s = self._clock()
            return output_TH.to(hidden_TH.dtype)

        return call

    def _look_ahead(self, step: StepContext, layer: int, hidden_TH: torch.Tensor) -> None:
        """Orders the next layers' experts. It is done before the call, with which the orders travel."""
        assert self._prewarm is not None
        residual = self.gates.take_residual()
        for ahead in range(layer + 1, layer + 1 + self._prewarm.depth()):
            if residual is None:
                choice = self.gates.choose(ahead, hidden_TH)
            else:
                choice = self.gates.foresee(ahead, residual)
            if choice is not None:
                self._prewarm.order(step, ahead, *choice)

    def _begin(self, hidden: torch.Tensor) -> None:
        """Orders the first MoE layer's experts as a step begins, from the tokens' embeddings."""
        if self._step is not None and self._prewarm is not None and self._prewarm.depth():
            choice = self.gates.foresee(0, hidden)
            if choice is not None:
                self._prewarm.order(self._step, 0, *choice)

    @torch.inference_mode()
    def first_choice(self, ids: Sequence[int]) -> Choice | None:
        """What some tokens of a prompt would choose in the first MoE layer if nothing lay before it; None where its
        gate is not known."""
        return self.gates.foresee(0, self.model.get_input_embeddings()(torch.tensor(ids, device=self.device)))

    @property
    def vocab_size(self) -> int:
        """Tokens that have an embedding."""
        return int(self.model.get_input_embeddings().num_embeddings)

    def follow(self, prewarm: Prewarm | None) -> None:
        """From now on ``prewarm`` is told, as layers are called, of experts that the next layers will probably want;
        None: nobody is. Layers whose gates `learn_gates` did not find are left out. Not while a step runs."""
        self._prewarm = prewarm
        if prewarm is not None:
            self.gates.follow(self._begin)

    def without_experts(self, chunks: Sequence[Chunk], step: StepContext) -> None:
        """One step in which every expert answers nothing and no group is asked."""
        dispatch = self._dispatch
        self._dispatch = lambda _step, _layer, hidden_TH, *_rest: torch.zeros_like(hidden_TH)
        try:
            self.forward(chunks, step)
        finally:
            self._dispatch = dispatch

    def learn_gates(self, chunks: Sequence[Chunk], step: StepContext) -> None:
        """One step in which the gates of all layers are found."""
        with self.gates.watching() as seen:
            self._seen = seen
            try:
                self.forward(chunks, step)
            finally:
                self._seen = None

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk], step: StepContext) -> torch.Tensor:
        """One step: logits fp32 [number of chunks, V] of each chunk's last token, on the CPU.

        The keys and values of the chunks' tokens are in the store afterwards; after an error some may be.

        Raises:
            ExpertMeshError: whatever the dispatcher raised.
        """
        self._step, self._mark_s = step, self._clock()
        batch = PackedBatch(chunks, self.store, self.device, self.together)
        cache = PackedCache(batch, self._layers)
        extra = {"logits_to_keep": batch.last_T} if self._takes_logits_to_keep else {}
        try:
            with stepping(Step(batch, cache)):
                output = self.model(
                    input_ids=batch.ids,
                    position_ids=batch.positions_T[None],
                    past_key_values=cache,
                    use_cache=True,
                    **extra,
                )
            logits = output.logits[0] if extra else output.logits[0, batch.last_T]
            result: torch.Tensor = logits.float().cpu()
            step.ledger.add(Stage.TRUNK, self._clock() - self._mark_s)
        finally:
            self._step = None
            if self._looked is not None:
                self._looked.forget()
        return result


def _assign(model: Any, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    """Puts the tensors in place of meta parameters, moves buffers, and ties weights again."""
    placed = {name: tensor.to(device) for name, tensor in tensors.items()}
    for name, tensor in placed.items():
        _place(model, name, tensor)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[key] = buffer.to(device)
    model.tie_weights()
    tied = model.state_dict()
    for name, tensor in placed.items():
        # A checkpoint that says its head is tied and stores another one means the one that it stores.
        if tied[name].data_ptr() != tensor.data_ptr() and not torch.equal(tied[name], tensor):
            _place(model, name, tensor)
    for config in (model.config, model.config.get_text_config(decoder=True)):
        config.use_cache, config.return_dict = True, True
        for switch in ("output_router_logits", "output_attentions", "output_hidden_states"):
            if getattr(config, switch, False):
                setattr(config, switch, False)


def _place(model: Any, name: str, tensor: torch.Tensor) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    if key in module._parameters:
        module._parameters[key] = torch.nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[key] = tensor
