"""One vLLM server, over the HTTP that vLLM itself speaks: token ids in, token ids and their log-probs out.

Written against vLLM 0.32, started with ``--enable-scale-out`` and ``VLLM_SERVER_DEV_MODE=1``. What a completion's JSON
has to be is in ``wire``.

Left out on purpose: which server a request goes to, and what follows a failure (``fleet``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from luthier.rollout.vllm import wire
from luthier.rollout.vllm.wire import Answer, Asked

__all__ = ["Answer", "Asked", "Client", "Facts", "Failure", "Kind", "Pause"]

Kind = Literal["unreachable", "late", "refused", "wrong"]
Pause = Literal["keep", "abort"]
CONNECT_SECONDS = 10.0
_LISTED = 300


class Failure(Exception):
    """A server did not do what it was asked.

    ``server`` is its URL, ``what`` one sentence. ``kind``: it could not be reached or broke off ("unreachable"), was
    not done in time ("late"), said no ("refused": an HTTP status), or answered what cannot be right ("wrong").
    """

    def __init__(self, server: str, what: str, kind: Kind) -> None:
        """Take what happened."""
        super().__init__(f"{server}: {what}")
        self.server, self.what = server, what
        self.kind: Kind = kind


@dataclass(frozen=True)
class Facts:
    """What a server says of itself: its vLLM's version, its longest sequence, its workers, the models it serves.

    ``models`` begins with the base; an adapter is listed by the name that it was loaded under.
    """

    version: str
    max_model_len: int
    world_size: int
    models: tuple[str, ...]


class Client:
    """A server at ``url``. All methods are coroutines of one event loop, and raise ``Failure`` alone.

    ``timeout`` is the seconds that anything may take but the drawing of a completion, which waits while weights are
    taken and is bounded by whoever asks. Nothing goes through a proxy that the environment names.
    """

    def __init__(self, url: str, *, api_key: str = "", timeout: float = 600.0, vocab_size: int | None = None) -> None:
        """Connect to nothing yet. Tokens that are not below ``vocab_size`` are wrong."""
        self.url, self.timeout, self.vocab_size = url.rstrip("/"), timeout, vocab_size
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx.Timeout(None, connect=min(timeout, CONNECT_SECONDS)),
            # A connection for each request: vLLM closes those on which it has answered an error, or that stood idle,
            # and a request that is just then sent on one would look like a server that died.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            trust_env=False,
        )

    async def facts(self) -> Facts:
        """Return what the server says of itself."""
        version, models, workers = [
            await self._ask("GET", path) for path in ("/version", "/v1/models", "/get_world_size?include_dp=true")
        ]
        try:
            return Facts(
                str(version["version"]),
                int(models["data"][0]["max_model_len"]),
                int(workers["world_size"]),
                tuple(str(model["id"]) for model in models["data"]),
            )
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise Failure(self.url, f"it does not describe itself as vLLM does: {error!r}", "wrong") from None

    async def generate(self, asked: Asked) -> Answer:
        """Draw one completion. Cancelling the coroutine ends it on the server too.

        The finish is "cancelled" where the server aborted it (``abort``, or ``pause("abort")``).
        """
        said = await self._ask("POST", "/inference/v1/generate", wire.request(asked), seconds=None)
        try:
            return wire.read(asked, said, self.vocab_size)
        except wire.Wrong as wrong:
            raise Failure(self.url, f"a completion is wrong: {wrong}", "wrong") from None

    async def pause(self, mode: Pause) -> None:
        """Stop drawing: what is unfinished waits for ``resume`` ("keep") or comes back as cancelled ("abort")."""
        await self._ask("POST", f"/pause?mode={mode}")

    async def resume(self) -> None:
        """Go on drawing."""
        await self._ask("POST", "/resume")

    async def reset_prefix_cache(self) -> None:
        """Forget all that was computed by weights that are gone; running completions are read again."""
        said = await self._ask("POST", "/reset_prefix_cache?reset_running_requests=true")
        if not isinstance(said, dict) or said.get("success") is not True:
            raise Failure(self.url, "it did not reset its prefix cache", "wrong")

    async def set_version(self, version: int) -> None:
        """Name the weights: tokens drawn from now on carry ``version``."""
        await self._ask("POST", "/update_weight_version", {"new_version": str(version)})

    async def version(self) -> str:
        """Return the name of the weights, "default" where none was set since the server began."""
        said = await self._ask("GET", "/weight_info")
        if not isinstance(said, dict) or "weight_version" not in said:
            raise Failure(self.url, "it does not say what its weights are called", "wrong")
        return str(said["weight_version"])

    async def rpc(self, method: str, *arguments: str, timeout: float | None = None) -> list[Any]:
        """Call a method of each worker and return what each of them returned; without ``timeout`` it may take long."""
        body = {"method": method, "args": list(arguments)}
        said = await self._ask("POST", "/collective_rpc", body, seconds=timeout)
        if not isinstance(said, dict) or not isinstance(said.get("results"), list):
            raise Failure(self.url, f"its workers gave no results of {method}", "wrong")
        return said["results"]

    async def load_adapter(self, name: str, folder: str) -> None:
        """Serve the adapter in a folder of the server's host under ``name``, in place of what had that name.

        A server that has the name already takes it away first: loaded in place, vLLM would read the files anew at each
        step (``luthier_vllm._replace``).
        """
        if name in (await self.facts()).models:
            await self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        await self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})

    async def abort(self, names: Sequence[str]) -> None:
        """End these requests; their ``generate`` returns what they have as cancelled."""
        body = {"request_ids": [wire.called(name) for name in names]}
        await self._ask("POST", "/inference/v1/abort_requests", body)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _ask(self, method: str, path: str, body: Any = None, *, seconds: float | None = -1.0) -> Any:
        """Return the JSON of an answer, None where it has no body. ``seconds`` -1 is the client's timeout."""
        limit = self.timeout if seconds == -1.0 else seconds
        what = path.partition("?")[0]
        try:
            async with asyncio.timeout(limit):
                answer = await self._http.request(method, self.url + path, json=body)
        except (TimeoutError, httpx.TimeoutException) as error:
            if isinstance(error, httpx.ConnectTimeout):
                raise Failure(self.url, f"{what}: it cannot be reached: no connection in time", "unreachable") from None
            raise Failure(self.url, f"{what} was not answered in {limit:g} s", "late") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Failure(self.url, f"{what}: {type(error).__name__}: {error}", "unreachable") from None
        if answer.status_code != 200:
            said = f"{what} was answered with {answer.status_code}: {answer.text[:_LISTED]}"
            raise Failure(self.url, said, "refused")
        try:
            return answer.json() if answer.content else None
        except json.JSONDecodeError:
            return answer.text
        except UnicodeDecodeError:
            raise Failure(self.url, f"{what} was answered with no text", "wrong") from None
