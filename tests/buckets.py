"""Servers of the buckets' protocols on this machine: moto's for S3, an emulator for Google's."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    running.start()
    address = f"http://127.0.0.1:{port}"
    try:
        yield {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "NO_GCE_CHECK": "true"}
    finally:
        running.stop()


def _forget() -> None:
    """Let go of the file systems that were made for the server."""
    import fsspec

    for name in ("s3", "gs"):
        with contextlib.suppress(ImportError):
            fsspec.get_filesystem_class(name).clear_instance_cache()
