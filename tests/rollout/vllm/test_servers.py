"""vLLM's servers as child processes, with a program in the place of vLLM's that can be told how to fail."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from luthier import runtime
from luthier.checkpoint import source as source_lib
from luthier.config import VllmConfig
from luthier.config.vllm import TAKEN
from luthier.errors import UserError
from luthier.rollout.vllm import command, servers
from luthier.rollout.vllm.command import Wanted
from luthier.rollout.vllm.devices import Share
from luthier.rollout.vllm.servers import Children, Place, Process
from tiny import ROOT

SECONDS = 30  # generous: most of these take a tenth of one
PYTHON = """#!/bin/sh
[ "$1" = -c ] && exit 0
exec {python} {program} "$@"
"""
PROGRAM = """
import json, os, subprocess, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

if os.path.exists({fails!r}):
    print("(EngineCore pid=7) ERROR 11-22 18:30:37 [core.py:17] ValueError: no such attention")
    print("(APIServer pid=6) Traceback (most recent call last):")
    print("RuntimeError: Engine core initialization failed. See above.")
    sys.exit(3)
child = subprocess.Popen(["sleep", "1000"])

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        said = {{"arguments": sys.argv[1:], "environment": dict(os.environ), "pids": [os.getpid(), child.pid]}}
        data = json.dumps(said).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python that answers with what it was given in place of running vLLM; it fails where a file `fails` is."""
    program, path = tmp_path / "program.py", tmp_path / "python"
    program.write_text(PROGRAM.format(fails=str(tmp_path / "fails")))
    path.write_text(PYTHON.format(python=sys.executable, program=program))
    path.chmod(0o755)
    return path


@pytest.fixture
def started(tmp_path: Path, python: Path, tiny_model: Path) -> Any:
    """Start servers of the tiny model, which end with the test."""
    here: list[Children] = []

    def start(count: int = 1, **wanted: Any) -> Children:
        keys = VllmConfig(load_parameters_path=str(tiny_model), vllm_python=str(python))
        source = source_lib.resolve(keys)
        words = SimpleNamespace(save_pretrained=lambda folder: (folder / "tokenizer_config.json").write_text("{}"))
        here.append(Children(Wanted(keys, "float32", **wanted), source, words, [Share()] * count, tmp_path / "logs"))
        return here[-1]

    yield start
    for each in here:
        each.close()


def answer(url: str) -> dict[str, Any]:
    """What a server says, once it does."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            return json.load(urllib.request.urlopen(url))
        except (urllib.error.URLError, ConnectionError):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def comes(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lives(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_server_has_the_model_without_weights_and_an_address_of_its_own(started: Any) -> None:
    children = started(2, length=64, lora_rank=12, max_num_seqs=4, kv_cache_gib=0.5)
    assert len(set(children.urls)) == 2
    said = [answer(url) for url in children.urls]
    for url, each in zip(children.urls, said, strict=True):
        given = each["arguments"]
        value = {name: after for name, after in itertools.pairwise(given) if name.startswith("--")}
        assert given[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
        assert url.endswith(f":{value['--port']}")
        assert value.items() >= {
            *(("--dtype", "float32"), ("--load-format", "dummy"), ("--worker-extension-cls", "luthier_vllm.Weights")),
            *(("--logprobs-mode", "processed_logprobs"), ("--generation-config", "vllm"), ("--max-model-len", "64")),
            *(("--max-lora-rank", "16"), ("--max-num-seqs", "4"), ("--kv-cache-memory-bytes", str(2**29))),
        }
        assert {"--enable-lora", "--enable-scale-out"} <= set(given)
        model = Path(value["--model"])
        assert {"config.json", "tokenizer_config.json"} <= {path.name for path in model.iterdir()}
        assert not list(model.glob("*.safetensors"))
    children.close()
    assert not model.exists()
    comes(lambda: not any(lives(pid) for each in said for pid in each["pids"]))  # the killed take a moment to be gone
    children.close()


def test_nothing_of_ours_gets_into_a_servers_python(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")
    environment = answer(started().urls[0])["environment"]
    assert environment["PYTHONPATH"] == str(command.EXTENSION)
    assert (command.EXTENSION / "luthier_vllm.py").is_file()
    assert environment["VLLM_SERVER_DEV_MODE"] == environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert (environment["VLLM_CPU_OMP_THREADS_BIND"], environment["OMP_NUM_THREADS"]) == ("nobind", "1")


def test_one_that_was_killed_is_started_again_at_its_address(started: Any) -> None:
    children = started()
    (url,) = children.urls
    first = answer(url)["pids"]
    os.kill(first[0], signal.SIGKILL)
    comes(lambda: not children.running(url))
    assert "by SIGKILL" in children.failure(url)
    assert children.restart(url)
    assert children.running(url)
    assert answer(url)["pids"] != first
    comes(lambda: not any(map(lives, first)))  # what it had started is gone too


def test_one_that_fails_again_and_again_is_given_up(started: Any, tmp_path: Path) -> None:
    (tmp_path / "fails").touch()
    children = started()
    (url,) = children.urls
    for left in range(servers.RESTARTS, -1, -1):
        comes(lambda: not children.running(url))
        assert children.restart(url) == (left > 0)
    said = children.failure(url)
    assert "with exit code 3" in said
    assert str(tmp_path / "logs" / "server-0.log") in said
    assert said.splitlines()[1:] == [
        "  ValueError: no such attention",
        "  RuntimeError: Engine core initialization failed. See above.",
    ]


def test_restarts_of_long_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(servers.time, "monotonic", lambda: now)
    before: deque[float] = deque()
    assert [servers.may_restart(before) for _ in range(4)] == [True, True, True, False]
    now = servers.WITHIN + 1
    assert servers.may_restart(before)


def test_servers_end_with_a_process_that_is_killed(tmp_path: Path, python: Path) -> None:
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from luthier.rollout.vllm.devices import Share\n"
        "from luthier.rollout.vllm.servers import Place, Process\n"
        f"place = Place('127.0.0.1', 0, Share(), Path({str(tmp_path / 'log')!r}))\n"
        f"process = Process([{str(python)!r}, '-m', 'x', '--port', sys.argv[1]], place)\n"
        "print(process.number, flush=True)\n"
        "time.sleep(1000)\n"
    )
    port = servers._free_ports(1)[0]
    with subprocess.Popen([sys.executable, "-c", program, str(port)], stdout=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        pids = answer(f"http://127.0.0.1:{port}")["pids"]
        parent.kill()
    comes(lambda: not any(map(lives, pids)))


def test_a_log_says_why_or_how_it_ended() -> None:
    assert servers.causes("one\n\ntwo\n") == ["one", "two"]
    many = "".join(f"(Worker pid=1) ERROR 11-22 18:30:37 [a.py:1] KeyError: {number}\n" for number in range(9))
    assert servers.causes(f"said\n{many}\nafter") == [f"KeyError: {number}" for number in (0, 1, 2, 3, 7, 8)]


def test_a_program_that_is_missing_or_has_no_vllm_is_named(tmp_path: Path) -> None:
    keys = VllmConfig(model_name="m", vllm_python=str(tmp_path / "none"))
    with pytest.raises(UserError, match="no such program"):
        command.find_python(keys)
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')  # without any installed package
    bare.chmod(0o755)
    with pytest.raises(UserError, match=r"bare has no vLLM.*pip install vllm"):
        command.find_python(VllmConfig(model_name="m", vllm_python=str(bare)))


def test_an_address_that_is_taken_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="in use"):
        servers.check_port("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match=r"host=nowhere\.invalid"):
        servers.check_port("nowhere.invalid", 1)


def wanted(arguments: str = "", **settings: Any) -> Wanted:
    return Wanted(
        VllmConfig(model_name="m", vllm_python=sys.executable, vllm_arguments=arguments), "bfloat16", **settings
    )


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_check_installed", lambda path, name: None)


@pytest.mark.usefixtures("installed")
def test_gpus_of_a_server_split_the_model_unless_it_is_told_how() -> None:
    def split(arguments: str) -> list[str]:
        said = command.command(wanted(arguments), Path("model"), "h", 1, Share(("2", "3")))
        return [word for word in said if word in ("--tensor-parallel-size", "--kv-cache-memory-bytes")]

    assert split("") == ["--tensor-parallel-size"]
    assert split("-dp 2") == split("--pipeline-parallel-size=2") == []
    assert command.environment(Share(("2", "3")))["CUDA_VISIBLE_DEVICES"] == "2,3"


@pytest.mark.parametrize(("own", "theirs"), [("--xla_a=1 {}", "--xla_a=1"), ("{}", None), ("--xla_a=1", "--xla_a=1")])
def test_a_server_is_not_given_what_is_for_our_jaxlib(
    own: str, theirs: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLA_FLAGS", own.format(f"{runtime.HANDED_OVER}=-reduce"))
    monkeypatch.setenv("PYTHONPATH", "here")
    environment = command.environment(Share())
    assert environment.get("XLA_FLAGS") == theirs
    assert environment["PYTHONPATH"] == str(command.EXTENSION)


@pytest.mark.usefixtures("installed")
def test_what_luthier_says_itself_is_all_there() -> None:
    said = command.command(wanted(), Path("model"), "h", 1, Share())
    assert set(TAKEN) <= set(said)


@pytest.mark.usefixtures("installed")
def test_a_rank_is_given_the_room_that_vllm_has() -> None:
    with pytest.raises(UserError, match="lora_rank=600"):
        command.command(wanted(lora_rank=600), Path("model"), "h", 1, Share())


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [("", "bfloat16"), ("--dtype float32", "float32"), ("-x --dtype=float32 -y", "float32"), ("--dtype half", None)],
)
def test_weights_are_sent_in_the_type_that_servers_compute_in(arguments: str, kind: str | None) -> None:
    given = arguments.split()
    if kind is None:
        with pytest.raises(UserError, match="--dtype half"):
            command.dtype("bfloat16", given)
    else:
        assert command.dtype("bfloat16", given) == kind


def test_a_server_without_a_log_prints_where_we_do(
    python: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "fails").touch()
    process = Process([str(python), "-m", "x"], Place("127.0.0.1", 1, Share(), None))
    assert process.wait() == 3
    process.end()
    assert "no such attention" in capfd.readouterr().out
