"""vLLM's workers without vLLM: a small torch model, loaded the way that vLLM loads, and servers that have such."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import socket
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from luthier.rollout.vllm.client import Failure
from tiny import ROOT

torch = pytest.importorskip("torch", reason="vLLM's worker needs torch")


def _extension() -> Any:
    """Return the file that vLLM's Python runs."""
    path = ROOT / "luthier/rollout/vllm/extension/luthier_vllm.py"
    spec = importlib.util.spec_from_file_location("luthier_vllm", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXTENSION = _extension()


class Layer(torch.nn.Module):
    """A norm, and a fused matrix of what checkpoints have as three."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(width)
        self.qkv_proj = torch.nn.Linear(width, 3 * width, bias=False)
        self.lora_a_stacked = (torch.zeros(1, 1, 2, width),)
        self.lora_b_stacked = (torch.zeros(1, 1, 3 * width, 2),)


class Model(torch.nn.Module):
    """Two layers and an embedding, which the head is tied to."""

    packed_modules_mapping: ClassVar = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}

    def __init__(self, width: int = 8, dtype: Any = None) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(32, width)
        self.layers = torch.nn.ModuleList(Layer(width) for _ in range(2))
        self.head = torch.nn.Linear(width, 32, bias=False)
        self.head.weight = self.embed.weight
        self.head.quant_method = SimpleNamespace(process_weights_after_loading=self.pack)
        self.packed = torch.zeros(0)
        self.to(dtype or torch.float32)

    def pack(self, head: Any) -> None:
        """Keep a copy of the head, as vLLM does on a CPU."""
        self.packed = head.weight.detach().clone()

    def place(self, name: str) -> tuple[Any, Any]:
        """Return the module that a checkpoint's tensor belongs to, and where in its weight."""
        owner, _, part = name.removesuffix(".weight").rpartition(".")
        if part in ("q_proj", "k_proj", "v_proj"):
            module = self.get_submodule(f"{owner}.qkv_proj")
            third = len(module.weight) // 3
            start = "qkv".index(part[0]) * third
            return module, module.weight[start : start + third]
        module = self.get_submodule(name.removesuffix(".weight"))
        return module, module.weight


class Worker(EXTENSION.Weights):
    """What the extension finds in vLLM's worker. ``forgets`` is a tensor that the loader takes and does not load."""

    def __init__(self, model: Any = None, forgets: str = "") -> None:
        self.model_runner = SimpleNamespace(model=model or Model())
        self.parallel_config = SimpleNamespace(world_size=1)
        self.forgets, self.begun = forgets, False
        self.loaded, self.adapters = {}, {}

    def reload_weights(self, weights_iterator: Any, is_checkpoint_format: bool) -> None:
        """Load as vLLM does: what it is sent for each module is counted until the end, which an error keeps away."""
        assert is_checkpoint_format
        if not self.begun:
            self.loaded.clear()
        self.begun = True
        for name, tensor in weights_iterator:
            module, place = self.model_runner.model.place(name)  # raises for a name that it does not know
            self.loaded[module] = self.loaded.get(module, 0) + tensor.numel()
            if name != self.forgets:
                place.copy_(tensor)
        self.begun = False

    def list_loras(self) -> set[int]:
        """Return the numbers of the adapters."""
        return set(self.adapters)

    def add_lora(self, request: Any) -> bool:
        """Load an adapter."""
        from safetensors.torch import load_file

        self.adapters[request.number] = load_file(f"{request.folder}/adapter_model.safetensors")
        layer = self.model_runner.model.layers[0]
        layer.lora_a_stacked = (self.adapters[request.number]["layers.0.lora_A.weight"][None, None],)
        layer.lora_b_stacked = (self.adapters[request.number]["layers.0.lora_B.weight"][None, None] * 2,)
        return True


def install(monkeypatch: Any, workers: list[Worker]) -> None:
    """Put the parts of vLLM in place that the extension asks for."""

    def info(module: Any) -> Any:
        count = next((worker.loaded[module] for worker in workers if module in worker.loaded), 0)
        return SimpleNamespace(can_load=lambda: True, load_numel=count)

    def request(name: str, number: int, folder: str, load_inplace: bool = False) -> Any:
        return SimpleNamespace(number=number, folder=folder)

    parts = {
        "vllm.model_executor.model_loader.reload.layerwise": {"get_layerwise_info": info},
        "vllm.lora.request": {"LoRARequest": request},
    }
    for name, content in parts.items():
        path = name.split(".")
        for depth in range(1, len(path) + 1):
            monkeypatch.setitem(sys.modules, ".".join(path[:depth]), ModuleType(".".join(path[:depth])))
        for attribute, value in content.items():
            setattr(sys.modules[name], attribute, value)


class Server:
    """A client of a server whose workers are in this process; ``said`` is what it was asked, in order.

    ``breaks`` has one of the workers' methods not end ("hangs"), end at once ("refuses"), or the server forget the
    version that it was told ("forgets").
    """

    def __init__(self, workers: list[Worker], breaks: str = "") -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self.workers, self.breaks, self.said, self.named = workers, breaks, [], "default"
        self._let_go = threading.Event()

    async def facts(self) -> Any:
        return SimpleNamespace(world_size=len(self.workers))

    async def pause(self, mode: str) -> None:
        self.said.append(f"pause {mode}")

    async def resume(self) -> None:
        self.said.append("resume")

    async def reset_prefix_cache(self) -> None:
        self.said.append("reset")

    async def set_version(self, version: int) -> None:
        self.said.append(f"version {version}")
        self.named = self.named if self.breaks == "forgets" else str(version)

    async def version(self) -> str:
        return self.named

    async def rpc(self, method: str, *arguments: str, timeout: float | None = None) -> list[Any]:
        self.said.append(method)
        if self.breaks == "refuses":
            raise Failure(self.url, "it has no such method", "refused")
        if self.breaks == "hangs":
            order = json.loads(arguments[0])
            with socket.create_connection((order["host"], order["port"])) as trainer:
                trainer.sendall(_hello(order))
                await asyncio.to_thread(self._let_go.wait, 20)
        calls = (asyncio.to_thread(getattr(worker, method), *arguments) for worker in self.workers)
        return list(await asyncio.gather(*calls))

    async def load_adapter(self, name: str, folder: str) -> None:
        self.said.append(f"load {name}")
        for worker in self.workers:
            worker.add_lora(SimpleNamespace(number=len(worker.adapters) + 1, folder=folder))

    def end(self) -> None:
        self._let_go.set()
        self._listening.close()


def _hello(order: dict[str, Any]) -> bytes:
    text = json.dumps({"token": order["token"], "server": order["server"], "shared": False}).encode()
    return len(text).to_bytes(4, "big") + text
