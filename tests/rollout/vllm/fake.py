"""A server that speaks vLLM's HTTP and draws tokens that anyone can work out; and that misbehaves where it is told to.

Left out on purpose: a model. A token follows from the prompt, the seed, the place and the version of the weights
(``token``), so that a test sees of each completion whether it is the right one.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fake_faults import choice, spoilt

VOCAB, LONGEST = 64, 128
SECONDS_A_TOKEN = 0.001


def token(prompt: Sequence[int], seed: int, place: int, version: str) -> tuple[int, float]:
    """Return the token that is drawn at a place of a completion, and its log-prob."""
    digest = hashlib.sha256(json.dumps([list(prompt), seed, place, version]).encode()).digest()
    return digest[0] % VOCAB, -1.0 - digest[1] / 64


@dataclass
class Fake:
    """The server. ``fault`` is what it does instead of answering, the next ``times`` times that it is asked.

    ``asked`` are the bodies of all completions that it was asked for, ``versions`` the names of the weights that it was
    given, ``paths`` what else was wanted of it. It ``refuses`` a path, and says nothing at all while it is ``mute``.
    ``workers`` are called with a method and its arguments.
    """

    seconds_a_token: float = SECONDS_A_TOKEN
    longest: int = LONGEST
    key: str = ""
    fault: str = ""
    times: int = 0
    port: int = 0
    late: float = 4.0
    refuses: str = ""
    mute: bool = False
    workers: Callable[..., Any] = lambda method, *arguments: {"error": f"no {method}"}
    asked: list[dict[str, Any]] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start it."""
        self._ending = threading.Lock()
        self.begin()

    @property
    def url(self) -> str:
        """Where it is, from its first start on."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def settings(self) -> dict[str, Any]:
        """What it says of how it was started, as far as anyone looks at it."""
        model = {"logprobs_mode": "processed_logprobs", "dtype": "torch.float32", "max_model_len": self.longest}
        return {"model_config": model, "parallel_config": {"worker_extension_cls": "luthier_vllm.Weights"}}

    @property
    def alive(self) -> bool:
        """Whether it listens."""
        return not self._ended

    @property
    def draws(self) -> int:
        """How many completions are under way."""
        return len(self._drawing)

    def begin(self) -> None:
        """Start it, at the same port as before, with weights that have no version."""
        self.version, self.paused, self.models = "default", False, []
        self._changed, self._lock = threading.Condition(), threading.Lock()
        self._drawing: dict[str, bool] = {}
        self._connections: set[socket.socket] = set()
        self._server = _Http(("127.0.0.1", self.port), self)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self._ended = False

    def end(self) -> None:
        """Die: nobody listens any more, and all connections are reset. Returns when it is done."""
        with self._ending:
            if self._ended:
                return
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            self._server.shutdown()
            self._server.server_close()
            for connection in list(self._connections):
                _reset(connection)

    def misbehave(self, fault: str, times: int = 1) -> None:
        """Do ``fault`` from now on, some times."""
        with self._lock:
            self.fault, self.times = fault, times

    def complete(self, body: dict[str, Any], handler: _Handler) -> None:
        """Answer a request for a completion, or do what it does instead."""
        with self._lock:
            self.asked.append(body)
            self.times -= 1
            fault = self.fault if self.times >= 0 else ""
        if fault in ("dies", "hangs", "breaks off"):
            self._vanish(fault, handler)
        elif fault == "answers 500":
            handler.answer({"error": {"message": "the engine is dead", "code": 500}}, 500)
        else:
            self._answer(body, fault, handler)

    def _answer(self, body: dict[str, Any], fault: str, handler: _Handler) -> None:
        drawn = self._draw(body, fault)
        if drawn is None:  # it has died meanwhile
            _reset(handler.connection)
            return
        if fault == "is late":
            time.sleep(self.late)
        name, found = f"generate-tokens-{body['request_id']}", spoilt(drawn, fault, body)
        if fault == "answers another request":
            name, found = "generate-tokens-of-another", self._draw({**body, "token_ids": [1, 2, 3]}, "")
        said = json.dumps({"request_id": name, "model": "model", "choices": [found]}).encode()
        if fault == "answers no JSON":
            said = b"<html>502 Bad Gateway</html>"
        handler.send(said, cut=len(said) // 2 if fault == "cuts its answer" else None)

    def hang(self) -> None:
        """Return at its end."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended)

    def _vanish(self, fault: str, handler: _Handler) -> None:
        if fault == "hangs":
            self.hang()
        if fault == "dies":
            self.end()
        _reset(handler.connection)

    def _draw(self, body: dict[str, Any], fault: str) -> dict[str, Any] | None:
        """Return a choice, drawn token by token: new weights are taken up in the middle."""
        how, name = body["sampling_params"], body["request_id"]
        limit = min(how["max_tokens"], self.longest - len(body["token_ids"]))
        limit += {"draws too many tokens": 1, "draws too few tokens": -1}.get(fault, 0)
        stops = () if fault == "goes past a stop token" else how.get("stop_token_ids") or ()
        drawn: list[tuple[int, float, str]] = []
        self._drawing[name] = True
        finish, reason = "length", None
        while len(drawn) < limit:
            time.sleep(self.seconds_a_token)
            with self._changed:
                self._changed.wait_for(lambda: not self.paused or self._ended or not self._drawing[name])
                if self._ended:
                    return None
                if not self._drawing[name]:
                    finish = "abort"
                    break
                drawn.append((*token(body["token_ids"], how["seed"], len(drawn), self.version), self.version))
            if drawn[-1][0] in stops:
                finish, reason = "stop", drawn[-1][0]
                break
        del self._drawing[name]
        return choice(drawn, finish, reason)

    def pause(self, mode: str) -> None:
        """Draw nothing for now, or end what is being drawn."""
        with self._changed:
            self.paused = True
            if mode == "abort":
                self._drawing = dict.fromkeys(self._drawing, False)
            self._changed.notify_all()

    def go_on(self) -> None:
        """Draw again."""
        with self._changed:
            self.paused = False
            self._changed.notify_all()

    def name(self, version: str) -> None:
        """Take new weights, or their name at least."""
        self.versions.append(version)
        self.version = version


class _Http(ThreadingHTTPServer):
    """Threads that nobody waits for, and a port that is free again at once."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], fake: Fake) -> None:
        self.fake = fake
        super().__init__(address, _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that break: they are what this is for."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def setup(self) -> None:
        super().setup()
        self.server.fake._connections.add(self.connection)

    def finish(self) -> None:
        self.server.fake._connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def answer(self, value: Any, code: int = 200) -> None:
        """Send a value as JSON."""
        self.send(json.dumps(value).encode(), code)

    def send(self, data: bytes, code: int = 200, cut: int | None = None) -> None:
        """Send an answer, or the first bytes of it."""
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:cut])
        if cut is not None or code >= 500:  # as vLLM's server does after the latter
            self.close_connection = True

    def do_GET(self) -> None:
        fake = self.server.fake
        answers = {
            "/health": {},
            "/version": {"version": "0.32.0"},
            "/v1/models": {"data": [{"id": each, "max_model_len": fake.longest} for each in ["model", *fake.models]]},
            "/get_world_size": {"world_size": 1},
            "/weight_info": {"weight_version": fake.version},
            "/is_paused": {"is_paused": fake.paused},
            "/server_info": {"vllm_config": fake.settings},
        }
        self._reply(answers.get(urlsplit(self.path).path))

    def do_POST(self) -> None:
        fake, url = self.server.fake, urlsplit(self.path)
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(data) if data else {}
        if url.path == "/inference/v1/generate" and self._may:
            if body:
                fake.complete(body, self)
            else:
                self.answer({"detail": "there is no prompt"}, 422)
            return
        fake.paths.append(url.path)
        if url.path == fake.refuses:
            self.answer({"error": {"message": f"{url.path} failed"}}, 500)
            return
        answers = {
            "/pause": lambda: fake.pause(parse_qs(url.query).get("mode", ["abort"])[0]),
            "/resume": fake.go_on,
            "/update_weight_version": lambda: fake.name(body["new_version"]),
            "/reset_prefix_cache": lambda: {"success": True},
            "/collective_rpc": lambda: {"results": [fake.workers(body["method"], *body["args"])]},
            "/v1/load_lora_adapter": lambda: fake.models.append(body["lora_name"]),
            "/v1/unload_lora_adapter": lambda: fake.models.remove(body["lora_name"]),
        }
        self._reply(answers[url.path]() or {"status": "done"} if url.path in answers else None)

    def _reply(self, value: Any) -> None:
        fake = self.server.fake
        if fake.mute:
            fake.hang()
        if not self._may:
            self.answer({"error": "Unauthorized"}, 401)
        elif value is None:
            self.answer({"detail": "Not Found"}, 404)
        else:
            self.answer(value)

    @property
    def _may(self) -> bool:
        key = self.server.fake.key
        return not key or self.headers.get("Authorization") == f"Bearer {key}"


def _reset(connection: socket.socket) -> None:
    """Close a connection as a process does that is killed."""
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()
    except OSError:
        pass  # it is closed already
