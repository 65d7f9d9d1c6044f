"""`luthier serve`: a model, and adapters over it, behind OpenAI's HTTP API.

The address is bound before the model is loaded, so that a wrong one is refused at once, and answers only when the model
is there. SIGINT and SIGTERM end the server: it takes nothing new, gives what runs ``PATIENCE`` seconds to finish, and
tells the rest that it was stopped; a second signal ends it at once.

Left out on purpose: several bases or processes, TLS, logs of requests. A proxy in front does those.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from luthier.config import ServeConfig
from luthier.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from luthier.checkpoint.source import Source
    from luthier.commands.server.job import Served
    from luthier.rollout.local import LocalEngine

PATIENCE = 10
"""Seconds that completions have to finish in after a signal."""

BACKLOG = 2048
EXIT_CODES = {signal.SIGINT: 0, signal.SIGTERM: 143}


def run(config: ServeConfig) -> None:
    """Serve until a signal comes. Raises SystemExit(143) after SIGTERM, UserError where the server cannot start, and
    what the engine raised where that failed.
    """
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"`luthier serve` needs the package {error.name}, which is not installed: pip install 'luthier[serve]'"
        ) from None
    with contextlib.closing(_bind(config)) as listener:
        _load_and_serve(config, listener)


def _bind(config: ServeConfig) -> socket.socket:
    """Return a socket at the address, on which nothing is listened for yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UserError(f"host={config.host}: {_reason(error)}. Give an address of this machine.") from None
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _unusable(config, error) from None
    return listener


def _listen(config: ServeConfig, listener: socket.socket) -> None:
    try:
        listener.listen(BACKLOG)  # fails where another process has begun to listen there since it was bound
    except OSError as error:
        raise _unusable(config, error) from None


def _unusable(config: ServeConfig, error: OSError) -> UserError:
    if error.errno == errno.EADDRINUSE:
        return UserError(f"port={config.port}: in use on {config.host}. Give another, or port=0 for any free one.")
    return UserError(f"host={config.host} port={config.port}: {_reason(error)}. Give an address of this machine.")


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _load_and_serve(config: ServeConfig, listener: socket.socket) -> None:
    from luthier import mesh as mesh_lib
    from luthier.commands.server.job import Served
    from luthier.data import chat
    from luthier.rollout import opened as opening

    def look(source: Source, tokenizer: Any) -> None:
        if (name := _name(config, source)) in config.lora_modules:
            raise UserError(f"lora_modules: the model itself is called `{name}`. Set served_model_name, or rename one.")

    opened = opening.open_model(config, look, config.lora_modules)
    with mesh_lib.use(opened.mesh):
        engine = opening.open_engine(config, opened)
        size = engine.reserve()
        print("Compiling; sooner done the next time.", flush=True)
        engine.warm_up()
    print(f"Up to {size.rows} completions at a time, each of up to {size.length} tokens with its prompt.")
    served = Served(
        name=_name(config, opened.source),
        created=int(time.time()),
        tokenizer=opened.tokenizer,
        rendering=chat.prompt_rendering(config, opened.tokenizer),
        sampling=opening.sampling(config, opened),
        vocab_size=opened.model.config.vocab_size,
        # As OpenAI has it, a reply without a bound goes on as long as there is room, to which the engine cuts this.
        reply_tokens=None if "max_new_tokens" in config.model_fields_set else size.length,
        adapters=opened.adapters,
    )
    _listen(config, listener)
    code = asyncio.run(_serve(config, listener, served, engine, opened.mesh))
    if code:
        raise SystemExit(code)


def _name(config: ServeConfig, source: Source) -> str:
    """Return what requests call the model: with an adapter, that is the adapter's folder."""
    place = config.lora_path or source.name
    by_itself = Path(place).expanduser().resolve().name
    return config.served_model_name or ("" if config.lora_path else source.hub_id) or by_itself


async def _serve(config: ServeConfig, listener: socket.socket, served: Served, engine: LocalEngine, mesh: Mesh) -> int:
    """Serve until a signal comes, and return the exit code; raise what the engine raises."""
    from luthier.commands.server.running import Running

    host = f"[{config.host}]" if listener.family == socket.AF_INET6 and ":" in config.host else config.host
    running = Running(
        served,
        engine,
        mesh,
        listener,
        max_queue=config.max_queue,
        api_key=config.api_key,
        hosts=("localhost", "127.0.0.1", "[::1]", host),
        patience=PATIENCE,
    )
    with _signals(running.stop) as received:
        address = f"http://{host}:{listener.getsockname()[1]}/v1"
        print(f"Serving {', '.join(served.models)} at {address}. Ctrl-C ends it.", flush=True)
        await running.serve()
    return EXIT_CODES[received[0]]


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[list[signal.Signals]]:
    """Have signals call ``stop`` in the event loop; yield the list of those that came."""
    loop, received = asyncio.get_running_loop(), []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        loop.call_soon_threadsafe(stop)

    before = {number: signal.signal(number, handle) for number in EXIT_CODES}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
