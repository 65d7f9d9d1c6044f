"""The ASGI application: routes, keys, bodies in, answers out.

Left out on purpose: TLS and rate limits for each client, which a proxy in front does, and CORS: a page in a browser is
not to talk to a model on its reader's machine unasked.
"""

from __future__ import annotations

import asyncio
import functools
import hmac
import re
from collections.abc import Callable, Coroutine, Sequence
from time import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from luthier.commands.server import answer, schema, words
from luthier.commands.server.answer import Answer, Kind
from luthier.commands.server.job import Job, Served, adapter, read_chat, read_completion
from luthier.commands.server.refusal import Refusal
from luthier.commands.server.worker import Ticket, Worker

MAX_BODY = 8 << 20
"""Bytes in the body of a request: a text of a million tokens and more."""
LONG_BODY = 64 << 10
"""Bytes from which a body takes so long to read that others are not to wait for it."""


def make(served: Served, worker: Worker, api_key: str | None, hosts: Sequence[str]) -> Starlette:
    """Return the application.

    Without ``api_key`` it answers to the names ``hosts`` alone, so that no page in a browser can reach it under a name
    of its own that resolves to this machine.
    """
    word = words.reader(served.tokenizer)
    # Bodies are read beside the event loop, by one thread at a time, and long ones by another.
    reading, reading_long = asyncio.Lock(), asyncio.Lock()

    async def complete(kind: Kind, read: Callable[[bytes, Served], Job], request: Request) -> Response:
        data = await _body(request)
        async with reading_long if len(data) > LONG_BODY else reading:
            job = await asyncio.to_thread(read, data, served)
        ticket = worker.submit(job)
        return _Watched(Answer(kind, ticket, int(time()), served, word), ticket, worker)

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "failed" if worker.failure else "ok"}, 503 if worker.failure else 200)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(name, served) for name in served.models]})

    async def model(request: Request) -> Response:
        name = request.path_params["name"]
        adapter(name, served)  # raises where it is the name of none
        return JSONResponse(_model(name, served))

    routes = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/v1/completions", functools.partial(complete, answer.TEXT, read_completion), methods=["POST"]),
        Route("/v1/chat/completions", functools.partial(complete, answer.CHAT, read_chat), methods=["POST"]),
    ]
    guard = Middleware(_Keyed, api_key) if api_key else Middleware(_Named, hosts)
    handlers = {Refusal: _refused, HTTPException: _not_found, Exception: _failed}
    return Starlette(routes=routes, middleware=[guard], exception_handlers=handlers)


class _Keyed:
    """Lets requests under `/v1` through that bring the key."""

    def __init__(self, app: ASGIApp, api_key: str):
        self.app = app
        self.expected = api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1"):
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self.expected):
                problem = "no valid key: send the server's api_key as `Authorization: Bearer KEY`."
                refusal = Refusal(problem, status=401, code="invalid_api_key")
                await refusal.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


class _Named:
    """Lets requests through that name this machine, at whatever port, as the host they ask."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]):
        self.app = app
        self.hosts = dict.fromkeys(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        given = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
        if re.sub(r":[0-9]*$", "", given) not in self.hosts:
            problem = (
                f"host `{schema.short(given)}`: without a key, this server answers as {', '.join(self.hosts)} alone. "
                "Ask it under one of these, or start it with api_key=KEY (and host=0.0.0.0 for other machines)."
            )
            await Refusal(problem, code="unknown_host").response()(scope, receive, send)
            return
        await self.app(scope, receive, send)


class _Watched(Response):
    """Sends an answer, and cancels its ticket as soon as nobody is there any more to read it."""

    def __init__(self, content: Answer, ticket: Ticket, worker: Worker):
        self.content, self.ticket, self.worker = content, ticket, worker

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _unless_gone(receive, self._send(scope, receive, send))
        finally:
            self.worker.cancel(self.ticket)

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if self.ticket.job.stream:
                await self.ticket.accepted
                response: Response = _EventStream(self.content.events(), headers={"Cache-Control": "no-cache"})
            else:
                response = JSONResponse(await self.content.whole())
        except Refusal as refusal:
            response = refusal.response()
        await response(scope, receive, send)


class _EventStream(StreamingResponse):
    """A stream that leaves it to others to watch the connection."""

    media_type = "text/event-stream"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.stream_response(send)


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, or as much of it as there is time for until the client hangs up."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal("send JSON, with the header `Content-Type: application/json`.", status=415)
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise Refusal(f"the body is longer than {MAX_BODY >> 20} MiB.", status=413)
    return bytes(data)


def _model(name: str, served: Served) -> dict[str, Any]:
    """Return a model as the list of models has it; an adapter's ``parent`` is its base, as vLLM has it."""
    parent = {} if name == served.name else {"parent": served.name}
    return {"id": name, "object": "model", "created": served.created, "owned_by": "luthier", **parent}


async def _refused(request: Request, refusal: Refusal) -> Response:
    return refusal.response()


async def _not_found(request: Request, error: HTTPException) -> Response:
    problem = f"{request.method} {request.url.path}: {error.detail.lower()}."
    response = Refusal(problem, status=error.status_code).response()
    response.headers.update(error.headers or {})
    return response


async def _failed(request: Request, error: Exception) -> Response:
    return Refusal("the server failed on this request; its log says why.", status=500).response()
