"""One router put together: trunk, dispatcher, engine, and what the front door needs to know. A plain class."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from cluster.api.convert import ModelLimits
from cluster.api.frontend import Served
from cluster.api.gauges import router_gauges
from cluster.config import Config
from cluster.core import Deadline, GroupInfo, Membership, Priority
from cluster.engine.blocks import num_blocks_of
from cluster.engine.engine import Engine
from cluster.engine.text import load_tokenizer
from cluster.engine.warm import warm_up
from cluster.errors import CheckpointError
from cluster.experts.group import visible_devices
from cluster.kernels.team import release_team
from cluster.model.kv import KvStore
from cluster.model.packed import Chunk
from cluster.model.trunk import Prewarm, Trunk
from cluster.placement.binding import Binding, Where, numa_attributes
from cluster.routing.caller import Caller
from cluster.routing.coldness import Coldness
from cluster.routing.connect import Connector
from cluster.routing.dispatcher import Dispatcher
from cluster.routing.fabric import Fabric
from cluster.routing.loads import ExpertLoads
from cluster.routing.prediction import chances
from cluster.routing.report import RouterReport
from cluster.routing.step import StepContext
from cluster.rpc.v1 import control_pb2, inference_pb2, links_pb2
from cluster.telemetry.hub import telemetry_of
from cluster.telemetry.memory import process_facts
from cluster.telemetry.records import PhaseRecord
from cluster.transport.base import Transport
from cluster.transport.link import LinkStatus
from cluster.weights.checkpoint import Checkpoint
from cluster.weights.dtypes import DTYPE_NAMES, pick_device, resolve_dtype
from cluster.weights.effort import history_tokens
from cluster.weights.skeleton import Skeleton

log = logging.getLogger(__name__)

_FIRST_TOKENS = 8
NO_LINK = LinkStatus(kind="", healthy=False, why="no link yet", wanted="")


class Router:
    """Holds the trunk and runs the engine. The constructor returns after synthetic requests went the whole way.

    ``fetch`` gives the coordinator's membership. ``local_links`` replaces network links where groups live in this
    process. ``binding`` says where this process sits, if anybody placed it.

    Raises (constructor):
        ExpertMeshError: the model cannot be served, or a group cannot be reached.
    """

    def __init__(
        self,
        config: Config,
        fetch: Callable[[], Membership],
        threads: int,
        local_links: Callable[[GroupInfo, Deadline], Transport] | None = None,
        binding: Binding | None = None,
    ) -> None:
        self._config, self._binding = config, binding
        started = PhaseRecord("moe.startup", time.monotonic())
        self._checkpoint = checkpoint = Checkpoint(config.model)
        self._device = device = pick_device(config.device)
        dtype = resolve_dtype(config.dtype, checkpoint.dtype, device.type == "cuda")
        self._dtype = DTYPE_NAMES[dtype]
        self._exact = config.expert_dtype in ("auto", self._dtype)
        self.telemetry = telemetry_of(
            config.telemetry,
            "expertmesh-router",
            {"moe.device": str(device), **numa_attributes(binding)},
            checkpoint.path.name,
            serve_metrics=True,
        )
        torch.set_num_threads(threads)
        self._coldness = coldness = Coldness(self._first_layer)
        self.loads = ExpertLoads()
        self.fabric = Fabric(
            fetch, local_links or self._connector(), follower=lambda now: coldness.follow(now.groups.values())
        )
        data_plane = config.data_plane
        self._caller = Caller(
            self.fabric,
            data_plane.call_timeout_s,
            data_plane.group_wait_s,
            policy=data_plane.missing_experts,
            fail_over=data_plane.fail_over,
        )
        dispatcher = Dispatcher(
            self.fabric,
            dtype,
            self._caller,
            count=self._called,
        )
        self._trunk, skeleton = Trunk.load(checkpoint, dtype, device, dispatcher)
        engine_config = config.engine.sized(device.type != "cpu", history_tokens(skeleton))
        tokenizer = load_tokenizer(checkpoint.path)
        started.done("weights", time.monotonic())
        self.fabric.start(config.start_timeout_s)
        started.done("links", time.monotonic())
        kv_bytes_per_token = self._first_step()
        self._prewarm = Prewarm(self.fabric.depth, dispatcher.prewarm)
        self.predict(config.predict_experts)
        started.done("first_step", time.monotonic())
        if config.warm_up:
            warm_up(self._trunk, tokenizer, engine_config, skeleton.context_length, kv_bytes_per_token, threads)
            started.done("warm_up", time.monotonic())
        # No more than loading has cost anyway: a small model is there at once.
        touched = checkpoint.num_elements * dtype.itemsize if config.warm_up else 0
        blocks = num_blocks_of(config.engine, kv_bytes_per_token)
        self._trunk.store = self._trunk.store.followed_by(blocks, config.engine.block_size, touched)
        started.done("kv_cache", time.monotonic())
        self.loads = ExpertLoads()  # what clients ask for, and nothing of the warm-up
        self.engine = Engine(
            self._trunk.forward,
            tokenizer,
            engine_config,
            kv_bytes_per_token,
            threads,
            observer=self.telemetry,
            detail_steps=config.telemetry.detail_steps,
            colds=coldness,
        )
        info = self._model_info(skeleton, has_tokenizer=tokenizer is not None)
        limits = ModelLimits(
            vocab_size=info.vocab_size,
            context_length=skeleton.context_length,
            context_why=skeleton.context_why,
            end_ids=frozenset(info.end_ids),
            default_max_new_tokens=min(config.engine.default_max_new_tokens, skeleton.context_length),
            max_deadline_s=config.engine.max_deadline_s,
            verify=config.verify,
            exact=self._exact,
        )
        keep_text = config.telemetry.log_prompts
        self.served = Served(
            self.engine,
            tokenizer,
            limits,
            info,
            self.status,
            self.telemetry,
            keep_text,
            self._expert_loads,
            set_fail_over=self._set_fail_over,
        )
        if binding is not None:
            binding.check()
        release_team()  # from now on the engine's thread computes
        if self.telemetry is not None:
            self.telemetry.gauges(router_gauges(self.fabric, self.engine, binding))
            self.telemetry.phases(started)
        self._startup = started.seconds()

    def _first_layer(self, ids: Sequence[int]) -> bytes | None:
        """What the first MoE layer's gate says of some tokens: `Coldness` asks."""
        choice = self._trunk.first_choice(ids)
        return None if choice is None else chances(*choice, self.fabric.num_experts(0))

    def _called(self, layer: int, experts_P: Any, num_tokens: int, priority: Priority) -> None:
        """Every layer call, as the dispatcher makes it."""
        self._coldness.called(layer, experts_P, num_tokens)
        self.loads.called(layer, experts_P, self.fabric.num_experts(layer), priority)

    def predict(self, on: bool) -> None:
        """Whether groups with a budget are told what they will probably be called for. Not while a step runs."""
        self._trunk.follow(self._prewarm if on else None)

    def _set_fail_over(self, on: bool) -> bool:
        was_on, self._caller.fail_over = self._caller.fail_over, on
        return was_on

    def _connector(self) -> Connector:
        data_plane, kinds = self._config.data_plane, self._config.transports()
        hello = links_pb2.Hello(
            fingerprint=self._checkpoint.fingerprint,
            dtype=self._dtype,
            secret=data_plane.secret,
            router=f"router-{os.getpid()}",
        )
        return Connector(
            hello,
            lambda group: kinds[group % len(kinds)],
            self._device,
            data_plane.payload_timeout_s,
            self._config.security,
        )

    def _first_step(self) -> int:
        """A step over every link, in which the gates are found; returns key-value bytes a token."""
        self._trunk.store = KvStore(1, _FIRST_TOKENS)
        if self._config.warm_up:
            self._trunk.learn_gates([Chunk(range(_FIRST_TOKENS), 0, [0])], StepContext(0))
        else:
            self._trunk.without_experts([Chunk([0], 0, [0])], StepContext(0))
        return self._trunk.store.bytes_per_token

    def _model_info(self, skeleton: Skeleton, has_tokenizer: bool) -> inference_pb2.ModelInfoReply:
        checkpoint = self._checkpoint
        return inference_pb2.ModelInfoReply(
            arch=checkpoint.arch,
            name=checkpoint.path.name,
            fingerprint=checkpoint.fingerprint,
            dtype=self._dtype,
            vocab_size=int(checkpoint.config.get_text_config(decoder=True).vocab_size),
            context_length=skeleton.context_length,
            num_moe_layers=len(skeleton.moe_layers),
            num_experts=skeleton.num_experts,
            experts_per_token=skeleton.experts_per_token,
            num_groups=len(self.fabric.membership.groups),
            has_tokenizer=has_tokenizer,
            end_ids=sorted(end_ids(checkpoint)),
        )

    def status(self) -> control_pb2.StatusReply:
        """Everything but the state, which the front door knows."""
        membership, links = self.fabric.membership, self.fabric.link_states()
        stats, facts = self.engine.stats(), process_facts()
        reply = control_pb2.StatusReply(
            arch=self._checkpoint.arch,
            model=self._checkpoint.path.name,
            dtype=self._dtype,
            table_epoch=membership.table.epoch,
            table_version=membership.table.version,
            uncovered_experts=[f"{e.layer}/{e.expert}" for e in membership.table.uncovered()],
            trunk_bytes=self._trunk.num_bytes,
            expert_dtype="" if self._exact else self._config.expert_dtype,
        )
        for group, info in sorted(membership.groups.items()):
            reply.groups.append(_group_status(info, *links.get(group, (NO_LINK, 0))))
        where = self._binding.where() if self._binding is not None else Where()
        reply.router.CopyFrom(
            control_pb2.ProcessStatus(
                numa_node=where.node,
                numa_local_ratio=where.local_ratio,
                pid=facts.pid,
                host=facts.host,
                device=str(self._device),
                visible_devices=visible_devices(),
                rss_bytes=facts.rss_bytes,
                anonymous_bytes=facts.anonymous_bytes,
                startup=_phases(self._startup),
            )
        )
        reply.engine.CopyFrom(
            control_pb2.EngineStatus(
                running=stats.running,
                waiting=stats.waiting,
                steps=stats.steps,
                max_batch=stats.max_batch,
                finished=stats.finished,
                cancelled=stats.cancelled,
                failed=stats.failed,
                max_steps_after_cancel=stats.max_steps_after_cancel,
                kv_used_bytes=stats.kv_used_bytes,
                kv_limit_bytes=self._config.engine.kv_cache_bytes,
                progress_age_s=self.engine.progress_age_s(),
                kv_cached_bytes=stats.kv_cached_bytes,
                kv_blocks=stats.kv_blocks,
                kv_blocks_used=stats.kv_blocks_used,
                kv_blocks_free=stats.kv_blocks_free,
                preemptions=stats.preemptions,
                prompt_tokens=stats.prompt_tokens,
                prefix_hit_tokens=stats.prefix_hit_tokens,
            )
        )
        caller = self._caller
        reply.dispatch.CopyFrom(
            control_pb2.DispatchStatus(
                calls=caller.speeds.calls,
                resent=caller.resent_calls,
                hedged=caller.speeds.hedges,
                hedges_won=caller.hedges_won,
                suspects=self.fabric.suspects(),
                fail_over=caller.fail_over,
            )
        )
        reply.loops.add(name="fabric", progress_age_s=self.fabric.progress_age_s())
        reply.loops.add(name="coordinator", progress_age_s=membership.progress_age_s)
        reply.loops.add(name="engine", progress_age_s=self.engine.progress_age_s())
        for group, (link, _) in sorted(links.items()):
            reply.loops.add(name=f"link-{group}", progress_age_s=link.progress_age_s)
        if self.telemetry is not None:
            for name, age_s in self.telemetry.progress_ages_s().items():
                reply.loops.add(name=name, progress_age_s=age_s)
            counts = self.telemetry.counts()
            reply.telemetry.CopyFrom(
                control_pb2.TelemetryStatus(
                    traces=self.telemetry.kinds,
                    tracing=self.telemetry.tracing,
                    metrics_address=self.telemetry.metrics_address,
                    spans_created=counts["created"],
                    spans_exported=counts["exported"],
                    spans_dropped=counts["dropped"] + sum(info.spans_dropped for info in membership.groups.values()),
                    spans_waiting=counts["waiting"],
                )
            )
        return reply

    def report(self, name: str, with_loads: bool) -> RouterReport:
        """What the coordinator is told each time that it is asked for the table."""
        table, facts = self.fabric.membership.table, process_facts()
        layers = len(table.owners)
        most = max((len(experts) for experts in table.owners), default=0)
        activations_LE, prefill_LE = self.loads.arrays(layers, most) if with_loads else (None, None)
        return RouterReport(
            router=name,
            table=table.order,
            host=facts.host,
            pid=facts.pid,
            live=self.engine.num_live(),
            stepping_s=sum(self.engine.spent().values()),
            activations_LE=activations_LE,
            prefill_LE=prefill_LE,
            gaps=self.engine.gaps.counts(),
        )

    def _expert_loads(self) -> control_pb2.LoadsReply:
        infos = self.fabric.membership.groups.values()
        sizes = [max(each) for each in zip(*(info.expert_sizes for info in infos), strict=True)]
        return control_pb2.LoadsReply(
            layers=[control_pb2.LayerLoads(**layer) for layer in self.loads.sums()], expert_bytes=sizes
        )

    def close(self) -> None:
        """Ends the engine, all links and the telemetry."""
        self.engine.close()
        self.fabric.close()
        if self.telemetry is not None:
            self.telemetry.close()


def _group_status(info: GroupInfo, link: LinkStatus, reconnects: int) -> control_pb2.GroupStatus:
    status = control_pb2.GroupStatus(
        group=info.group,
        healthy=link.healthy,
        address=info.address,
        transport=link.kind,
        link=control_pb2.LinkReport(
            wanted=link.wanted,
            why=link.why,
            fallbacks=link.fallbacks,
            returns=link.returns,
            reconnects=reconnects,
            last_failure=link.failure,
            last_failure_age_s=link.failure_age_s,
        ),
        expert_bytes=info.expert_bytes,
        calls=info.calls,
        incarnation=info.incarnation,
        progress_age_s=info.progress_age_s,
        process=control_pb2.ProcessStatus(
            numa_node=info.numa_node,
            numa_local_ratio=info.numa_local_ratio,
            pid=info.pid,
            host=info.host,
            device=info.device,
            visible_devices=info.visible_devices,
            rss_bytes=info.rss_bytes,
            anonymous_bytes=info.anonymous_bytes,
            startup=_phases(info.startup),
        ),
        refused_links=info.refused_links,
    )
    if info.store is not None:
        told = dataclasses.asdict(info.store)
        told["resident_by_layer"] = [len(experts) for experts in told.pop("resident_experts")]
        status.store.CopyFrom(control_pb2.ExpertStoreStatus(**told))
    for experts in info.holdings:
        status.holdings.add(experts=experts)
    return status


def _phases(startup: Sequence[tuple[str, float]]) -> list[control_pb2.StartPhase]:
    return [control_pb2.StartPhase(name=name, seconds=seconds) for name, seconds in startup]


def end_ids(checkpoint: Checkpoint) -> set[int]:
    """End ids of generation_config.json, or of config.json where there is none."""
    file = checkpoint.path / "generation_config.json"
    if file.exists():
        try:
            found = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
            return _ids(found) if found is not None else end_ids_of_config(checkpoint)
        except (OSError, ValueError, TypeError, AttributeError) as exc:
            raise CheckpointError(f"--model: {str(file)!r} cannot be read: {exc}") from exc
    return end_ids_of_config(checkpoint)


def end_ids_of_config(checkpoint: Checkpoint) -> set[int]:
    """End ids of config.json."""
    found = getattr(checkpoint.config.get_text_config(decoder=True), "eos_token_id", None)
    return _ids(found) if found is not None else set()


def _ids(found: object) -> set[int]:
    return {int(i) for i in found} if isinstance(found, list) else {int(found)}  # type: ignore[call-overload]
