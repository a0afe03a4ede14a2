"""What a router is asked for by whoever reads its metrics: groups, balance, engine, loops."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cluster.engine.engine import Engine
from cluster.placement.binding import Binding
from cluster.routing.fabric import Fabric
from cluster.telemetry.metrics import Gauge

Values = list[tuple[Mapping[str, str], float]]


def router_gauges(fabric: Fabric, engine: Engine, binding: Binding | None) -> list[Gauge]:
    """Gauges and counters over a router's state, read when somebody looks."""

    def healthy() -> Values:
        states = fabric.link_states()
        found: Values = []
        for group in fabric.membership.groups:
            up = group in states and states[group][0].healthy
            found.append(({"group": str(group), "transport": states[group][0].kind if up else "none"}, float(up)))
        return found

    def resident() -> Values:
        groups = fabric.membership.groups.values()
        return [
            ({"group": str(info.group)}, float(info.store.resident if info.store else sum(map(len, info.holdings))))
            for info in groups
        ]

    def load_ratio() -> Values:
        tokens = [item.tokens for item in engine.totals().groups()]
        return [({}, max(tokens) * len(tokens) / sum(tokens))] if sum(tokens) else []

    def stages() -> Values:
        return [({"part": name}, seconds) for name, seconds in engine.spent().items()]

    def blocks() -> Values:
        stats = engine.stats()
        cached = stats.kv_blocks - stats.kv_blocks_used - stats.kv_blocks_free
        return [
            ({"state": "used"}, float(stats.kv_blocks_used)),
            ({"state": "cached"}, float(cached)),
            ({"state": "free"}, float(stats.kv_blocks_free)),
        ]

    def sequences() -> Values:
        stats = engine.stats()
        return [({"state": "running"}, float(stats.running)), ({"state": "waiting"}, float(stats.waiting))]

    def ages() -> Values:
        return [
            ({"loop": "engine"}, engine.progress_age_s()),
            ({"loop": "fabric"}, fabric.progress_age_s()),
            ({"loop": "coordinator"}, fabric.membership.progress_age_s),
        ]

    def dropped() -> Values:
        groups = fabric.membership.groups.values()
        return [({"group": str(info.group)}, float(info.spans_dropped)) for info in groups]

    def refused() -> Values:
        groups = fabric.membership.groups.values()
        return [({"group": str(info.group)}, float(info.refused_links)) for info in groups]

    def local_memory() -> Values:
        own = binding.where().local_ratio if binding is not None else None
        groups = fabric.membership.groups.values()
        ratios = [("router", own), *((f"group-{info.group}", info.numa_local_ratio) for info in groups)]
        return [({"process": name}, ratio) for name, ratio in ratios if ratio is not None]

    def stores(name: str) -> Callable[[], Values]:
        """One number of every store, or one for each of its layers."""

        def read() -> Values:
            found: Values = []
            for info in fabric.membership.groups.values():
                told = getattr(info.store, name) if info.store is not None else ()
                if isinstance(told, tuple):
                    found += [
                        ({"group": str(info.group), "layer": str(layer)}, float(n)) for layer, n in enumerate(told)
                    ]
                else:
                    found.append(({"group": str(info.group)}, float(told)))
            return found

        return read

    return [
        Gauge("moe.expert.cold_stalls", "{call}", "Calls that waited for experts.", stores("stalls"), counts=True),
        Gauge("moe.expert.loads", "{expert}", "Experts loaded, ahead or on demand.", stores("loads"), counts=True),
        Gauge("moe.expert.load.time", "s", "Seconds of loads.", stores("loads_s"), counts=True),
        Gauge("moe.prewarm.hits", "{expert}", "Loaded ahead and in time for a call.", stores("hits"), counts=True),
        Gauge("moe.prewarm.late", "{expert}", "Ordered ahead and not in time.", stores("late"), counts=True),
        Gauge("moe.prewarm.wasted", "By", "Loaded ahead for nothing.", stores("wasted_bytes"), counts=True),
        Gauge("moe.group.spans_dropped", "{span}", "Spans that a group lost.", dropped, counts=True),
        Gauge("moe.group.refused_links", "{link}", "Handshakes that a group did not accept.", refused, counts=True),
        Gauge("moe.numa.local_ratio", "", "Share of memory on the node where it belongs.", local_memory),
        Gauge("moe.group.healthy", "", "A link to the group is up.", healthy),
        Gauge("moe.expert.resident", "{expert}", "Experts that the group holds in memory.", resident),
        Gauge("moe.expert.load_ratio", "", "Tokens of the busiest group over the mean of all.", load_ratio),
        Gauge("moe.step.time", "s", "Seconds of all steps, by part.", stages, counts=True),
        Gauge("moe.steps", "{step}", "Steps.", lambda: [({}, float(engine.stats().steps))], counts=True),
        Gauge("moe.kv.blocks", "{block}", "Blocks of the key-value cache.", blocks),
        Gauge("moe.sequences", "{sequence}", "Requests in the batch, and waiting for a place.", sequences),
        Gauge("moe.preemptions", "{sequence}", "Lost places.", lambda: [({}, float(engine.stats().preemptions))], True),
        Gauge("moe.loop.last_progress.age", "s", "Since a background loop's last progress.", ages),
    ]
