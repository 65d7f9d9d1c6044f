"""The keys of vLLM as the engine, and those of `luthier vllm`, which runs one of its servers.

Left out on purpose: vLLM's own settings, which ``vllm_arguments`` hands on as they are.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from luthier.config.groups import CapacityKeys, EngineKeys, PositiveInt, SourceKeys, check_model
from luthier.keys import Keys, key

TAKEN = (
    *("--model", "--served-model-name", "--host", "--port", "--load-format", "--worker-extension-cls"),
    *("--logprobs-mode", "--generation-config"),
)
"""Arguments of a server without which it would not take weights, or say another log-prob than the one it draws by."""
COLDEST = 0.01
"""The lowest temperature that vLLM samples at; it takes lower ones but 0 for this one."""


class ServerKeys(Keys):
    """How a vLLM server is run."""

    vllm_python: str = key(
        "", "Python of the environment that vLLM is installed in, best one of its own. Default: this one."
    )
    vllm_arguments: str = key("", "Further arguments of vLLM's server, such as `--gpu-memory-utilization 0.8`.")

    @model_validator(mode="after")
    def _check_arguments(self) -> Self:
        try:
            given = {word.partition("=")[0] for word in arguments(self)}
        except ValueError as error:
            raise ValueError(f"vllm_arguments={self.vllm_arguments}: {str(error).lower()}") from None
        if taken := sorted(given.intersection(TAKEN)):
            raise ValueError(f"vllm_arguments: {taken[0]} is what Luthier says itself. Leave it out")
        return self


class VllmKeys(ServerKeys):
    """Which engine samples: the embedded one, or vLLM in processes of its own."""

    rollout_engine: Literal["local", "vllm"] = key("local", "What samples: the embedded engine, or vLLM's servers.")
    vllm_urls: list[Annotated[str, Field(min_length=1)]] = key(
        [], "Servers that run elsewhere (`luthier vllm` runs one), such as `[http://10.0.0.2:8000]`. Empty: here."
    )
    vllm_servers: PositiveInt = key(1, "Servers to start here, each on its part of the devices that sample.")
    vllm_timeout: float = key(600.0, "Seconds that a server may take over a completion, or over new weights.", gt=0)
    vllm_wait: float = key(
        600.0, "Seconds that servers are waited for, when they start and when one has to come back.", gt=0
    )

    @property
    def starts_servers(self) -> bool:
        """Whether vLLM's servers are started here."""
        return self.rollout_engine == "vllm" and not self.vllm_urls


class VllmConfig(CapacityKeys, ServerKeys, SourceKeys):
    """The keys of `luthier vllm`."""

    host: str = key(
        "127.0.0.1",
        "Address to listen on. Trainers elsewhere need one that they reach, in a network where nobody else does: "
        "whoever reaches it can change the weights.",
        min_length=1,
    )
    port: int = key(8000, "Port to listen on.", gt=0, le=65535)
    dtype: Literal["auto", "bfloat16", "float32"] = key(
        "auto", "Type of the computation: the trainers'; `auto`: bfloat16 on a GPU, else float32."
    )
    lora_rank: int = key(0, "Greatest rank of adapters that trainers send; 0: they send whole weights alone.", ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_model(self)
        return self


def arguments(config: ServerKeys) -> list[str]:
    """Return ``vllm_arguments`` one by one. Raises ValueError where a quotation does not end."""
    return shlex.split(config.vllm_arguments)


def check_engine(config: VllmKeys, *computing: str) -> None:
    """Raise ValueError for keys of engines that do not go together.

    ``computing`` are further keys that are of no account where the embedded engine does not sample.
    """
    if config.rollout_engine == "local":
        if name := _given(config, (*ServerKeys.__annotations__, *VllmKeys.__annotations__)):
            raise ValueError(
                f"{name}={getattr(config, name)} is for rollout_engine=vllm: set that too, or leave it out"
            )
        return
    for url in config.vllm_urls:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ValueError(f"vllm_urls={url}: give each as http://HOST:PORT")
    if len(set(config.vllm_urls)) < len(config.vllm_urls):
        raise ValueError(f"vllm_urls={config.vllm_urls}: one of them stands twice")
    if config.vllm_urls and (name := _given(config, _OF_SERVERS)):
        raise ValueError(
            f"{name}={getattr(config, name)} is for servers that are started here, and vllm_urls names others: leave "
            "one of the two out"
        )
    if name := _given(config, (*EngineKeys.__annotations__, *computing)):
        raise ValueError(
            f"{name}={getattr(config, name)} is the embedded engine's, with rollout_engine=vllm: leave one of the two "
            "out"
        )


_OF_SERVERS = ("vllm_servers", *ServerKeys.__annotations__, "max_num_seqs", "kv_cache_gib")


def _given(config: Keys, names: Iterable[str]) -> str | None:
    fields = type(config).model_fields
    return next((name for name in names if name in fields and getattr(config, name) != fields[name].default), None)
