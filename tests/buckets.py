"""Servers of the buckets' protocols on this machine: moto's for S3, an emulator for Google's."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from functools import partial
from http.server import HTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest


@contextlib.contextmanager
def server(kind: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Give the address of an empty bucket, ``s3://...`` or ``gs://...``, and the environment that finds its server."""
    start = {"s3": _s3, "gs": _gs}[kind]
    with start() as environment:
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            yield f"{kind}://bucket", environment
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
            _forget()


@contextlib.contextmanager
def _s3() -> Iterator[dict[str, str]]:
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    running = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    _, port = running.get_host_and_port()
    address = f"http://127.0.0.1:{port}"
    s3fs.S3FileSystem(key="a", secret="b", endpoint_url=address).mkdir("bucket")
    try:
        yield {
            "AWS_ENDPOINT_URL": address,
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        running.stop()


@contextlib.contextmanager
def _gs() -> Iterator[dict[str, str]]:
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    pytest.importorskip("gcsfs")
    storage = emulator.Storage(use_memory_fs=True)
    emulator.buckets.create_bucket("bucket", storage)
    running = HTTPServer(("127.0.0.1", 0), partial(_with_generations(emulator.RequestHandler), storage))
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{running.server_port}"
    try:
        yield {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "NO_GCE_CHECK": "true"}
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def _with_generations(handler: Any) -> Any:
    """Give the emulator what it lacks of the protocol: an object's generation, and requests that depend on it.

    Writers of one checkpoint change its manifest at the same time, and know by the generation which of them was first
    (https://cloud.google.com/storage/docs/request-preconditions).
    """
    from gcp_storage_emulator.exceptions import NotFound

    class Handler(handler):
        def generation(self) -> str | None:
            """Return the generation of the object that is asked for: "0" where there is none, None for no object."""
            path, _, query = self.path.partition("?")
            found = re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)/o(?:/([^/]+))?", path)
            if found is None:
                return None
            name = unquote(found[2]) if found[2] else parse_qs(query).get("name", [""])[0]
            with contextlib.suppress(NotFound):
                return self.storage.get_file_obj(found[1], name)["generation"] if name else None
            return "0"

        def parse_request(self) -> bool:
            """Answer a request whose condition does not hold."""
            if not super().parse_request():
                return False
            conditions = parse_qs(self.path.partition("?")[2])
            found = self.generation()
            refused = 0
            if found and conditions.get("ifGenerationMatch", [found]) != [found]:
                refused = 412
            if found and conditions.get("ifGenerationNotMatch") == [found]:
                refused = 304
            if refused:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.send_response(refused)
                self.end_headers()
            return not refused

        def end_headers(self) -> None:
            if self.command == "GET" and (found := self.generation()):
                self.send_header("x-goog-generation", found)
            super().end_headers()

    return Handler


def _forget() -> None:
    """Let go of the file systems that were made for the server."""
    import fsspec

    for name in ("s3", "gs"):
        with contextlib.suppress(ImportError):
            fsspec.get_filesystem_class(name).clear_instance_cache()
