"""The router's own gRPC server over a router in this process."""

from __future__ import annotations

import asyncio
import threading

from cluster.api.frontend import Frontend
from cluster.api.router import Router
from cluster.api.server import ClientServer, Health
from cluster.settings import SecurityConfig

SOON = 30.0


class Door:
    """A front door on its own event loop, in a thread."""

    def __init__(self, security: SecurityConfig | None = None) -> None:
        self._security = security
        self.frontend, self.health = Frontend(), Health()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.server, self.port = asyncio.run_coroutine_threadsafe(self._start(), self.loop).result(SOON)
        self.address = f"127.0.0.1:{self.port}"

    async def _start(self) -> tuple[ClientServer, int]:
        await self.health.set(serving=False)
        server = ClientServer(self.frontend, self.health, self._security)
        self.frontend.door = server.status
        return server, await server.start("127.0.0.1:0")

    def open(self, router: Router) -> None:
        self.frontend.ready(router.served)
        asyncio.run_coroutine_threadsafe(self.health.set(serving=True), self.loop).result(SOON)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.server.stop(0), self.loop).result(SOON)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(SOON)
