"""A server under way: the worker, uvicorn, and how both end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator, Sequence

import uvicorn
from jax.sharding import Mesh

from luthier.commands.server import app
from luthier.commands.server.job import Served
from luthier.commands.server.worker import Worker
from luthier.rollout.engine import SteppedEngine

SLACK = 5
"""Seconds, after what runs was told to end, in which connections close and the engine finishes its step."""


class _Uvicorn(uvicorn.Server):
    """uvicorn with its hands off the signals, which are the command's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Running:
    """A server at ``listener``, a socket that is listened on. Made and used within a running event loop.

    ``patience`` is how many seconds completions have to finish in once ``stop`` was called.
    """

    def __init__(
        self,
        served: Served,
        engine: SteppedEngine,
        mesh: Mesh,
        listener: socket.socket,
        *,
        max_queue: int,
        api_key: str | None = None,
        hosts: Sequence[str] = ("localhost", "127.0.0.1", "[::1]"),
        patience: float = 10,
    ):
        self.worker = Worker(engine, mesh, max_queue, self.stop)
        self._listener = listener
        self._patience = patience
        self._server = _Uvicorn(
            uvicorn.Config(
                app.make(served, self.worker, api_key, hosts),
                http="h11",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=int(patience + SLACK),
            )
        )

    async def serve(self) -> None:
        """Answer requests until ``stop`` is called. Raises what the engine raised if that ends it."""
        try:
            await self._server.serve([self._listener])
        finally:
            await self.worker.stop(SLACK)
        if self.worker.failure:
            raise self.worker.failure

    def stop(self) -> None:
        """Take nothing new, let what runs finish, and cancel it when patience ends; at once if called again."""
        if self.worker.draining:
            self.worker.abandon()
        else:
            self.worker.draining = True
            self._server.should_exit = True
            asyncio.get_running_loop().call_later(self._patience, self.worker.abandon)
