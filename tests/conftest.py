"""What all tests share: eight simulated devices, no network, a compilation cache that outlives the run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before jax and huggingface_hub are imported anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

from luthier import runtime

runtime.have_sums_right()

import numpy as np
import pytest
from costs import COLLECTED, costs

from tiny import ROOT


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what `costs.txt` lists."""
    marks = costs()
    config.stash[COLLECTED] = {item.nodeid for item in items}
    for item in items:
        if mark := marks.get(item.nodeid):
            item.add_marker(mark)


@pytest.fixture(scope="module", autouse=True)
def _room_for_programs() -> Iterator[None]:
    """Let go of compiled programs before they are too many: each takes memory maps, of which Linux gives 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > 20_000:
        import jax

        jax.clear_caches()


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real datasets and checkpoints that some machines have beside the repository."""
    folder = Path(os.environ.get("TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set TEST_DATA to the folder that holds it")
    return folder


@pytest.fixture
def tpu_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler for TPUs (extra `plan`), which the environment of the slow tests has."""
    pytest.importorskip("libtpu")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is taken


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random tiny Llama and its tokenizer."""
    import tiny

    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    tiny.write_model(folder)
    return folder


@pytest.fixture(
    scope="session",
    params=["gemma3-text", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("qwen3-moe", "deepseek-v3"))],
)
def other_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random tiny model that is no Llama, and its tokenizer."""
    import tiny

    folder = tmp_path_factory.mktemp("model") / request.param
    tiny.write_model(folder, request.param)
    return folder


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of forty short conversations."""
    import json

    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    random = np.random.default_rng(0)
    with path.open("w") as file:
        for _ in range(40):
            a, b = random.integers(0, 100, 2).tolist()
            turns = [("user", f"What is {a} + {b}?"), ("assistant", f"{a} + {b} = {a + b}")]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    return path
