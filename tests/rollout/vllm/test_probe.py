"""Servers elsewhere are looked at before anything expensive is done."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from luthier.errors import UserError
from luthier.rollout.vllm import probe
from luthier.rollout.vllm.probe import Needed

ENOUGH = Needed(64, 0)


def described(**settings: Any) -> dict[str, Any]:
    """What vLLM 0.32 says of itself, as far as it is looked at."""
    model = {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32", "max_model_len": 64}
    lora, worker = settings.pop("lora_config", None), settings.pop("worker_extension_cls", "luthier_vllm.Weights")
    config = {"model_config": model | settings, "parallel_config": {"worker_extension_cls": worker}}
    return {"vllm_config": config | {"lora_config": lora}, "vllm_env": {}, "system_env": {}}


@contextmanager
def serving(info: Any, drawing: int = 400, key: str = "") -> Iterator[str]:
    """A server that says ``info`` of itself, None for nothing, and ``drawing`` to a request without a prompt."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            self.say({"/health": 200, "/server_info": 404 if info is None else 200}[path], info)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.say(drawing if self.headers.get("Authorization", "") == (key and f"Bearer {key}") else 401, {})

        def say(self, status: int, value: Any) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_servers_that_are_right_say_what_they_compute_in() -> None:
    with serving(described(dtype="torch.bfloat16")) as one, serving(described(dtype="torch.bfloat16")) as two:
        assert probe.check([one, f"{two}/"], ENOUGH) == "bfloat16"
    with serving(described(lora_config={"max_lora_rank": 16}), key="secret") as url:
        assert probe.check([url], Needed(None, 16), api_key="secret") == "float32"
        with pytest.raises(UserError, match=r"wants a key. Set VLLM_API_KEY"):
            probe.check([url], Needed(None, 16))


@pytest.mark.parametrize(
    ("info", "drawing", "needed", "words"),
    [
        (None, 400, ENOUGH, "without VLLM_SERVER_DEV_MODE=1.*luthier vllm"),
        (described(), 403, ENOUGH, "without --enable-scale-out.*luthier vllm"),
        (described(worker_extension_cls=""), 400, ENOUGH, "--worker-extension-cls luthier_vllm.Weights"),
        (described(logprobs_mode="raw_logprobs"), 400, ENOUGH, "--logprobs-mode raw_logprobs"),
        (described(dtype="torch.float16"), 400, ENOUGH, "torch.float16.*float32 or bfloat16"),
        (described(), 400, Needed(65, 0), "64 tokens, and prompt with completion have 65: .*max_target_length=65"),
        (described(), 400, Needed(64, 8), "adapters of none.*lora_rank=8"),
        (described(lora_config={"max_lora_rank": 8}), 400, Needed(64, 16), "up to rank 8.*lora_rank=16"),
    ],
)
def test_what_a_server_is_not_is_said(info: Any, drawing: int, needed: Needed, words: str) -> None:
    with serving(info, drawing) as url, pytest.raises(UserError, match=rf"vllm_urls={url}: (.|\n)*{words}"):
        probe.check([url], needed)


def test_servers_that_differ_are_refused() -> None:
    with (
        serving(described()) as one,
        serving(described(dtype="torch.bfloat16")) as two,
        pytest.raises(UserError, match="different types"),
    ):
        probe.check([one, two], ENOUGH)


def test_one_that_does_not_answer_is_waited_for_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(probe, "SAY_SECONDS", 0.02)
    said: list[str] = []
    with pytest.raises(UserError, match=r"vllm_urls=http://127.0.0.1:9: does not answer within 0.1 s \(vllm_wait\)"):
        probe.check(["http://127.0.0.1:9"], ENOUGH, wait=0.1, say=said.append)
    assert said
    assert "Waiting for the vLLM server http://127.0.0.1:9" in said[0]
