"""The keys of adapters and of quantised weights.

Left out on purpose: how an adapter is computed (``model.lora``), and which module names a model has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from luthier.config.groups import PositiveInt
from luthier.keys import Keys, key

Quantisation = Literal["", "int8", "int4", "nf4"]


class QuantisationKeys(Keys):
    """In how many bits weights are kept that are not trained."""

    quantization: Quantisation = key(
        "",
        "Keep the matrices of the layers in 8 bits (`int8`, a scale for each row) or in 4 (`int4`, `nf4`, a scale for "
        "64 weights), made so while they are read. Empty: as floats.",
        "lora.lora_weight_qtype",
    )


class LoraKeys(QuantisationKeys):
    """Adapters: small trained matrices beside weights that stay as they are."""

    enable_lora: bool = key(
        False,
        "Train an adapter (LoRA). Default: whether another of these keys is given.",
        "lora.enable_lora",
        "use_peft",
    )
    lora_rank: PositiveInt = key(16, "Rank of the adapter's matrices.", "lora_r", "lora.lora_rank")
    lora_alpha: Annotated[float, Field(gt=0)] = key(
        32.0, "What the adapter adds is multiplied by this over the rank.", "lora.lora_alpha"
    )
    lora_dropout: float = key(
        0.0, "Share of its inputs that an adapter goes without in a step of training.", "lora.lora_dropout", ge=0, lt=1
    )
    lora_target_modules: list[str] = key(
        ["all-linear"],
        "Modules to adapt: names such as `[q_proj, v_proj]`, a regular expression for whole names, or `all-linear`: "
        "all but embeddings, head and routers.",
        "lora_module_path",
        "lora.lora_module_path",
    )
    use_rslora: bool = key(False, "Divide by the root of the rank instead (rsLoRA).")
    use_dora: bool = key(False, "Train the size of each row of weights besides (DoRA).")
    lora_init: Literal["default", "pissa", "loftq"] = key(
        "default",
        "What an adapter begins as: nothing; the weights' largest singular vectors (`pissa`), which takes nothing away "
        "either; or what `quantization` took away (`loftq`).",
        "init_lora_weights",
    )
    lora_path: str = key(
        "",
        "Adapter to go on from, in PEFT's layout. It brings its own rank, alpha and modules.",
        "lora_restore_path",
        "lora.lora_restore_path",
    )

    @model_validator(mode="before")
    @classmethod
    def _enable(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Whoever sets an adapter's rank wants one. A run's ``config.yml`` has all keys, this one among them."""
        return {"enable_lora": any(name in values for name in _OWN), **values}


_OWN = tuple(name for name in LoraKeys.__annotations__ if name != "enable_lora")
_OF_ADAPTER = ("lora_rank", "lora_alpha", "lora_target_modules", "use_rslora", "use_dora", "lora_init")


def check_adapter(config: LoraKeys) -> None:
    """Raise ValueError for keys of adapters that do not go together."""

    def given(*names: str) -> str | None:
        changed = (name for name in names if getattr(config, name) != type(config).model_fields[name].default)
        return next(changed, None)

    if not config.enable_lora and config.quantization:
        raise ValueError(
            f"quantization={config.quantization}: quantised weights cannot be trained, but an adapter beside them can: "
            "set enable_lora=true"
        )
    if not config.enable_lora and (name := given(*_OWN)):
        raise ValueError(f"enable_lora=false and {name}={getattr(config, name)}: leave one out")
    if config.lora_path and (name := given(*_OF_ADAPTER)):
        raise ValueError(f"lora_path brings its own {name}: leave {name}={getattr(config, name)} out")
    if config.lora_init == "loftq" and not config.quantization:
        raise ValueError("lora_init=loftq makes up for what quantisation takes away: set quantization=nf4 besides")
    if config.lora_init == "pissa" and config.use_dora:
        raise ValueError("lora_init=pissa and use_dora=true are not combined: leave one out")
