"""A client of a fake vLLM server: what it asks, and what it makes of servers that fail."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
from fake import VOCAB, token

from luthier.rollout.engine import Sampling
from luthier.rollout.vllm.client import Asked, Client, Facts, Failure

ASKED = Asked("one", [3, 1, 4], Sampling(max_new_tokens=5, seed=7))


def use(url, act, **settings):
    """Return what ``act`` gives of a client."""

    async def run():
        client = Client(url, **{"timeout": 5.0, "vocab_size": VOCAB, **settings})
        try:
            return await act(client)
        finally:
            await client.close()

    return asyncio.run(run())


def failure(url, act, **settings):
    with pytest.raises(Failure) as raised:
        use(url, act, **settings)
    return raised.value


def test_it_asks_in_vllms_words(fakes):
    (fake,) = fakes(1, key="secret")

    async def act(client):
        found = await client.facts(), await client.version()
        await client.pause("keep")
        await client.reset_prefix_cache()
        await client.set_version(12)
        await client.resume()
        await client.load_adapter("policy", "/somewhere")
        await client.load_adapter("policy", "/elsewhere")
        return *found, await client.version(), (await client.facts()).models, await client.generate(ASKED)

    facts, before, after, models, answer = use(f"{fake.url}/", act, api_key="secret")
    assert facts == Facts("0.32.0", fake.longest, 1, ("model",))
    assert (before, after) == ("default", "12")
    assert models == ("model", "policy")
    loads = ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/load_lora_adapter"]
    assert fake.paths == ["/pause", "/reset_prefix_cache", "/update_weight_version", "/resume", *loads]
    drawn = [token(ASKED.prompt, 7, place, "12") for place in range(5)]
    assert answer.tokens_T.tolist() == [each for each, _ in drawn]
    assert set(answer.versions_T.tolist()) == {12}


def test_workers_are_called_with_text_and_their_results_come_back(fakes):
    (fake,) = fakes(1)
    fake.workers = lambda method, *arguments: {"method": method, "arguments": arguments}
    (said,) = use(fake.url, lambda client: client.rpc("luthier_receive", '{"port": 1}'))
    assert said == {"method": "luthier_receive", "arguments": ['{"port": 1}']}


def test_paused_requests_wait_or_come_back_cancelled(fakes):
    (fake,) = fakes(1, seconds_a_token=0.02)

    async def act(client, mode):
        await client.set_version(1)
        drawing = asyncio.create_task(client.generate(ASKED))
        await asyncio.sleep(0.06)
        await client.pause(mode)
        await client.set_version(2)
        await client.resume()
        return await drawing

    kept = use(fake.url, lambda client: act(client, "keep"))
    assert kept.finish == "length"
    assert set(kept.versions_T.tolist()) == {1, 2}
    ended = use(fake.url, lambda client: act(client, "abort"))
    assert ended.finish == "cancelled"
    assert len(ended.tokens_T) < 5


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("dies", "unreachable"), ("breaks off", "unreachable"), ("cuts its answer", "unreachable"),
     ("answers 500", "refused"), ("answers no JSON", "wrong"), ("draws too few tokens", "wrong")],
)  # fmt: skip
def test_faults_are_told_apart(fakes, fault, kind):
    (fake,) = fakes(1)
    fake.name("1")
    fake.misbehave(fault)
    found = failure(fake.url, lambda client: client.generate(ASKED))
    assert found.kind == kind
    assert found.server == fake.url
    assert str(found).startswith(fake.url)


def test_a_server_that_says_nothing_is_late(fakes):
    (fake,) = fakes(1, mute=True)
    assert failure(fake.url, Client.version, timeout=0.2).kind == "late"


def test_after_an_error_the_next_request_is_answered(fakes):
    (fake,) = fakes(1)
    fake.name("1")

    async def act(client):
        for _ in range(3):
            fake.misbehave("answers 500")
            with pytest.raises(Failure):
                await client.generate(ASKED)
            await client.generate(ASKED)

    use(fake.url, act)


def test_a_port_where_nobody_listens_is_unreachable():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    begun = time.monotonic()
    assert failure(f"http://127.0.0.1:{port}", Client.facts).kind == "unreachable"
    assert time.monotonic() - begun < 3


def test_a_wrong_key_is_refused(fakes):
    (fake,) = fakes(1, key="secret")
    found = failure(fake.url, Client.facts, api_key="guess")
    assert found.kind == "refused"
    assert "401" in found.what


def test_a_server_that_does_not_reset_its_cache_is_wrong(fakes, monkeypatch):
    (fake,) = fakes(1)
    monkeypatch.setattr(Client, "_ask", _says({"success": False}))
    assert failure(fake.url, Client.reset_prefix_cache).kind == "wrong"


@pytest.mark.parametrize("act", [Client.facts, Client.version, lambda client: client.rpc("luthier_receive")])
def test_another_service_is_no_vllm(fakes, monkeypatch, act):
    (fake,) = fakes(1)
    monkeypatch.setattr(Client, "_ask", _says({"status": "ok"}))
    assert failure(fake.url, act).kind == "wrong"


def _says(value):
    async def answer(self, *arguments, **more):
        return value

    return answer
