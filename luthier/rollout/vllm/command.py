"""The command and the environment of a vLLM server that takes a trainer's weights.

It starts from a folder without weights, since the engine sends all of them before it asks for anything. Left out on
purpose: processes (``servers``), and which devices a server has (``devices``).
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from luthier import runtime
from luthier.checkpoint import huggingface, tokenizer
from luthier.checkpoint.source import Source
from luthier.config.vllm import ServerKeys, arguments
from luthier.errors import UserError
from luthier.memory import GIB
from luthier.rollout import checks
from luthier.rollout.vllm.adapters import RANKS
from luthier.rollout.vllm.devices import Share

EXTENSION = Path(__file__).parent / "extension"
"""All that a server's Python sees of Luthier."""
WORKER = "luthier_vllm.Weights"
LOGPROBS = "processed_logprobs"
"""Log-probs of tokens after temperature and filters, as they were drawn."""
TYPES = ("float32", "bfloat16")
"""The types that weights are sent in, which are those that servers compute in."""
NAME = "luthier"
"""What a server calls the model."""
CACHE_BYTES = 4 * GIB
"""Keys and values of a server on a CPU, where nothing says otherwise and that much is free."""

_LOOK = """
import importlib.util, sys
sys.exit(0 if importlib.util.find_spec("vllm") else 3)
"""
_LOOK_SECONDS = 60
_SPLITS = ("-tp", "--tensor-parallel-size", "-pp", "--pipeline-parallel-size", "-dp", "--data-parallel-size")


@dataclass(frozen=True)
class Wanted:
    """What servers are to be: ``length`` is the most tokens of prompt and completion, None for what the model has.

    ``dtype`` is float32 or bfloat16, ``lora_rank`` the rank of the adapter that they are sent, 0 for none.
    """

    keys: ServerKeys
    dtype: str
    length: int | None = None
    lora_rank: int = 0
    max_num_seqs: int = 0
    kv_cache_gib: float | None = None

    @property
    def python(self) -> str:
        """The Python that runs them."""
        return find_python(self.keys)


def find_python(keys: ServerKeys) -> str:
    """Return the Python that vLLM is installed in. Raises UserError where it is not."""
    asked = keys.vllm_python or sys.executable
    path = shutil.which(str(Path(asked).expanduser()) if "/" in asked else asked)
    if path is None:
        raise UserError(f"vllm_python={asked}: no such program. Give the Python of an environment with vLLM.")
    _check_installed(path, f"vllm_python={asked}" if keys.vllm_python else f"{asked}, which runs this,")
    return path


@functools.cache
def _check_installed(path: str, name: str) -> None:
    looked = subprocess.run(
        [path, "-c", _LOOK], capture_output=True, text=True, timeout=_LOOK_SECONDS, env=_inherited(), check=False
    )
    if looked.returncode == 0:
        return
    said = "" if looked.returncode == 3 else f" ({(looked.stderr.strip().splitlines() or ['it says nothing'])[-1]})"
    raise UserError(
        f"{name} has no vLLM{said}. Install it into an environment of its own (python3 -m venv vllm && vllm/bin/pip "
        "install vllm) and set vllm_python=vllm/bin/python."
    )


def dtype(wanted: str, given: Sequence[str]) -> str:
    """Return the type that a server computes in: the one that its further arguments name, else what is ``wanted``."""
    for number, word in enumerate(given):
        name, _, found = word.partition("=")
        if name == "--dtype":
            found = found or "".join(given[number + 1 : number + 2])
            if found not in TYPES:
                raise UserError(f"vllm_arguments: --dtype {found}: weights are sent as {' or '.join(TYPES)}. Give one.")
            return found
    return wanted


def folder(place: Path, source: Source, words: Any, kind: str) -> Path:
    """Write what a server reads of a model, all but the weights, to ``place`` and return it."""
    huggingface.write(place, {}, source, functools.partial(tokenizer.save, words), dtype=kind)
    (place / "model.safetensors").unlink()  # of no tensors
    return place


def command(wanted: Wanted, model: Path, host: str, port: int, share: Share) -> list[str]:
    """Return the command that runs a server of what is in the folder ``model``."""
    given = arguments(wanted.keys)
    options: dict[str, Any] = {
        "--model": model,
        "--served-model-name": NAME,
        "--host": host,
        "--port": port,
        "--dtype": wanted.dtype,
        "--load-format": "dummy",
        "--worker-extension-cls": WORKER,
        "--logprobs-mode": LOGPROBS,
        "--generation-config": "vllm",
        "--max-logprobs": checks.MOST_ALTERNATIVES + 1,  # the token drawn is asked for beside them
    }
    options |= {"--max-model-len": wanted.length} if wanted.length else {}
    options |= {"--max-num-seqs": wanted.max_num_seqs} if wanted.max_num_seqs else {}
    options |= {"--max-loras": 1, "--max-lora-rank": _room(wanted.lora_rank)} if wanted.lora_rank else {}
    if (size := _cache_bytes(wanted, share)) and "--kv-cache-memory-bytes" not in given:
        options["--kv-cache-memory-bytes"] = size
    if len(share.gpus) > 1 and not any(each.partition("=")[0] in _SPLITS for each in given):
        options["--tensor-parallel-size"] = len(share.gpus)
    switches = ["--enable-scale-out", "--disable-uvicorn-access-log", *(["--enable-lora"] if wanted.lora_rank else [])]
    if not share.gpus and "--enable-chunked-prefill" not in given:
        # vLLM takes back a draw for each further piece of a prompt, which a CPU's generator cannot: it would end.
        switches.append("--no-enable-chunked-prefill")
    said = [str(word) for option in options.items() for word in option]
    # By its module: the program `vllm` of the package for CPUs does not start.
    return [wanted.python, "-m", "vllm.entrypoints.openai.api_server", *said, *switches, *given]


def environment(share: Share) -> dict[str, str]:
    """Return the environment of a server with this share of the devices."""
    own = {
        "PYTHONPATH": str(EXTENSION),
        "VLLM_SERVER_DEV_MODE": "1",  # new weights, and stopping for them, are among what this turns on
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    usual = {name: value for name, value in share.environment.items() if share.gpus or name not in os.environ}
    return _inherited() | own | usual


def _inherited() -> dict[str, str]:
    """Return this process's environment without what is for its Python alone.

    That is where packages are, and a flag that another jaxlib does not know and would end for.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "XLA_FLAGS")}
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith(runtime.HANDED_OVER)]
    return kept | ({"XLA_FLAGS": " ".join(flags)} if flags else {})


def _room(rank: int) -> int:
    """Return the rank that a server makes room for. Raises UserError where it is too great for any."""
    for room in RANKS:
        if rank <= room:
            return room
    raise UserError(f"lora_rank={rank}: vLLM takes adapters of ranks up to {RANKS[-1]}. Lower it.")


def _cache_bytes(wanted: Wanted, share: Share) -> int | None:
    """Return the bytes of a server's cache, None where vLLM is to take what is left of a GPU."""
    if wanted.kv_cache_gib is not None:
        return int(wanted.kv_cache_gib * GIB)
    if share.gpus or "VLLM_CPU_KVCACHE_SPACE" in os.environ:
        return None
    return min(CACHE_BYTES, psutil.virtual_memory().available // 8)  # vLLM would take nearly all memory
