"""The tokenizer that a GGUF file describes, as a fast tokenizer with its chat template.

A GGUF file holds the vocabulary, the merges and the *name* of the rule that cuts text before them. Only names whose
rule is known here are taken; with any other the ids would be wrong without a sign, so it is refused. Left out on
purpose: Unigram ("t5") and WordPiece ("bert") vocabularies, which no supported model has.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from luthier.checkpoint.gguf_file import read_header
from luthier.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_CONTROL, _USER_DEFINED = 3, 4
# The rules as their models' own tokenizer.json state them, by the name that llama.cpp gives them.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + _ENDINGS + "|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*" + _ENDINGS + "|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen's cuts digits one by one, Llama's by threes; else they are one. Phi-4 has DBRX's, and its small model GPT-4o's.
_SPLITS = {
    "llama3": _LLAMA3,
    "dbrx": _LLAMA3,
    "qwen2": _LLAMA3.replace("{1,3}", ""),
    "tekken": _TEKKEN,
    "gpt4o": _GPT4O,
}
_RULES = {
    "gpt-2": "gpt2",
    "smollm": "digits",
    "starcoder": "digits",
    "refact": "digits",
    "llama-bpe": "llama3",
    "llama3": "llama3",
    "llama-v3": "llama3",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "tekken": "tekken",
    "dbrx": "dbrx",
    "gpt-4o": "gpt4o",
}
WHOLE_WORDS = ("llama3", "tekken")
"""Rules whose texts begin with bos unless the file says otherwise, and whose whole words are taken without merges."""
_SPACE = "▁"


def build(path: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of the GGUF file at ``path``.

    Raises UserError for a kind of vocabulary or a pre-tokenizer that is not known.
    """
    header = read_header(path)
    metadata = {key.removeprefix("tokenizer."): value for key, value in header.metadata.items() if "tokenizer." in key}
    kind = metadata.get("ggml.model", "")
    wanted = {"gpt2": ("ggml.tokens", "ggml.merges"), "llama": ("ggml.tokens", "ggml.scores")}.get(kind, ())
    if missing := [f"tokenizer.{key}" for key in wanted if key not in metadata]:
        raise UserError(f"{path}: its tokenizer is incomplete, without {', '.join(missing)}. {_remedy()}")
    if kind == "gpt2":
        tokenizer = _byte_level(path, metadata)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata)
    else:
        raise UserError(f"{path}: tokenizer of kind `{kind or 'none'}` cannot be read. {_remedy()}")
    tokenizer.add_tokens(_added(metadata))
    named = {
        f"{name}_token": metadata["ggml.tokens"][number]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if (number := metadata.get(f"ggml.{key}_token_id")) is not None
    }
    _add_ends(tokenizer, metadata, named)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("chat_template"),
        model_max_length=header.get("context_length"),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _byte_level(path: Path, metadata: Mapping[str, Any]) -> Tokenizer:
    name = metadata.get("ggml.pre", "default")
    if name not in _RULES:
        raise UserError(f"{path}: pre-tokenizer `{name}` is not known, so its ids would be wrong. {_remedy()}")
    vocab = {token: number for number, token in enumerate(metadata["ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["ggml.merges"]]
    rule = _RULES[name]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule in WHOLE_WORDS))
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = cut(rule)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def cut(rule: str) -> Any:
    """Return the pre-tokenizer of a rule: one of those that names stand for."""
    if rule in _SPLITS:
        split = pre_tokenizers.Split(Regex(_SPLITS[rule]), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    by_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rule == "digits":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_words])
    return by_words


def _sentencepiece(metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's BPE as Llama 2 and Gemma have it: spaces become a letter, unknown characters their bytes."""
    tokens = [_spelled(token) for token in metadata["ggml.tokens"]]
    vocab = {token: number for number, token in enumerate(tokens)}
    unknown = tokens[metadata.get("ggml.unknown_token_id", 0)]
    # Runs of spaces have been given scores that are none: in Gemma's own merges the longest come first of all.
    scores = [
        len(token) if token != given else score
        for token, given, score in zip(tokens, metadata["ggml.tokens"], metadata["ggml.scores"], strict=True)
    ]
    merges = _merges(tokens, scores)
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = metadata.get("ggml.add_space_prefix", True)
    steps = [normalizers.Prepend(_SPACE)] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    joined = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*joined, *strip])
    return tokenizer


def _spelled(token: str) -> str:
    """Return a token as its own tokenizer spells it; llama.cpp writes Gemma's runs of spaces as spaces."""
    return _SPACE * len(token) if len(token) > 1 and not token.strip(" ") else token


def _merges(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Return the merges that the scores imply: every way to make a token of two, the best token first."""
    vocab = {token: number for number, token in enumerate(tokens)}
    found = []
    for number, token in enumerate(tokens):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(-scores[number], pair) for pair in known]
    found.sort(key=lambda entry: entry[0])
    return [pair for _, pair in found]


def _added(metadata: Mapping[str, Any]) -> list[AddedToken]:
    """Return the tokens that are matched whole before anything else."""
    tokens = metadata["ggml.tokens"]
    if metadata["ggml.model"] == "llama":
        tokens = [_spelled(token) for token in tokens]
    kinds = zip(tokens, metadata.get("ggml.token_type", ()), strict=False)
    return [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for token, kind in kinds
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _add_ends(tokenizer: Tokenizer, metadata: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Put bos before and eos after a text, where the file asks for it or llama.cpp's default for its kind does."""
    usual = metadata["ggml.model"] == "llama" or _RULES.get(metadata.get("ggml.pre", "")) in WHOLE_WORDS
    bos = [named["bos_token"]] if metadata.get("ggml.add_bos_token", usual) and "bos_token" in named else []
    eos = [named["eos_token"]] if metadata.get("ggml.add_eos_token", False) and "eos_token" in named else []
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *(f"{token}:1" for token in bos), "$B:1", *(f"{token}:1" for token in eos)],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys([*bos, *eos])],
    )


def _remedy() -> str:
    return "Set tokenizer_path to a folder or hub id with the model's tokenizer.json."
