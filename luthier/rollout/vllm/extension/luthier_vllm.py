"""What lets vLLM's workers take weights from a trainer: ``--worker-extension-cls luthier_vllm.Weights``.

vLLM's own Python runs this file, in which there is no Luthier: it imports the standard library, torch and vLLM alone.
The other end is ``luthier/rollout/vllm/stream.py``, where the conversation is described.

A worker never leaves a load half-way: vLLM would go on from there at the next one. What is wrong ends the stream early,
the load is brought to its end, and then the worker says so; the trainer uses the server no more until it is right.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
import mmap
import os
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Weights:
    """Mixed into vLLM's worker class, whose ``model_runner`` and ``reload_weights`` it uses."""

    def luthier_receive(self, order: str) -> dict[str, Any]:
        """Load all tensors that the trainer of ``order`` sends; return, and tell it, what became of them."""
        with _Trainer(json.loads(order)) as trainer:
            return trainer.told(lambda: _load(self, trainer))

    def luthier_receive_adapter(self, order: str) -> dict[str, Any]:
        """Write the files that the trainer of ``order`` sends and say where, and load them if vLLM has that adapter."""
        with _Trainer(json.loads(order)) as trainer:
            return trainer.told(lambda: _replace(self, trainer, _write(self, trainer)))

    def luthier_check_adapter(self, name: str, folder: str) -> dict[str, Any]:
        """Compare the adapter that vLLM serves as ``name`` with the files in ``folder``."""
        try:
            return _check_adapter(self, name, Path(folder))
        except Exception as error:  # whatever it is, the trainer has to know, and vLLM goes on
            return {"error": f"{type(error).__name__}: {error}"}


class Broken(Exception):
    """The stream is not what it should be."""


class _Trainer:
    """A connection to the trainer, which says what ``order`` holds: see ``stream.Order``."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._order, self._slots = order, None
        self.complaint = ""
        self._socket = socket.create_connection((order["host"], order["port"]), order["seconds"])
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> _Trainer:
        if self._order["slots"]:
            self._slots = _shared(self._order["slots"], self._order["token"].encode())
        own = {name: self._order[name] for name in ("token", "server")}
        self._say({**own, "shared": self._slots is not None})
        return self

    def __exit__(self, *error: Any) -> None:
        if self._slots is not None:
            self._slots.close()
        self._socket.close()

    @property
    def adapter(self) -> str:
        """The name of the adapter that is sent."""
        return self._order["adapter"]

    @property
    def folder(self) -> Path:
        """Where its files belong."""
        return Path(tempfile.gettempdir()) / self._order["folder"]

    def told(self, work: Any) -> dict[str, Any]:
        """Return what ``work`` returns, or what went wrong, and tell the trainer."""
        try:
            said = work()
        except Exception as error:  # whatever it is, the trainer has to know, and vLLM goes on
            said = {"error": f"{type(error).__name__}: {error}"}
        if self.complaint:
            said = {"error": self.complaint}
        try:
            self._say(said)
            while "error" in said and self._socket.recv(1 << 16):
                pass  # a connection that is closed before all was read would take what was said with it
        except OSError:
            if "error" not in said:
                raise
        return said

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor on the CPU) until the end, or until something is wrong: then there is a ``complaint``."""
        names: list[str] = []
        try:
            while "end" not in (head := self._hear()):
                yield head["name"], self._tensor(head)
                names.append(head["name"])
            if names != head["end"]:
                lost = sorted(set(head["end"]) - set(names)) or ["some"]
                raise Broken(f"{len(head['end'])} tensors were sent and {len(names)} arrived; {lost[0]} did not")
        except (OSError, ValueError, KeyError, Broken) as error:
            after = f" after {names[-1]}" if names else ""
            self.complaint = str(error) if isinstance(error, Broken) else f"the stream broke off{after}: {error!r}"

    def _tensor(self, head: dict[str, Any]) -> torch.Tensor:
        """Take one tensor's bytes. They are a copy: vLLM keeps tensors until their layer is whole."""
        dtype = getattr(torch, head["dtype"])
        raw = torch.empty(head["bytes"], dtype=torch.uint8)
        room, done, crc = raw.numpy().data, 0, 0
        while done < len(room):
            size = min(self._order["slot_bytes"], len(room) - done)
            part = room[done : done + size]
            self._part(part)
            crc, done = zlib.crc32(part, crc), done + size
        if self._hear()["crc"] != crc:
            raise Broken(f"{head['name']} did not arrive as it was sent: its checksum differs")
        return raw.view(dtype).reshape(head["shape"])

    def _part(self, part: memoryview) -> None:
        if self._slots is None:
            self._fill(part)
            return
        slot = self._hear()["slot"]
        start = self._order["slots_start"] + slot * self._order["slot_bytes"]
        part[:] = memoryview(self._slots)[start : start + len(part)]
        self._say({"taken": slot})

    def _say(self, message: dict[str, Any]) -> None:
        text = json.dumps(message).encode()
        self._socket.sendall(len(text).to_bytes(4, "big") + text)

    def _hear(self) -> dict[str, Any]:
        length = bytearray(4)
        self._fill(memoryview(length))
        text = bytearray(int.from_bytes(length, "big"))
        self._fill(memoryview(text))
        return json.loads(text)

    def _fill(self, room: memoryview) -> None:
        done = 0
        while done < len(room):
            count = self._socket.recv_into(room[done:])
            if not count:
                raise ConnectionError("the trainer closed the connection")
            done += count


def _shared(path: str, token: bytes) -> mmap.mmap | None:
    """Return the trainer's shared memory, None where this is another host (or another view of it)."""
    try:
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError:
        return None
    if memory[: len(token)] == token:
        return memory
    memory.close()
    return None


def _load(worker: Any, trainer: _Trainer) -> dict[str, Any]:
    """Load what comes, and read back what vLLM holds in a form that can be told."""
    model = worker.model_runner.model
    proof, tied = _Proof(model), _tied(model)
    loaded, short = [0], []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in trainer.tensors():
            proof.saw(name, tensor)
            loaded[0] += 1
            yield name, tensor
        if not trainer.complaint:
            short.extend(name for name in _unfilled(model) if name not in tied)

    with torch.no_grad():
        try:
            worker.reload_weights(weights_iterator=tensors(), is_checkpoint_format=True)
        except Exception:
            worker.reload_weights(weights_iterator=iter(()), is_checkpoint_format=True)
            raise
        for module in tied.values():
            # On a CPU vLLM computes with packed copies, and renews those of modules alone that something was sent for.
            if getattr(module, "quant_method", None) is not None:
                module.quant_method.process_weights_after_loading(module)
    if short:
        raise Broken(f"vLLM's model has weights that were not sent: {', '.join(short[:5])}")
    return {"loaded": loaded[0], "compared": 0 if trainer.complaint else proof.check(model)}


def _tied(model: Any) -> dict[str, Any]:
    """Return {name: module} of those whose weight is another module's, as a tied head's is."""
    first: dict[int, Any] = {}
    own = {name: dict(module.named_parameters(recurse=False)) for name, module in model.named_modules()}
    modules = {name: module for name, module in model.named_modules() if "weight" in own[name]}
    return {
        name: module
        for name, module in modules.items()
        if first.setdefault(id(own[name]["weight"]), module) is not module
    }


class _Proof:
    """Checks that the model holds what was sent, where its parameters are what tensors were, or several of them.

    The sum of the values' bits as integers does not depend on their order, so that it stays what it is in a fused or
    repacked weight; parameters that have another size (quantised, or split over workers) are left out.
    """

    def __init__(self, model: Any) -> None:
        parameters = _parameters(model)
        self._sizes = {name: each.numel() for name, each in parameters.items()}
        self._types = {name: each.dtype for name, each in parameters.items()}
        self._home: dict[str, str] = {}
        for name in parameters:
            for part in _parts(model, name):
                self._home[part] = name
        self._renamed = getattr(model, "hf_to_vllm_mapper", None)
        self._seen: dict[str, list[int]] = {}
        self._of: dict[str, str] = {}

    def saw(self, name: str, tensor: torch.Tensor) -> None:
        """Note a tensor on its way into the model."""
        mapped = self._renamed.apply_list([name]) if self._renamed is not None else [name]
        home = self._home.get(mapped[0]) if mapped else None
        if home is None or tensor.numel() > self._sizes[home]:
            return
        sums = self._seen.setdefault(home, [0, 0])
        sums[0] += tensor.numel()
        sums[1] += _sum_of_bits(tensor.to(self._types[home]))
        self._of[home] = name

    def check(self, model: Any) -> int:
        """Return how many parameters are right. Raises Broken for the first one that is not."""
        parameters, compared = _parameters(model), 0
        for home, (size, bits) in self._seen.items():
            if size != self._sizes[home] or parameters[home].numel() != size:
                continue
            if (_sum_of_bits(parameters[home].detach()) - bits) % 2**64:
                raise Broken(f"{self._of[home]} was sent, and the model's {home} is something else")
            compared += 1
        if not compared:
            raise Broken("none of the model's weights can be compared with what was sent, so nothing is proven")
        return compared


def _parameters(model: Any) -> dict[str, Any]:
    """Return the model's parameters by the names that they have without adapters."""
    return {name.replace(".base_layer.", "."): each for name, each in model.named_parameters()}


def _parts(model: Any, name: str) -> list[str]:
    """Return the names of what is fused in a parameter: ``qkv_proj`` holds three; most hold themselves."""
    fused = getattr(model, "packed_modules_mapping", None) or {}
    owner, _, kind = name.rpartition(".")
    lead, _, module = owner.rpartition(".")
    return [".".join(filter(None, (lead, part, kind))) for part in fused.get(module, [module])]


def _sum_of_bits(tensor: torch.Tensor) -> int:
    whole = tensor.contiguous().reshape(-1).view(_INTEGERS[tensor.element_size()])
    return int(whole.sum(dtype=torch.int64))


def _unfilled(model: Any) -> list[str]:
    """Return the modules that have not been sent all their weights, before vLLM ends the load.

    It keeps a record of that itself, and says no more than a warning of it. What sees or hears in a model of several
    kinds of input is no part of what is trained: nothing is sent for it, and it stays as it is.
    """
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    lacking, begun = [], set()
    for name, module in model.named_modules():
        info = get_layerwise_info(module)
        own = sum(getattr(each, "weight_loader_numel", each.numel()) for each in module.parameters(recurse=False))
        padding = getattr(module, "num_embeddings_padded", 0) - getattr(module, "org_vocab_size", 0)
        if not info.can_load() or info.load_numel:
            begun.add(name.partition(".")[0])
        if info.can_load() and info.load_numel < own - padding * getattr(module, "embedding_dim", 0):
            lacking.append(name)
    if getattr(model, "supports_multimodal", False):
        return [name for name in lacking if name.partition(".")[0] in begun]
    return lacking


def _write(worker: Any, trainer: _Trainer) -> Path:
    """Write files that came as tensors of bytes, and note what they come to."""
    folder = trainer.folder
    own = folder.with_name(f"{folder.name}.{os.getpid()}")
    own.mkdir(mode=0o700)
    try:
        for name, tensor in trainer.tensors():
            (own / name).write_bytes(tensor.numpy().tobytes())
        if trainer.complaint:
            raise Broken(trainer.complaint)
        worker.luthier_sums = _sums_of_files(own, _layers(worker))
        folder.mkdir(mode=0o700, exist_ok=True)  # other workers of this host write the same
        for file in own.iterdir():
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(own)
    return folder


def _replace(worker: Any, trainer: _Trainer, folder: Path) -> dict[str, Any]:
    """Load a newer adapter under the number that vLLM knows it by.

    vLLM's own request for that (``load_inplace``) stays with the name, and has each step of the model read the files
    anew; so it is asked by that way no more than once, to hear the number (``_check_adapter``).
    """
    from vllm.lora.request import LoRARequest

    known = getattr(worker, "luthier_adapters", {})
    number = known.get(trainer.adapter)
    if number in worker.list_loras():
        request = LoRARequest(trainer.adapter, number, str(folder), load_inplace=True)
        if not worker.add_lora(request):
            raise Broken(f"vLLM did not take the adapter {trainer.adapter}")
        return {"folder": str(folder), "replaced": True}
    worker.luthier_before = worker.list_loras()
    return {"folder": str(folder), "replaced": False}


def _check_adapter(worker: Any, name: str, folder: Path) -> dict[str, Any]:
    """Compare the sums of all values' bits: those of the files, and those of each adapter that layers hold.

    The files are taken away then: what is loaded is not read again.
    """
    shutil.rmtree(folder, ignore_errors=True)  # another worker may have done it
    known = worker.luthier_adapters = getattr(worker, "luthier_adapters", {})
    if known.get(name) not in worker.list_loras():
        (known[name],) = worker.list_loras() - worker.luthier_before
    if worker.parallel_config.world_size > 1:
        return {"compared": 0}  # each worker holds a part
    layers = _layers(worker)
    if worker.luthier_sums not in _sums_of_layers(layers):
        raise Broken(f"the adapter {name} was sent, and vLLM has loaded something else")
    return {"compared": len(layers)}


def _layers(worker: Any) -> list[Any]:
    found = [each for each in worker.model_runner.model.modules() if isinstance(_stacked(each, "a"), tuple)]
    if not found:
        raise Broken("the server has no room for an adapter: it was started without --enable-lora")
    return found


def _stacked(layer: Any, which: str) -> Any:
    return getattr(layer, f"lora_{which}_stacked", None)


def _sums_of_files(folder: Path, layers: list[Any]) -> list[int]:
    """Return what an adapter's A and B come to in layers, where B has the scale in it."""
    from safetensors.torch import load_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    dtype, sums = _stacked(layers[0], "a")[0].dtype, [0, 0]
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        is_b = ".lora_B." in name
        sums[is_b] += _sum_of_bits(tensor.to(dtype).mul(scale) if is_b else tensor.to(dtype))
    return [each % 2**64 for each in sums]


def _sums_of_layers(layers: list[Any]) -> list[list[int]]:
    """Return the sums of A and of B for each place that layers have for an adapter."""
    places = len(_stacked(layers[0], "a")[0])
    found = [[0, 0] for _ in range(places)]
    for layer in layers:
        for which, kind in enumerate("ab"):
            for stacked in _stacked(layer, kind):
                for place in range(places):
                    found[place][which] += _sum_of_bits(stacked[place])
    return [[each % 2**64 for each in sums] for sums in found]
