"""The keys of `luthier convert`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from luthier.config.groups import SourceKeys, check_model
from luthier.keys import key


class ConvertConfig(SourceKeys):
    """The keys of `luthier convert`."""

    lora_path: str = key("", "Adapter to merge into the model first, in PEFT's layout (a folder, hub id or run).")
    output_path: str = key("", "What to write: a new folder, or a new file that ends in `.gguf`.")
    output_format: Literal["auto", "huggingface", "gguf", "maxtext"] = key(
        "auto", "Layout to write; `auto`: `gguf` where `output_path` ends in `.gguf`, else `huggingface`."
    )
    scan_layers: bool = key(True, "In MaxText's layout, one array of all layers; false: an array for each.")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = key(
        "auto", "Type of the weights of a folder; `auto`: each in the type that it has."
    )
    gguf_type: Literal["auto", "f32", "f16", "bf16", "q8_0"] = key(
        "auto", "Type of the matrices of a GGUF file; `auto`: the type that most of the weights have."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_model(self)
        if self.load_parameters_path == "random":
            raise ValueError("load_parameters_path=random: there is nothing to convert")
        if not self.output_path:
            raise ValueError("no output: set output_path=... (a new folder, or a new file that ends in .gguf)")
        if self.gguf_type != "auto" and self.format != "gguf":
            raise ValueError(f"gguf_type={self.gguf_type} is for a .gguf file: name one as output_path, or set dtype")
        if self.dtype != "auto" and self.format == "gguf":
            raise ValueError(f"dtype={self.dtype} is for a folder: set gguf_type for a .gguf file")
        if not self.scan_layers and self.format != "maxtext":
            raise ValueError("scan_layers=false is for MaxText's layout: set output_format=maxtext")
        return self

    @property
    def format(self) -> Literal["huggingface", "gguf", "maxtext"]:
        """The layout to write."""
        if self.output_format != "auto":
            return self.output_format
        return "gguf" if self.output_path.endswith(".gguf") else "huggingface"
