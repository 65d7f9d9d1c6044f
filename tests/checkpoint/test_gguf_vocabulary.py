"""Tokenizers written into GGUF files and read back: by ourselves and by Transformers."""

import copy

import numpy as np
import pytest
from folders import keys, smollm2, write_folder
from test_gguf_writing import small_tokenizer, write
from test_tokenizer import TEXTS, byte_level, sentencepiece
from tokenizers import pre_tokenizers

from luthier.checkpoint import gguf_file, gguf_tokenizer, gguf_vocabulary
from luthier.checkpoint import tokenizer as tokenizer_lib
from luthier.checkpoint.source import resolve
from luthier.errors import UserError
from tiny import TINY

MORE = ["I'll say 1234 times: CamelCase, THEY'RE", "x = [1, 2]\n\n\tend\r\n", "cafe\u0301 \u00bd", " a", "a  "]


def again(folder, tokenizer, size):
    """Return the tokenizer after the way through a folder and a GGUF file of a model with ``size`` rows."""
    tokenizer_lib.save(tokenizer, folder)
    given = tokenizer_lib.load(resolve(keys(write_folder(folder, TINY | {"vocab_size": size}, {}))))
    _, path = write(folder, TINY | {"vocab_size": size, "num_hidden_layers": 1}, tokenizer=given)
    return tokenizer_lib.load(resolve(keys(path))), gguf_file.read_header(path).metadata


def same(ours, theirs, texts=(*TEXTS, *MORE)):
    for text in texts:
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == theirs.decode(theirs(text).input_ids), text
    assert ours.chat_template == theirs.chat_template
    for name in ("bos", "eos", "unk", "pad"):
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id"), name


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o"])
def test_a_byte_level_tokenizer_is_written_by_the_name_of_its_rule(tmp_path, pre):
    extra = ["<|begin|>", "<|end|>", "12", "123", "Ġt", "at"]
    tokenizer, _ = byte_level(
        tmp_path / "t.gguf", pre, extra, ["1 2", "12 3", "Ġ t", "a t"], bos_token_id=256, eos_token_id=257
    )
    tokenizer.chat_template = "{{ messages[0].content }}"
    found, metadata = again(tmp_path, tokenizer, 272)
    assert metadata["tokenizer.ggml.pre"] == pre
    assert metadata["tokenizer.ggml.tokens"][263:] == [f"[PAD{number}]" for number in range(263, 272)]
    same(found, tokenizer)


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_is_written_with_scores_in_the_order_of_its_merges(tmp_path, prefix):
    tokenizer, tokens = sentencepiece(tmp_path / "t.gguf", add_space_prefix=prefix)
    found, metadata = again(tmp_path, tokenizer, 288)
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefix
    assert metadata["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 6]
    assert metadata["tokenizer.ggml.tokens"][: len(tokens)] == tokens
    same(found, tokenizer, ["hello hell", "1 2.", "'hello' 12", "hé llo", "  hello"])


def test_user_defined_and_special_tokens_stay_what_they_are(tmp_path):
    tokenizer, _ = byte_level(tmp_path / "t.gguf", "gpt-2", ["<think>", "<s>"])
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>"]})
    found, metadata = again(tmp_path, tokenizer, 272)
    kinds = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert (kinds["<think>"], kinds["<s>"], kinds["zz"], kinds["[PAD270]"]) == (4, 3, 1, 5)
    same(found, tokenizer, ["a<think>b<s>"])


def test_bos_and_eos_are_added_as_they_were(tmp_path):
    options = {"bos_token_id": 0, "eos_token_id": 1, "add_bos_token": True, "add_eos_token": True}
    tokenizer, _ = byte_level(tmp_path / "t.gguf", "gpt-2", **options)
    found, metadata = again(tmp_path, tokenizer, 272)
    assert metadata["tokenizer.ggml.add_bos_token"]
    assert metadata["tokenizer.ggml.add_eos_token"]
    same(found, tokenizer)


def test_a_rule_without_a_name_is_refused():
    tokenizer = copy.deepcopy(small_tokenizer())
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match=r"m: its tokenizer cannot be written as GGUF: llama\.cpp has no name"):
        gguf_vocabulary.metadata(tokenizer, 256, "m")


def test_a_file_that_cuts_otherwise_is_refused(tmp_path):
    tokenizer, _ = byte_level(tmp_path / "t.gguf", "gpt-2")
    other, _ = byte_level(tmp_path / "o.gguf", "gpt-2", ["he"], ["h e"])
    with pytest.raises(UserError, match=r"cannot be written as GGUF: .* would be"):
        gguf_vocabulary.check(tmp_path / "t.gguf", other, "m")
    gguf_vocabulary.check(tmp_path / "t.gguf", tokenizer, "m")


@pytest.mark.slow
def test_smollm2s_tokenizer_comes_back(tmp_path):
    real = tokenizer_lib.load(resolve(keys(smollm2())))
    fields = gguf_vocabulary.metadata(real, 49152, "SmolLM2")
    given = gguf_file.read_header(smollm2()).metadata
    assert {key: given.get(key) for key in fields if key in given} == {
        key: fields[key] for key in fields if key in given
    }
    random = np.random.default_rng(0)
    parts = [*"abXY019 \n\t.,'é½東가🙂", "  ", "    ", "\r\n", " the", "ing", "<|im_start|>", "'ll", "\u0308"]
    found, _ = again(tmp_path, real, 49152)
    same(found, real, ["".join(random.choice(parts, 30)) for _ in range(200)])
    assert gguf_tokenizer.build(tmp_path / "m.gguf").chat_template == real.chat_template
