"""Whether servers that run elsewhere are what they have to be, asked before anything expensive is done.

Left out on purpose: what they are asked later on (``client``), and whether they stay what they are (``fleet``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import httpx

from luthier.errors import UserError
from luthier.rollout.vllm import command

LOOK_SECONDS = 2.0
"""Between two looks at a server that does not answer yet."""
SAY_SECONDS = 30.0
ANSWER_SECONDS = 60.0
"""A server looks around its system before it describes itself for the first time."""
REMEDY = "Start it by `luthier vllm`, which gives it all that it needs."


class Needed(NamedTuple):
    """What servers have to take: tokens of prompt and completion together (None: any), and an adapter's rank or 0."""

    length: int | None
    lora_rank: int


def check(
    urls: Sequence[str],
    needed: Needed,
    *,
    api_key: str = "",
    wait: float = 600.0,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """Wait for servers to answer, at most ``wait`` seconds, look at what they are, and return the type they compute in.

    Raises UserError naming the first that does not answer, or is not what it has to be.
    """
    types: dict[str, str] = {}
    deadline = time.monotonic() + wait
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(headers=headers, timeout=ANSWER_SECONDS, trust_env=False) as client:
        for url in urls:
            _wait(client, url, deadline, wait, say)
            types[_type(client, url, needed)] = url
    if len(types) > 1:
        told = ", ".join(f"{url} in {kind}" for kind, url in types.items())
        raise UserError(f"vllm_urls: servers compute in different types: {told}. Start them alike.")
    return next(iter(types))


def _wait(client: httpx.Client, url: str, deadline: float, wait: float, say: Callable[[str], None]) -> None:
    said = time.monotonic()
    while why := _absent(client, url):
        if time.monotonic() > deadline:
            raise UserError(
                f"vllm_urls={url}: does not answer within {wait:g} s (vllm_wait): {why}. Is a server there (`luthier "
                "vllm host=0.0.0.0`), and can this machine reach it?"
            )
        if time.monotonic() - said > SAY_SECONDS:
            said = time.monotonic()
            say(f"Waiting for the vLLM server {url}: {why}")
        time.sleep(min(LOOK_SECONDS, max(0.0, deadline - time.monotonic())))


def _absent(client: httpx.Client, url: str) -> str:
    """Say why a server does not answer yet, "" where it does."""
    try:
        status = client.get(f"{url.rstrip('/')}/health").status_code
    except httpx.HTTPError as error:
        if "Name or service not known" in str(error) or "nodename nor servname" in str(error):
            raise UserError(f"vllm_urls={url}: no machine has this name. Give http://HOST:PORT.") from None
        return str(error) or type(error).__name__
    return "" if status == httpx.codes.OK else f"it answers with status {status}"


def _type(client: httpx.Client, url: str, needed: Needed) -> str:
    """Return the type that a server computes in. Raises UserError where it is not what it has to be."""
    place = url.rstrip("/")
    try:
        described = client.get(f"{place}/server_info", params={"config_format": "json"})
        drawing = client.post(f"{place}/inference/v1/generate", json={})
    except httpx.HTTPError as error:
        raise UserError(f"vllm_urls={url}: it answers, but does not say what it is: {error!r}.") from None
    if described.status_code == httpx.codes.NOT_FOUND:
        raise UserError(f"vllm_urls={url}: runs without VLLM_SERVER_DEV_MODE=1, and takes no weights. {REMEDY}")
    if drawing.status_code == httpx.codes.UNAUTHORIZED:
        raise UserError(f"vllm_urls={url}: wants a key. Set VLLM_API_KEY to it in the environment.")
    if drawing.status_code in (httpx.codes.FORBIDDEN, httpx.codes.NOT_FOUND):
        raise UserError(f"vllm_urls={url}: runs without --enable-scale-out, or is older than vLLM 0.32. {REMEDY}")
    if wrong := _wrong(described.json(), needed) if described.is_success else f"status {described.status_code}":
        raise UserError(f"vllm_urls={url}: {wrong}")
    return described.json()["vllm_config"]["model_config"]["dtype"].removeprefix("torch.")


def _wrong(described: Mapping[str, Any], needed: Needed) -> str:
    """Say what of a server's settings does not do, "" where all do."""
    settings = described["vllm_config"]
    model, lora = settings["model_config"], settings.get("lora_config")
    if settings["parallel_config"].get("worker_extension_cls") != command.WORKER:
        return f"runs without --worker-extension-cls {command.WORKER}, and takes no weights. {REMEDY}"
    if model["logprobs_mode"] != command.LOGPROBS:
        return f"runs with --logprobs-mode {model['logprobs_mode']}, and {command.LOGPROBS} is needed. {REMEDY}"
    if model["dtype"].removeprefix("torch.") not in command.TYPES:
        return f"computes in {model['dtype']}, and weights are sent as {' or '.join(command.TYPES)}. {REMEDY}"
    if needed.length is not None and model["max_model_len"] < needed.length:
        return (
            f"takes sequences of {model['max_model_len']} tokens, and prompt with completion have {needed.length}: "
            f"start it with max_target_length={needed.length}, or lower max_new_tokens or max_target_length here."
        )
    if needed.lora_rank > (lora["max_lora_rank"] if lora else 0):
        room = f"up to rank {lora['max_lora_rank']}" if lora else "none"
        return (
            f"takes adapters of {room}, and what is sent has rank {needed.lora_rank}: start it with lora_rank="
            f"{needed.lora_rank}."
        )
    return ""
