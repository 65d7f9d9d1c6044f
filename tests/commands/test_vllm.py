"""`luthier vllm`, and `luthier generate` and `eval` over vLLM's servers, in whose place are fakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake import Fake
from fleets import Names, two

from luthier import cli
from luthier.rollout.chosen import Chosen
from luthier.rollout.vllm import servers
from tiny import ROOT

REWARDS = ROOT / "tests" / "train" / "rl_rewards.py"


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Fake]]:
    """Two servers, which are sent nothing but the version of the weights."""
    monkeypatch.setattr(Chosen, "_send", lambda self, opened, dtype: Names())
    with two(monkeypatch) as both:
        yield both


@pytest.fixture
def keys(tiny_model: Path, fakes: list[Fake]) -> list[str]:
    urls = [each.url for each in fakes]
    return ["rollout_engine=vllm", f"vllm_urls={urls}", f"load_parameters_path={tiny_model}", "vllm_wait=5"]


def test_generate_writes_what_the_servers_draw(
    keys: list[str], fakes: list[Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, written = tmp_path / "prompts.txt", tmp_path / "written.jsonl"
    prompts.write_text("one\ntwo\nthree\n")
    arguments = [f"prompts_path={prompts}", f"output_path={written}", "num_generations=2", "max_new_tokens=6"]
    assert cli.main(["generate", *keys, *arguments, "temperature=1", "top_k=8", "logprobs=0"]) == 0
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert [(row["index"], row["sample"]) for row in rows] == [(n, g) for n in range(3) for g in range(2)]
    for row in rows:
        assert 1 <= len(row["tokens"]) == row["completion_tokens"] <= 6
        # vLLM says how likely a token was among the eight, and nothing of the others.
        assert all(token["logprob"] is None and token["drawn_logprob"] < 0 for token in row["tokens"])
    assert all(fake.asked for fake in fakes)
    assert "6 completions of 3 prompts" in capsys.readouterr().err


def test_eval_scores_what_the_servers_draw(keys: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"question": f"what is {n}?", "answer": str(n)}) + "\n" for n in range(3)))
    keys = [*keys, f"hf_path={rows}", f"base_output_directory={tmp_path}", "max_new_tokens=6", "temperature=1"]
    assert cli.main(["eval", *keys, f"reward_functions=[{REWARDS}:even]", "num_generations=2"]) == 0
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "eval" / "completions.jsonl").read_text().splitlines()]
    assert (results["prompts"], len(lines)) == (3, 6)
    assert np.isclose(results["rewards"]["even"]["mean"]["value"], np.mean([line["rewards"]["even"] for line in lines]))
    assert all(line["logprob"] < 0 for line in lines)
    assert cli.main(["eval", *keys, "run_name=other"]) == 2
    assert "without reward_functions nothing is sampled" in capsys.readouterr().err


def test_prompts_that_servers_have_no_room_for_are_refused_before_weights_are_read(
    keys: list[str], fakes: list[Fake], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("luthier.rollout.opened._params", None)
    fakes[1].longest = 16
    assert cli.main(["generate", *keys, "prompt=hello", "max_new_tokens=64"]) == 2
    assert f"vllm_urls={fakes[1].url}: takes sequences of 16 tokens" in capsys.readouterr().err


def test_vllm_is_looked_for_before_anything_else(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = [f"load_parameters_path={tiny_model}", "vllm_python=/no/python"]
    assert cli.main(["generate", "rollout_engine=vllm", "prompt=x", *keys]) == 2
    assert "vllm_python=/no/python: no such program" in capsys.readouterr().err
    assert cli.main(["vllm", "port=1", *keys]) == 2


def test_a_server_that_cannot_start_is_told_with_what_it_said(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\necho "ValueError: no such attention"\nexit 3\n')
    python.chmod(0o755)
    keys = [f"load_parameters_path={tiny_model}", f"vllm_python={python}", "prompt=x"]
    assert cli.main(["generate", "rollout_engine=vllm", *keys]) == 1
    said = capsys.readouterr().err
    assert "ended with exit code 3" in said
    assert "ValueError: no such attention" in said
    assert not list(tmp_path.glob("luthier-vllm-*"))


PROGRAM = """
import signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            import os
            os._exit(9)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"here")

    def log_message(self, *args):
        pass

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.mark.multiprocess
def test_a_server_is_kept_running_until_a_signal_comes(tiny_model: Path, tmp_path: Path) -> None:
    program, python, port = tmp_path / "program.py", tmp_path / "python", servers._free_ports(1)[0]
    program.write_text(PROGRAM)
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\nexec {sys.executable} {program} "$@"\n')
    python.chmod(0o755)
    keys = [f"load_parameters_path={tiny_model}", f"port={port}", f"vllm_python={python}"]
    command = [sys.executable, "-m", "luthier", "vllm", *keys]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    ) as process:
        assert ask(port, "/") == b"here"
        ask(port, "/die", answers=False)
        assert ask(port, "/") == b"here"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
        assert process.stdout is not None
        said = process.stdout.read()
    assert said.count(f"vLLM starts at http://127.0.0.1:{port}") == 2
    assert "ended with exit code 9, and is started again" in said
    assert not list(tmp_path.glob("luthier-vllm-*"))


def ask(port: int, path: str, answers: bool = True) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10).read()
        except OSError:
            if not answers:
                return None
            time.sleep(0.05)
    raise TimeoutError(path)
