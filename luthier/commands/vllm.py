"""`luthier vllm`: a vLLM server for trainers elsewhere, as `luthier rl` starts those of its own.

It starts without weights: the first trainer that comes sends them. One that fails is started again, and is then sent
them again. Left out on purpose: serving a model to people (`luthier serve`), and several servers in one command.
"""

from __future__ import annotations

import signal
import sys
import tempfile
from collections import deque
from pathlib import Path

import jax

from luthier.checkpoint import source as source_lib
from luthier.checkpoint import tokenizer
from luthier.config import VllmConfig
from luthier.config.vllm import arguments
from luthier.errors import RunError
from luthier.rollout.vllm import command, devices, servers
from luthier.rollout.vllm.command import Wanted


def run(config: VllmConfig) -> None:
    """Run a server until a signal comes. Raises SystemExit with 143 after SIGTERM.

    Raises UserError for what the user can mend, RunError where the server fails again and again.
    """
    jax.config.update("jax_platforms", "cpu")  # the devices are the server's
    servers.check_port(config.host, config.port)
    share = devices.whole()
    wanted = Wanted(
        config,
        command.dtype(config.dtype if config.dtype != "auto" else devices.usual_dtype(share), arguments(config)),
        length=config.max_target_length or None,
        lora_rank=config.lora_rank,
        max_num_seqs=config.max_num_seqs,
        kv_cache_gib=config.kv_cache_gib,
    )
    command.find_python(config)
    source = source_lib.resolve(config)
    words = tokenizer.load(source, config.tokenizer_path, config.hf_access_token)
    with tempfile.TemporaryDirectory(prefix="luthier-vllm-") as room:
        model = command.folder(Path(room) / "model", source, words, wanted.dtype)
        place = servers.Place(config.host, config.port, share, log=None)
        _keep(command.command(wanted, model, config.host, config.port, share), place)


def _keep(words: list[str], place: servers.Place) -> None:
    """Keep a server running."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    restarts: deque[float] = deque()
    while True:
        process = servers.Process(words, place)
        print(f"vLLM starts at {place.url} (process {process.number}).", flush=True)
        try:
            code = process.wait()
        finally:
            process.terminate()
            process.end(servers.PATIENCE)
        if not servers.may_restart(restarts):
            raise RunError(f"vLLM's server ended {servers.how(code)}, too often to start it again; see above.")
        print(f"luthier vllm: the server ended {servers.how(code)}, and is started again.", file=sys.stderr, flush=True)
