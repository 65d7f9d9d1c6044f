"""`luthier serve` as a process: how it starts, how it ends, and what it refuses to start with."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import yaml

from luthier import cli, config, keys
from luthier.errors import UserError
from tiny import ROOT

ENVIRONMENT = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def process(model: Path, *more: str) -> Iterator[tuple[subprocess.Popen[str], openai.OpenAI]]:
    """Start the command on any free port; yield the process and a client once it serves."""
    command = [sys.executable, "-m", "luthier", "serve", f"load_parameters_path={model}", "port=0", "max_num_seqs=2"]
    command += ["max_target_length=300", "decode_steps=2", f"jax_cache_dir={ROOT / '.cache' / 'jax'}", *more]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        try:
            assert running.stdout is not None
            found = next(filter(None, (re.search(r"http://\S+/v1", line) for line in running.stdout)), None)
            assert found, running.communicate()[1]
            with openai.OpenAI(base_url=found[0], api_key="sesame", max_retries=0) as client:
                yield running, client
        finally:
            running.kill()


@pytest.mark.multiprocess
@pytest.mark.slow
def test_sigterm_lets_a_stream_finish_and_exits_143(tiny_model: Path) -> None:
    with process(tiny_model, "api_key=sesame") as (running, client):
        assert [model.id for model in client.models.list().data] == ["tiny-llama"]
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong").models.list()
        stream = client.completions.create(
            model="tiny-llama", prompt="a", max_tokens=200, stream=True, extra_body={"ignore_eos": True},
            stream_options={"include_usage": True},
        )  # fmt: skip
        next(iter(stream))
        running.send_signal(signal.SIGTERM)
        *_, last = stream
        assert last.usage.completion_tokens == 200
        with pytest.raises(openai.APIConnectionError):
            client.models.list()
        _, errors = running.communicate(timeout=30)
        assert running.returncode == 143, errors
        assert "Traceback" not in errors


@pytest.mark.multiprocess
@pytest.mark.slow
def test_ctrl_c_ends_an_idle_server_well(tiny_model: Path) -> None:
    with process(tiny_model, "served_model_name=mine", "host=localhost") as (running, client):
        assert [model.id for model in client.models.list().data] == ["mine"]
        asked = {"model": "mine", "extra_body": {"ignore_eos": True}}
        reply = client.chat.completions.create(messages=[{"role": "user", "content": "a"}], **asked)
        assert reply.usage.total_tokens == 300, "the rest of the context"
        assert client.completions.create(prompt="a", **asked).usage.completion_tokens == 256, "max_new_tokens"
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=30)
        assert (running.returncode, errors) == (0, "")


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["serve", "load_parameters_path=/nowhere", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err


def test_a_port_in_use_is_named_before_the_model_is_looked_for(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        shown = refused(capsys, f"port={port}")
    assert f"port={port}: in use on 127.0.0.1. Give another, or port=0 for any free one." in shown


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.1", "models.example"])
def test_an_open_address_needs_a_key(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = refused(capsys, f"host={host}")
    assert f"host={host} can be reached by other machines: set api_key" in shown


def test_an_address_of_another_machine_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    shown = refused(capsys, "host=203.0.113.7", "api_key=secret")
    assert "host=203.0.113.7" in shown
    assert "Give an address of this machine." in shown
    assert "secret" not in shown


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_missing_packages_are_named_with_the_remedy(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    shown = refused(capsys)
    assert f"needs the package {package}, which is not installed: pip install 'luthier[serve]'" in shown


def test_the_key_is_shown_and_saved_nowhere(tmp_path: Path) -> None:
    settings = config.resolve("serve", ["model_name=m", "api_key=secret", "hf_access_token=secret"], {})
    assert settings.api_key == settings.hf_access_token == "secret"
    assert "secret" not in repr(settings)
    keys.save(settings, tmp_path / "config.yml")
    saved = yaml.safe_load((tmp_path / "config.yml").read_text())
    assert saved["port"] == 8000
    assert not {"api_key", "hf_access_token"} & saved.keys()
    (tmp_path / "recipe.yml").write_text("api_key: [secret]\n")
    with pytest.raises(UserError, match=r"api_key=\.\.\. \(recipe") as refused:
        config.resolve("serve", [str(tmp_path / "recipe.yml"), "model_name=m"], {})
    assert "secret" not in str(refused.value)
