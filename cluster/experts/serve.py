"""An expert group's Serve shell: one deployment with one replica in an application of its own, without a route."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import ray

from cluster.config import Config
from cluster.core import GroupId, GroupInfo
from cluster.errors import Unavailable
from cluster.experts.group import ExpertGroup, own_gpu
from cluster.experts.kept import basis_of, kept_plan
from cluster.placement.binding import Binding
from cluster.placement.planner import Holdings
from cluster.telemetry import logs


class ExpertsShell:
    """Deployment ``group`` of the application ``experts-<i>``. Layer calls do not come through here."""

    def __init__(
        self, group: GroupId, holdings: Holdings, config: Config, threads: int, groups: int = 1, hosts: int = 1
    ) -> None:
        logs.set_up(config.telemetry.log_level, config.telemetry.log_format)
        gpu = own_gpu(config)
        binding = Binding.of_group(config.numa, group, groups, gpu, hosts)
        threads = config.threads or binding.threads(threads)
        host_address = ray.util.get_node_ip_address()
        planned = (kept_plan(len(holdings), basis_of(config)) or {}).get(group, ())
        if any(planned):  # a drained group starts as it would have, and is emptied then: it must be able to come back
            holdings = planned
        self._group = ExpertGroup(group, holdings, config, threads, host_address=host_address, binding=binding)

    def info(self, epoch: int) -> GroupInfo:
        """See `ExpertGroup`; ``epoch`` is the coordinator's that asks."""
        self._group.told_by(epoch)
        return self._group.info()

    async def hold(self, layer: int, experts: Sequence[int], epoch: int) -> int:
        """See `ExpertGroup`. Returns when it is done; `info` answers meanwhile."""
        self._group.told_by(epoch)
        return await asyncio.wrap_future(self._group.hold(layer, experts))

    def drop_links(self) -> None:
        """Closes all links to routers, for drills; they are made again."""
        self._group.drop_links()

    def check_health(self) -> None:
        """Serve restarts a group whose compute thread makes no progress; a slow one that does is left alone."""
        age_s = self._group.stuck_s()
        if age_s > 60:
            raise Unavailable(f"the compute thread made no progress for {age_s:.0f} s")
