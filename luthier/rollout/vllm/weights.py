"""New weights into vLLM servers while a trainer holds them: one stream of tensors, many readers, proof of arrival.

Left out on purpose: which tensors there are (``named``, ``adapters``), and the words of the stream (``stream``).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from luthier.rollout.vllm import stream
from luthier.rollout.vllm.client import Client, Failure, Kind, Pause

Call = Callable[[Coroutine[Any, Any, Any]], Any]
"""Runs a coroutine on the clients' event loop, from another thread, and returns its result."""
_HERE = stream.new_token()[:8]


class Transfer:
    """One sync of several servers: ``with Transfer(clients, call, version) as to``, and ``to.put`` for each tensor.

    Entering pauses the servers and has their workers connect; ``put`` sends a tensor to all; leaving waits until they
    are loaded, checks them, names the weights ``version`` and lets the servers go on. A server that fails is left
    paused, gets no more and is named in ``failed``; the caller goes on all the same, since the next tensor may be a
    collective of several processes. Leaving by an exception is a short stream: no server is usable then.

    ``failed`` is {server: what happened}, ``seconds`` how long it took, ``bytes`` what one server was sent.
    """

    def __init__(
        self,
        clients: Sequence[Client],
        call: Call,
        version: int,
        *,
        pause_mode: Pause = "keep",
        timeout: float = 600.0,
        adapter: str = "",
    ) -> None:
        """Take the servers. ``timeout`` is the seconds that a server may take over any one tensor, and over the end.

        With ``adapter`` what is put are the files of an adapter of that name: see ``send_adapter``.
        """
        self.failed: dict[Client, Failure] = {}
        self.seconds, self.bytes = 0.0, 0
        self._clients, self._call, self._version = tuple(clients), call, version
        self._pause_mode: Pause = pause_mode
        self._timeout, self._adapter = timeout, adapter
        self._names: list[str] = []
        self._parts = 0
        self._workers: dict[stream.Worker, Client] = {}
        self._running: dict[Client, asyncio.Task[Any]] = {}

    def __enter__(self) -> Transfer:
        """Pause the servers and wait for their workers."""
        self._begun = time.monotonic()
        self._token = stream.new_token()
        self._listening, self._slots = stream.Listening(), stream.Slots(self._token)
        try:
            expected: Counter[Client] = self._call(self._pause())
            orders = {client: order for client in self._well if (order := self._order(client)) is not None}
            self._call(self._start(orders))
            self._meet(expected)
        except BaseException:
            self._close()
            raise
        return self

    def put(self, name: str, array: np.ndarray) -> None:
        """Send one tensor, fp32 or bf16, in its checkpoint's name and shape. It may change after the return."""
        self._names.append(name)
        self.bytes += array.nbytes
        self._parts = stream.send(name, array, list(self._workers), self._slots, self._parts, self._lose)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Wait for the servers, check them and let those that are right go on."""
        try:
            if kind is None:
                self._hear_results()
                self._call(self._finish())
            else:
                for client in self._well:
                    self._fail(client, "the trainer broke off while it sent weights", "wrong")
        finally:
            self._close()
            self.seconds = time.monotonic() - self._begun

    @property
    def _well(self) -> list[Client]:
        return [client for client in self._clients if client not in self.failed]

    def _fail(self, client: Client, what: str | Failure, kind: Kind = "wrong") -> None:
        own = what if isinstance(what, Failure) else Failure(client.url, what, kind)
        failure = Failure(client.url, f"weights {self._version} did not arrive: {own.what}", own.kind)
        self.failed.setdefault(client, failure)
        for worker in [each for each, whose in self._workers.items() if whose is client]:
            del self._workers[worker]
            worker.close()

    def _lose(self, worker: stream.Worker, lost: stream.Lost) -> None:
        if worker in self._workers:  # else another one of its server was lost before
            self._fail(self._workers[worker], str(lost), "late" if lost.late else "wrong")

    async def _each(self, act: Callable[[Client], Awaitable[Any]]) -> dict[Client, Any]:
        """Do something with all servers that are well, at once; return what came of it for those that still are."""

        async def one(client: Client) -> Any:
            try:
                return await act(client)
            except Failure as failure:
                self._fail(client, failure)

        clients = self._well
        results = dict(zip(clients, await asyncio.gather(*map(one, clients)), strict=True))
        return {client: result for client, result in results.items() if client not in self.failed}

    async def _pause(self) -> Counter[Client]:
        """Return how many workers each server has."""

        async def pause(client: Client) -> int:
            facts = await client.facts()
            await client.pause(self._pause_mode)
            return facts.world_size

        return Counter(await self._each(pause))

    def _order(self, client: Client) -> stream.Order | None:
        url = urlsplit(client.url)
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            host, port = self._listening.beside(url.hostname or "", port, self._timeout)
        except OSError as error:
            self._fail(client, f"it cannot be reached: {error}", "unreachable")
            return None
        folder = hashlib.sha256(f"{_HERE} {client.url}".encode()).hexdigest()[:16]
        return stream.Order(
            host=host,
            port=port,
            token=self._token,
            server=self._clients.index(client),
            seconds=self._timeout,
            slots=self._slots.path,
            adapter=self._adapter,
            folder=f"luthier-{folder}-{self._version}",
        )

    async def _start(self, orders: Mapping[Client, stream.Order]) -> None:
        """Have all servers' workers connect; their answers come at the end."""
        method = "luthier_receive_adapter" if self._adapter else "luthier_receive"
        for client, order in orders.items():
            self._running[client] = asyncio.create_task(client.rpc(method, order.text()))

    def _meet(self, expected: Counter[Client]) -> None:
        """Wait for all workers, as long as there is hope."""

        def take(worker: stream.Worker) -> None:
            client = self._clients[worker.server]
            if client in self.failed:
                worker.close()
            else:
                self._workers[worker] = client

        def missing() -> list[Client]:
            here = Counter(self._workers.values())
            return [client for client in self._well if here[client] < expected[client]]

        def enough() -> bool:
            for client in missing():
                if self._running[client].done():
                    own = self._running[client].exception()
                    self._fail(client, own if isinstance(own, Failure) else "its workers did not take weights")
            return not missing()

        self._listening.accept(self._token, self._timeout, take, enough)
        for client in missing():
            self._fail(client, f"its workers did not connect in {self._timeout:g} s", "late")

    def _hear_results(self) -> None:
        """Tell all workers that this was all, and wait until they have loaded it."""
        for act in (lambda worker: worker.tell({"end": self._names}), stream.Worker.result):
            for worker in list(self._workers):
                try:
                    act(worker)
                except stream.Lost as lost:
                    self._lose(worker, lost)

    async def _finish(self) -> None:
        """Let the servers that have everything use it, under its name."""

        async def finish(client: Client) -> None:
            try:
                said = await asyncio.wait_for(self._running[client], self._timeout)
            except TimeoutError:
                raise Failure(client.url, f"it was not done in {self._timeout:g} s", "late") from None
            if self._adapter:
                await self._install(client, said)
            await client.reset_prefix_cache()
            await client.set_version(self._version)
            named = await client.version()
            if named != str(self._version):
                raise Failure(client.url, f"its weights are called {named}, and they are {self._version}", "wrong")
            await client.resume()

        await self._each(finish)

    async def _install(self, client: Client, said: Sequence[Any]) -> None:
        """Have vLLM load the adapter, where the workers have not replaced it themselves, and look at what it has."""
        folder = str(said[0]["folder"])
        if not all(one["replaced"] for one in said):
            await client.load_adapter(self._adapter, folder)
        for one in await client.rpc("luthier_check_adapter", self._adapter, folder, timeout=self._timeout):
            if "error" in one:
                raise Failure(client.url, one["error"], "wrong")

    def _close(self) -> None:
        for worker in self._workers:
            worker.close()
        self._workers.clear()
        self._listening.close()
        self._slots.close()
        self._call(self._end())

    async def _end(self) -> None:
        """Wait for no answer any more."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)


def send_adapter(
    clients: Sequence[Client],
    call: Call,
    version: int,
    files: Mapping[str, bytes],
    *,
    name: str,
    pause_mode: Pause = "keep",
    timeout: float = 600.0,
) -> Transfer:
    """Serve the adapter of ``files`` (of ``adapters.files``) as ``name`` on each server; return the transfer, done.

    The files travel as tensors do, each server's host writes them to a folder of its own, and vLLM loads that. What had
    the name is replaced.
    """
    with Transfer(clients, call, version, pause_mode=pause_mode, timeout=timeout, adapter=name) as to:
        for file, content in files.items():
            to.put(file, np.frombuffer(content, np.uint8))
    return to
