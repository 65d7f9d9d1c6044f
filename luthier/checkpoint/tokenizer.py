"""A model's tokenizer, from its folder, the hub or its GGUF file, and back to a folder.

Transformers is imported when a tokenizer is asked for, and never torch. Left out on purpose: rendering conversations
(``data.chat``).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from luthier.checkpoint import gguf_tokenizer, hub
from luthier.checkpoint.source import Source
from luthier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = "chat_template.jinja"
CONFIG = "tokenizer_config.json"


def load(source: Source, tokenizer_path: str = "", token: str | None = None) -> PreTrainedTokenizerFast:
    """Return the tokenizer at ``tokenizer_path`` (folder, hub id or ``.gguf``), by default the model's own.

    Of a model with an adapter that is the adapter's, where it brought one.

    A tokenizer.json is taken as it stands, by the class that adds nothing to it: the class that a config names may
    rebuild the cutting rules from its own defaults. Raises UserError where there is none, or it cannot be read.
    """
    path = _path(source, tokenizer_path, token)
    if path.suffix == ".gguf":
        return gguf_tokenizer.build(path)
    # Without torch, Transformers says so on stderr at import; for its tokenizers that means nothing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if (path / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast as Reader
    elif any((path / name).is_file() for name in ("tokenizer.model", "tokenizer_config.json")):
        from transformers import AutoTokenizer as Reader
    else:
        raise UserError(f"{path}: no tokenizer there. Set tokenizer_path to a folder or hub id that has one.")
    try:
        return Reader.from_pretrained(path)
    except (ValueError, KeyError, ImportError, OSError) as error:
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        raise UserError(
            f"{path}: its tokenizer cannot be read ({reason}). Set tokenizer_path to a folder or hub id with a "
            "tokenizer.json."
        ) from None


def save(tokenizer: PreTrainedTokenizerFast, folder: Path, chat_template: str = "") -> None:
    """Write the tokenizer's files; ``chat_template``, where given, in place of its own."""
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for name in ("is_local", "local_files_only"):  # how it was read here is nobody else's matter
        config.pop(name, None)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if chat_template:
        (folder / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")


def _path(source: Source, tokenizer_path: str, token: str | None) -> Path:
    if not tokenizer_path:
        own = source.adapter  # which may have been trained with another chat template, or with more tokens
        return own if own is not None and (own / "tokenizer.json").is_file() else source.path
    path = Path(tokenizer_path).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file() or tokenizer_path.startswith((".", "/", "~")) or tokenizer_path.count("/") != 1:
        raise UserError(f"tokenizer_path={tokenizer_path}: no such folder. Give a folder, a hub id or a .gguf file.")
    return hub.fetch(tokenizer_path, hub.SMALL_FILES, token)
