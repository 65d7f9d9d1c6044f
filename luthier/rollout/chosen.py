"""The engine that the keys of a command choose which samples and is done: the embedded one, or vLLM's servers.

Left out on purpose: training's way to the same engines (``train.rl_setup``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from luthier.checkpoint import peft
from luthier.checkpoint.source import Source, adapter_folder
from luthier.config import EvalConfig, GenerateConfig
from luthier.model import lora
from luthier.model.model import Model
from luthier.rollout.local import LocalEngine
from luthier.rollout.opened import Opened, open_engine
from luthier.rollout.vllm import adapters, devices, named, opening
from luthier.rollout.vllm.engine import VllmEngine
from luthier.rollout.vllm.opening import Side
from luthier.rollout.vllm.probe import Needed
from luthier.rollout.vllm.sending import Adapted, Send, Whole


class Chosen:
    """The way to an engine, step by step; a ``with`` ends what was begun.

    It is made before JAX has any devices, ``look`` is called when the prompts are known and before weights are read,
    and ``open`` when they are.
    """

    def __init__(self, keys: GenerateConfig | EvalConfig, say: Callable[[str], None]) -> None:
        """Look whether the engine can be had; ``say`` hears of what is waited for. Raises UserError where it cannot.

        ``keys`` are then those to open the model by: in the type that started servers compute in.
        """
        self.keys, self._say, self._stack = keys, say, contextlib.ExitStack()
        self._side: Side | None = None
        self._length: int | None = None
        if keys.rollout_engine == "vllm":
            self._shares = opening.claim(keys)
            if keys.dtype == "auto" and self._shares:
                self.keys = keys.model_copy(update={"dtype": devices.usual_dtype(self._shares[0])})

    def look(self, source: Source, words: Any, prompts: Sequence[Sequence[int]]) -> None:
        """Begin to start servers, which takes them a while, or look at those elsewhere.

        Raises UserError where they cannot serve these prompts.
        """
        keys = self.keys
        if keys.rollout_engine != "vllm":
            return
        limit = keys.max_target_length or source.context_length
        longest = max(map(len, prompts), default=1) + keys.max_new_tokens
        self._length = longest if limit is None else min(longest, limit)
        needed = Needed(self._length, self._lora_rank(source))
        self._side = opening.side(keys, source, words, self._shares, needed, computed=keys.dtype, say=self._say)
        self._stack.callback(self._side.servers.close)

    def open(self, opened: Opened) -> LocalEngine | VllmEngine:
        """Return the engine on a model whose weights are there. To be called with its mesh in use."""
        if self._side is None:
            return open_engine(self.keys, opened)
        engine = VllmEngine(
            self._side.servers,
            self._send(opened, self._side.dtype),
            opened.params,
            vocab_size=opened.model.config.vocab_size,
            tokenizer=opened.tokenizer,
            length=self._length,
            seed=self.keys.seed,
            timeout=self.keys.vllm_timeout,
            wait=self.keys.vllm_wait,
            say=self._say,
        )
        self._stack.callback(engine.close)
        return engine

    def _lora_rank(self, source: Source) -> int:
        """Return the rank that servers need room for. Raises UserError for an adapter that vLLM does not take."""
        if not self.keys.lora_path:
            return 0
        adapter = peft.read_config(adapter_folder(self.keys.lora_path, "lora_path", self.keys.hf_access_token))
        adapters.check(Model.from_hf(source.config, source.name).spec, adapter)
        return adapters.room(adapter) or 0

    def _send(self, opened: Opened, dtype: str) -> Send:
        tensors = named.full(opened.model.spec, dtype)
        if opened.attached is None:
            return Whole(tensors, timeout=self.keys.vllm_timeout)
        adapter, tree = opened.attached
        written = adapters.files(lora.spec(opened.model.spec, adapter), adapter, opened.source)
        return Adapted(tensors, lambda _: written(tree), timeout=self.keys.vllm_timeout)

    def __enter__(self) -> Chosen:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End the engine and the servers that were started."""
        self._stack.close()
