"""A server in a thread of the tests' process, for a real engine or a made-up one."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai

from luthier.commands.server.running import Running


class Serving:
    """A running server: its address, its parts, and a client for it."""

    def __init__(self, running: Running, loop: asyncio.AbstractEventLoop, port: int):
        self.running, self.loop, self.port = running, loop, port
        self.url = f"http://127.0.0.1:{port}"
        self.failure: BaseException | None = None
        self.ended = threading.Event()

    def client(self, api_key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": api_key, "max_retries": 0} | options)

    def stop(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended by itself
            self.loop.call_soon_threadsafe(self.running.stop)


@contextlib.contextmanager
def serving(served: Any, engine: Any, mesh: Any, **options: Any) -> Iterator[Serving]:
    """Serve as `luthier serve` does, signals apart, and stop at the end."""
    listener = socket.create_server(("127.0.0.1", 0))
    ready: list[Serving] = []
    options = {"max_queue": 64, "patience": 0.2} | options

    async def serve() -> None:
        running = Running(served, engine, mesh, listener, **options)
        ready.append(Serving(running, asyncio.get_running_loop(), listener.getsockname()[1]))
        await running.serve()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as failure:
            ready[0].failure = failure
        finally:
            ready[0].ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: bool(ready))
    try:
        yield ready[0]
    finally:
        ready[0].stop()
        ready[0].stop()
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Wait for a condition, and fail where it does not come true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
