"""What the tests against the real vLLM share: its Python, a server, and runs of `luthier rl` over it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import folders
import pytest
import running
from running import Meddle, Ran, Train

import tiny


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The Python that vLLM is installed in."""
    found = Path(os.environ.get("VLLM_PYTHON", tiny.ROOT / ".venv-vllm" / "bin" / "python"))
    if not found.exists():
        pytest.fail(f"{found} is not there: `make test-vllm` installs vLLM, or VLLM_PYTHON names a Python that has it")
    return str(found)


@pytest.fixture(scope="module")
def server(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a server of `luthier vllm` that all runs of a module use, with room for adapters."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log, url = tmp_path_factory.mktemp("server") / "log", f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "luthier", "vllm", f"load_parameters_path={folders.smollm2()}", f"port={port}"),
        *(f"vllm_python={vllm_python}", "lora_rank=8", "max_target_length=256", *running.SERVER),
    ]
    with log.open("w") as output:
        process = subprocess.Popen(command, env=running.ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
    try:
        running.wait_for(lambda: process.poll() is not None or running.answers(url), running.START_SECONDS)
        assert process.poll() is None, log.read_text()
        yield url
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Return what runs `luthier rl`, or a ``program`` in its place, as ``running.train`` says."""

    def run(*keys: str, program: tuple[str, ...] = ("-m", "luthier", "rl"), meddle: Meddle | None = None) -> Ran:
        return running.train(tmp_path, keys, program, meddle, seconds=1500)

    return run
