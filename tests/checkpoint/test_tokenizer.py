import json

import gguf as library
import pytest
from folders import keys, smollm2, tiny_tokenizer, write_folder
from tokenizers import pre_tokenizers

from luthier.checkpoint import gguf_tokenizer
from luthier.checkpoint import tokenizer as tokenizer_lib
from luthier.checkpoint.source import resolve
from luthier.errors import UserError
from tiny import TINY

TEXTS = [
    "Hello, world!",
    "In 1984 there were 12,345.67 sheep; 3+4=7",
    "  two  spaces\n\nand\ttabs \r\n end ",
    "naïve café — 東京 👩‍🚀 ½ ²",
    "it's we'll they'd I'M",
    "<|im_start|>user\nhi<|im_end|>\n",
    "",
]
TYPES = {"normal": 1, "control": 3, "user": 4, "byte": 6}


def write_tokenizer(path, kind, tokens, pre=None, merges=None, scores=None, types=None, **ids):
    writer = library.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    if pre:
        writer.add_tokenizer_pre(pre)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    writer.add_token_types([TYPES[name] for name in types] if types else [1] * len(tokens))
    for name, value in ids.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf_tokenizer.build(path)


def byte_level(path, pre, extra=(), merges=(), **ids):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *extra, "zz"]
    return write_tokenizer(path, "gpt2", tokens, pre=pre, merges=[*merges, "z z"], **ids), tokens


@pytest.fixture(scope="module")
def real():
    return tokenizer_lib.load(resolve(keys(smollm2())))


def test_smollm2s_special_tokens_and_template(real):
    assert real.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [0, 1, 2]
    assert (real.bos_token, real.eos_token, real.pad_token) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")
    assert (len(real), real.model_max_length) == (49152, 8192)
    ids = real.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)["input_ids"]
    assert real.decode(ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[0] == 1
    assert ids.count(2) == 2


def test_smollm2_cuts_digits_one_by_one(real):
    assert real.convert_ids_to_tokens(real("1984 and 12").input_ids) == ["1", "9", "8", "4", "Ġand", "Ġ", "1", "2"]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_gives_back_every_text(real, text):
    assert real.decode(real(text).input_ids) == text


@pytest.mark.slow
def test_smollm2_agrees_with_transformers_reading(real):
    """Theirs cuts by the GPT-2 rule alone, without the digits. No merge joins ASCII digits, so there the ids agree;
    after a space, other numerals such as ½ are cut off by the model's own rule and not by theirs.
    """
    pytest.importorskip("torch", reason="Transformers reads GGUF files with torch")
    from transformers import AutoTokenizer

    path = smollm2()
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        text = text.replace("½ ²", "")
        assert real(text).input_ids == theirs(text, add_special_tokens=False).input_ids


def test_what_is_saved_is_read_alike_here_and_by_transformers(tmp_path, real):
    from transformers import AutoTokenizer

    folder = write_folder(tmp_path, TINY, {})
    tokenizer_lib.save(real, folder)
    again = tokenizer_lib.load(resolve(keys(folder)))
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert real(text).input_ids == again(text).input_ids == theirs(text).input_ids
    assert again.chat_template == theirs.chat_template == real.chat_template
    assert (again.eos_token_id, again.pad_token_id) == (2, 2)
    tokenizer_lib.save(again, tmp_path / "twice")
    config = (folder / "tokenizer_config.json").read_text()
    assert "is_local" not in config
    assert json.loads((tmp_path / "twice" / "tokenizer_config.json").read_text()) == json.loads(config)


def test_a_template_given_replaces_the_tokenizers_own(tmp_path):
    tokenizer_lib.save(tiny_tokenizer(), tmp_path, chat_template="{{ 'mine' }}")
    write_folder(tmp_path, TINY, {})
    found = tokenizer_lib.load(resolve(keys(tmp_path)))
    assert found.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "mine"


def test_tokenizer_path_goes_before_the_models_own(tmp_path):
    write_folder(tmp_path / "model", TINY, {})
    tokenizer_lib.save(tiny_tokenizer(), tmp_path / "other")
    source = resolve(keys(tmp_path / "model"))
    assert tokenizer_lib.load(source, str(tmp_path / "other")).eos_token == "!"
    with pytest.raises(UserError, match=r"no tokenizer there. Set tokenizer_path"):
        tokenizer_lib.load(source)
    with pytest.raises(UserError, match="tokenizer_path=/nowhere: no such folder"):
        tokenizer_lib.load(source, "/nowhere")


@pytest.mark.parametrize("content", ["{}", '{"version": "1.0", "added_to', ""])
def test_a_broken_tokenizer_is_refused(tmp_path, content):
    write_folder(tmp_path, TINY, {})
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="its tokenizer cannot be read"):
        tokenizer_lib.load(resolve(keys(tmp_path)))


def test_llama_3_cuts_numbers_by_threes_and_puts_bos_first(tmp_path):
    extra = ["<|begin|>", "<|end|>", "12", "123"]
    merges = ["1 2", "12 3"]
    tokenizer, tokens = byte_level(tmp_path / "t.gguf", "llama-bpe", extra, merges, bos_token_id=256, eos_token_id=257)
    assert [tokens[i] for i in tokenizer("1231234").input_ids] == ["<|begin|>", "123", "123", "4"]
    assert [tokens[i] for i in tokenizer("a 12\n\n b").input_ids[1:]] == [*"aĠ", "12", "Ċ", "Ċ", "Ġ", "b"]
    assert tokenizer.decode(tokenizer("I'll 12\n\n b", add_special_tokens=False).input_ids) == "I'll 12\n\n b"


def test_llama_3_takes_a_whole_word_of_the_vocabulary_without_merges(tmp_path):
    tokenizer, tokens = byte_level(tmp_path / "t.gguf", "llama-bpe", ["Ġxyz"])
    assert [tokens[i] for i in tokenizer("a xyz").input_ids] == ["a", "Ġxyz"]


def test_the_files_flag_for_bos_is_heeded(tmp_path):
    options = {"bos_token_id": 0, "eos_token_id": 1}
    without, _ = byte_level(tmp_path / "a.gguf", "llama-bpe", add_bos_token=False, **options)
    both, _ = byte_level(tmp_path / "b.gguf", "smollm", add_bos_token=True, add_eos_token=True, **options)
    assert 0 not in without("ab").input_ids
    assert both("ab").input_ids[0] == 0
    assert both("ab").input_ids[-1] == 1


def test_user_defined_tokens_stay_whole_and_are_not_special(tmp_path):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens, types = [*letters, "<s>", "<think>", "zz"], ["normal"] * 256 + ["control", "user", "normal"]
    tokenizer = write_tokenizer(tmp_path / "t.gguf", "gpt2", tokens, pre="gpt-2", merges=["z z"], types=types)
    ids = tokenizer("a<think>b<s>").input_ids
    assert 257 in ids
    assert 256 in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<think>b"


@pytest.mark.parametrize(
    ("kind", "pre", "merges", "message"),
    [
        ("gpt2", "deepseek-llm", ["a b"], r"pre-tokenizer `deepseek-llm` is not known.*tokenizer_path"),
        ("gpt2", None, ["a b"], "pre-tokenizer `default` is not known"),
        ("gpt2", "smollm", [], r"without tokenizer.ggml.merges.*tokenizer_path"),
        ("llama", None, [], "without tokenizer.ggml.scores"),
        ("t5", None, [], r"tokenizer of kind `t5` cannot be read.*tokenizer_path"),
    ],
)
def test_a_tokenizer_that_would_be_guessed_is_refused(tmp_path, kind, pre, merges, message):
    with pytest.raises(UserError, match=message):
        write_tokenizer(tmp_path / "t.gguf", kind, ["a", "b", "ab"], pre=pre, merges=merges)


SPM = ["<unk>", "<s>", "</s>"]


def sentencepiece(path, **options):
    pieces = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "hello", "▁hello", "▁▁", "1", "2", "'", "."]
    tokens = [*SPM, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = ["control"] * 3 + ["byte"] * 256 + ["normal"] * len(pieces)
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unk_token_id": 0}
    return write_tokenizer(path, "llama", tokens, scores=scores, types=types, **ids, **options), tokens


def test_sentencepiece_as_llama_2_has_it(tmp_path):
    tokenizer, tokens = sentencepiece(tmp_path / "t.gguf")
    words = [tokens[i] for i in tokenizer("hello  hé").input_ids]
    assert words == ["<s>", "▁hello", "▁▁", "h", "<0xC3>", "<0xA9>"]
    for text in ("hello", " hello  12", "é\n東京", "hell'o."):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_sentencepiece_agrees_with_transformers_llama_tokenizer(tmp_path):
    from transformers import LlamaTokenizer

    ours, tokens = sentencepiece(tmp_path / "t.gguf")
    vocab = {token: number for number, token in enumerate(tokens)}
    scores = [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)]
    merges = gguf_tokenizer._merges(tokens, scores)
    theirs = LlamaTokenizer(vocab=vocab, merges=merges)
    for text in ("hello", "hello hell 12", "héllo.", "o'hello"):
        assert ours(text, add_special_tokens=False).input_ids == theirs(text, add_special_tokens=False).input_ids


def test_sentencepiece_without_the_space_before(tmp_path):
    tokenizer, tokens = sentencepiece(tmp_path / "t.gguf", add_space_prefix=False)
    assert [tokens[i] for i in tokenizer("hello").input_ids] == ["<s>", "hello"]
    assert tokenizer.decode(tokenizer("hello").input_ids, skip_special_tokens=True) == "hello"


def test_gemmas_runs_of_spaces_are_joined_before_all_else(tmp_path):
    """llama.cpp writes them as spaces and with no score; the model itself has them in its letter for a space."""
    tokens = ["<unk>", "▁", "a", "  ", "   ", "▁a"]
    types = ["normal", "normal", "normal", "user", "user", "normal"]
    scores = [0.0, -9.0, -9.0, -1000.0, -1000.0, -1.0]
    options = {"scores": scores, "types": types, "add_space_prefix": False}
    tokenizer = write_tokenizer(tmp_path / "t.gguf", "llama", tokens, **options)
    assert tokenizer("   a").input_ids == [4, 2]
    assert tokenizer("    a").input_ids == [4, 5]
    assert tokenizer("a a  a").input_ids == [2, 5, 3, 2]
    assert tokenizer("▁▁").input_ids == [3]
    assert tokenizer.decode([4, 5, 3]) == "    a  "
