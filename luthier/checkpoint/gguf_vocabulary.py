"""What a GGUF file says of a tokenizer: ``gguf_tokenizer`` backwards.

The rule that cuts text before merges is not stored but named, so it is recognised by what it does: it must cut probing
texts like one of the rules that the reader knows. The file is then read back (``check``). Left out on purpose: every
tokenizer but byte-level BPE and SentencePiece's BPE, and tokens that begin and end texts other than bos and eos.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers

from luthier.checkpoint import gguf_tokenizer
from luthier.errors import UserError

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6
# The name that each rule of the reader is written by.
_NAMES = {
    "gpt2": "gpt-2",
    "digits": "smollm",
    "llama3": "llama-bpe",
    "dbrx": "dbrx",
    "qwen2": "qwen2",
    "tekken": "tekken",
    "gpt4o": "gpt-4o",
}
_SPACE = "▁"
_PROBES = (
    "It's what we'll do; I'M sure THEY'RE not. don't",
    "In 1984 there were 12,345,678.90 sheep x2 3y 7",
    "  two  spaces\n\n and\ttabs \r\n\r\nend.\n/path/to  \n",
    "camelCaseWORDSAndMore under_score (brackets) [x] {y} <tag/> a+b=c; !!! ... ???\n\n",
    "naïve cafe\u0301 — 東京に行く Привет мир 👩‍🚀 ½ ² Ⅷ ١٢٣",
    "for i in range(10):\n    print(i)\n\t\treturn -1\n",
)


def metadata(tokenizer: Any, size: int, name: str) -> dict[str, Any]:
    """Return {key: value} of the metadata for ``tokenizer``, of a model whose embedding has ``size`` rows.

    Raises UserError for a kind of tokenizer that cannot be written; ``name`` is the model's.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"].get("type") != "BPE" or not state["model"]["merges"]:
        raise UserError(f"{name}: {_cannot('it is no BPE with merges, but ' + str(state['model'].get('type')))}")
    spm = bool(state["model"].get("byte_fallback"))
    tokens, kinds = _tokens(tokenizer, size, spm)
    ids = {name: tokens_id for name in ("bos", "eos", "unk", "pad") if (tokens_id := _id(tokenizer, name)) is not None}
    text = tokenizer("a").input_ids
    found: dict[str, Any] = {
        **(_sentencepiece(state, tokens) if spm else _byte_level(tokenizer, state, name)),
        "tokens": tokens,
        "token_type": kinds,
        **{f"{_KEYS.get(name, name)}_token_id": number for name, number in ids.items()},
        "add_bos_token": "bos" in ids and text[:1] == [ids["bos"]],
        "add_eos_token": "eos" in ids and text[-1:] == [ids["eos"]],
    }
    found = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    template = tokenizer.chat_template
    if isinstance(template, Mapping):
        template = template.get("default")
    return found | ({"tokenizer.chat_template": template} if template else {})


def check(path: Path, tokenizer: Any, name: str) -> None:
    """Read the tokenizer of the file at ``path`` back, and make sure that it cuts texts as ``tokenizer`` does.

    Raises UserError where it does not; ``name`` is the model's.
    """
    found = gguf_tokenizer.build(path)
    for text in (*_PROBES, *(token for token in (tokenizer.bos_token, tokenizer.eos_token) if token)):
        ours, theirs = tokenizer(text).input_ids, found(text).input_ids
        if ours != theirs:
            raise UserError(f"{name}: {_cannot(f'{text!r} would be {theirs[:20]}, and is {ours[:20]}')}")


_KEYS = {"unk": "unknown", "pad": "padding"}


def _id(tokenizer: Any, name: str) -> int | None:
    return getattr(tokenizer, f"{name}_token_id")


def _tokens(tokenizer: Any, size: int, spm: bool) -> tuple[list[str], list[int]]:
    """Return the token of each row of the embedding and its type; rows that are no token's are filled up."""
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [_UNUSED] * size
    for token, number in tokenizer.get_vocab().items():
        if number < size:
            tokens[number] = token
            kinds[number] = _BYTE if spm and len(token) == 6 and token.startswith("<0x") else _NORMAL
    for number, token in tokenizer.added_tokens_decoder.items():
        if number < size:
            kinds[number] = _CONTROL if token.special else _USER_DEFINED
            if spm and not token.special:  # llama.cpp looks for these in the text as it is given
                tokens[number] = tokens[number].replace(_SPACE, " ")
    return tokens, kinds


def _byte_level(tokenizer: Any, state: Mapping[str, Any], name: str) -> dict[str, Any]:
    rule = _rule(tokenizer.backend_tokenizer, bool(state["model"].get("ignore_merges")))
    if rule is None:
        raise UserError(f"{name}: {_cannot('llama.cpp has no name that is known here for how it cuts words')}")
    return {"model": "gpt2", "pre": _NAMES[rule], "merges": [" ".join(merge) for merge in _merges(state)]}


def _rule(backend: Tokenizer, whole_words: bool) -> str | None:
    """Return the reader's rule that cuts every probing text like ``backend``, None where none does."""
    for rule in _NAMES:
        other = Tokenizer(backend.model)
        other.normalizer = normalizers.NFC() if rule == "qwen2" else None
        other.pre_tokenizer = gguf_tokenizer.cut(rule)
        same = all(_pieces(backend, text) == _pieces(other, text) for text in _PROBES)
        if same and whole_words == (rule in gguf_tokenizer.WHOLE_WORDS):
            return rule
    return None


def _pieces(backend: Tokenizer, text: str) -> list[str]:
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return (
        [text]
        if backend.pre_tokenizer is None
        else [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    )


def _sentencepiece(state: Mapping[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Scores are higher for tokens that are merged earlier, which is all that they are for."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(_merges(state)):
        ranks.setdefault(left + right, rank)
    last = len(_merges(state))
    return {
        "model": "llama",
        "pre": "default",
        "scores": [-float(ranks.get(token, last)) for token in tokens],
        "add_space_prefix": _adds_space(state),
    }


def _merges(state: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = state["model"]["merges"]
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in found)
    return [(left, right) for left, right in pairs]


def _adds_space(state: Mapping[str, Any]) -> bool:
    steps = state.get("normalizer") or {}
    steps = steps.get("normalizers", [steps])
    first = state.get("pre_tokenizer") or {}
    return any(step.get("type") == "Prepend" for step in steps) or (
        first.get("type") == "Metaspace" and first.get("prepend_scheme") != "never"
    )


def _cannot(why: str) -> str:
    return (
        f"its tokenizer cannot be written as GGUF: {why}. Write a Hugging Face folder (output_format=huggingface) and "
        "convert that with llama.cpp's own script."
    )
