"""The lm-eval adapter, on tasks over local rows: the harness's own numbers for the same model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import tiny
from luthier import cli
from luthier.errors import UserError

lm_eval = pytest.importorskip("lm_eval", reason="the lm-eval harness is not installed: pip install 'luthier[lm-eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

from luthier.commands import lm_eval_adapter  # noqa: E402
from luthier.commands.scoring import widths  # noqa: E402

pytestmark = pytest.mark.slow  # the harness alone takes half a minute to import and to begin

MAX_LENGTH = 96
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "then", "it", "sleeps", "under"]


def text(random: np.random.Generator, words: int) -> str:
    return " ".join(random.choice(WORDS, words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with sharp logits, so that a wrong position shows."""
    folder = tmp_path_factory.mktemp("lm-eval") / "model"
    tiny.write_model(folder, max_position_embeddings=256)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> lm_eval_adapter.LuthierLM:
    return get_model("luthier").create_from_arg_string(
        f"path={folder},max_length={MAX_LENGTH},max_gen_toks=16,dtype=float32,ici_data_parallelism=8,jax_cache_dir=",
        {"batch_size": 1},
    )


@pytest.fixture(scope="module")
def peer(folder: Path):
    """The harness's own Transformers model."""
    for needed in ("torch", "accelerate", "peft"):
        pytest.importorskip(needed)
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32", max_length=MAX_LENGTH, batch_size=4)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def pairs() -> list[Instance]:
    """Contexts from none to more than the model reads, in no order."""
    random = np.random.default_rng(0)
    lengths = random.permutation([0, 1, 2, 3, 5, 8, 13, 16, 17, 20, 30, 40])
    return requests(
        "loglikelihood",
        *[(text(random, n) if n else "", " " + text(random, int(random.integers(1, 5)))) for n in lengths],
        ("a context that ends in space ", "and goes on"),
        ("<|im_start|>user\nhi<|im_end|>\n", "there"),
    )


def test_loglikelihood_is_that_of_transformers(model, peer):
    ours, theirs = model.loglikelihood(pairs(), True), peer.loglikelihood(pairs(), True)
    np.testing.assert_allclose([a for a, _ in ours], [b for b, _ in theirs], atol=1e-4, rtol=0)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_one_next_token_is_greedy_and_the_likeliest(model):
    context, vocabulary = model.tok_encode("the quick brown"), range(model.opened.model.config.vocab_size)
    scored = model._loglikelihood_tokens([(None, context, [token]) for token in vocabulary], True)
    assert [token for token, (_, greedy) in enumerate(scored) if greedy] == [
        int(np.argmax([logp for logp, _ in scored]))
    ]
    assert np.exp([logp for logp, _ in scored]).sum() == pytest.approx(1.0, abs=1e-4)


def test_rolling_loglikelihood_is_that_of_transformers(model, peer):
    random = np.random.default_rng(1)
    texts = [(text(random, n),) for n in (1, 10, 18, 60)]  # the last is several windows long
    assert len(model.tok_encode(texts[-1][0])) > 2 * MAX_LENGTH
    asked = requests("loglikelihood_rolling", *texts)
    ours, theirs = model.loglikelihood_rolling(asked, True), peer.loglikelihood_rolling(asked, True)
    # The peer adds hundreds of tokens in fp32, so sums are compared by the token.
    lengths = [len(model.tok_encode(each)) for (each,) in texts]
    np.testing.assert_allclose(np.divide(ours, lengths), np.divide(theirs, lengths), atol=1e-4, rtol=0)


def test_many_lengths_compile_few_programs(model):
    random = np.random.default_rng(2)
    for word in (" dog", " tree", " fox"):
        model.loglikelihood(requests("loglikelihood", *[(text(random, n), word) for n in range(1, 40)]), True)
    assert model._scorer._program._cache_size() <= len(widths(MAX_LENGTH + 1)) == 5


def test_generation_is_that_of_transformers(model, peer):
    wanted = {"until": ["\n\n"], "max_gen_toks": 12}
    asked = requests("generate_until", ("the quick brown fox", wanted), ("a tall", wanted))
    assert model.generate_until(asked, True) == peer.generate_until(asked, True)


def test_generation_stops_before_the_first_stop_text(model):
    context = "under a tall green"
    (whole,) = model.generate_until(requests("generate_until", (context, {"until": [], "max_gen_toks": 12})), True)
    cut = whole[2:4]
    (said,) = model.generate_until(requests("generate_until", (context, {"until": cut, "max_gen_toks": 12})), True)
    assert said == whole[: whole.index(cut)]


def test_contexts_are_cut_from_the_left(model):
    random = np.random.default_rng(3)
    long = text(random, 60)
    wanted = {"until": ["\n"], "max_gen_toks": 8}
    kept = model.tokenizer.decode(model.tok_encode(long)[-(MAX_LENGTH - 8) :])
    first, second = model.generate_until(requests("generate_until", (long, wanted), (kept, wanted)), True)
    assert first == second


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({}, {"temperature": 0.0, "max_new_tokens": 16, "stop": ()}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9}),
        ({"temperature": 0.5}, {"temperature": 0.5}),
        ({"until": ["Q:", "<|im_start|>", ""]}, {"stop": ("Q:",), "stop_token_ids": (1, 2)}),
        ({"max_new_tokens": 4}, {"max_new_tokens": 4}),
    ],
)
def test_generation_settings(model, wanted, expected):
    sampling = model._sampling(wanted)
    found = {name: getattr(sampling, name) for name in expected}
    found = {name: tuple(sorted(value)) if name == "stop_token_ids" else value for name, value in found.items()}
    assert found == expected


@pytest.mark.parametrize(
    ("wanted", "message"),
    [({"num_beam": 2}, "`num_beam` is not known"), ({"max_gen_toks": 96}, "max_gen_toks=96 leaves no room")],
)
def test_wrong_generation_settings(model, wanted, message):
    with pytest.raises(UserError, match=message):
        model._sampling(wanted)


def test_chat_template(model):
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the"}]
    asked = model.apply_chat_template(history[:1])
    assert asked.endswith("<|im_start|>assistant\n")
    assert model.apply_chat_template(history, add_generation_prompt=False).endswith("<|im_start|>assistant\nthe")
    assert model.chat_template(True) == model.tokenizer.chat_template
    assert model.tokenizer_name.endswith("__model")


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Three tasks over local rows: a choice, a generation, a perplexity."""
    random = np.random.default_rng(4)
    rows = [
        {"question": text(random, 6), "choices": [text(random, 2) for _ in range(3)], "label": int(n % 3)}
        for n in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {"task": "local_choice", "output_type": "multiple_choice", "doc_to_choice": "choices"}
    open_ = {
        "task": "local_open",
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    }
    rolling = {
        "task": "local_rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
    }
    for each, extra in (
        (choice, {"doc_to_target": "label", "metric_list": [{"metric": "acc"}]}),
        (open_, {"doc_to_target": "{{choices[label]}}", "metric_list": [{"metric": "exact_match"}]}),
        (rolling, {"metric_list": [{"metric": "word_perplexity"}]}),
    ):
        (tmp_path / f"{each['task']}.yaml").write_text(yaml.safe_dump(common | each | extra))
    return tmp_path


def test_the_command_runs_tasks(task, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(task / "cache"))
    arguments = ["--model", "luthier", "--tasks", "local_choice,local_open,local_rolling", "--include_path", str(task)]
    arguments += ["--model_args", f"path={folder},max_length=96,max_gen_toks=16,dtype=float32,ici_data_parallelism=8"]
    assert cli.main(["lm-eval", *arguments, "--batch_size", "2", "--output_path", str(task / "out.json")]) == 0
    (written,) = task.glob("out*.json")
    results = json.loads(written.read_text())["results"]
    assert set(results) == {"local_choice", "local_open", "local_rolling"}
    assert 0 <= results["local_choice"]["acc,none"] <= 1
    assert results["local_rolling"]["word_perplexity,none"] > 1
    assert "local_choice" in capsys.readouterr().out


def test_a_wrong_model_argument_is_one_message(folder):
    with pytest.raises(UserError, match="unknown key `max_lenth`"):
        get_model("luthier").create_from_arg_string(f"path={folder},max_lenth=96", {"batch_size": 1})
    with pytest.raises(UserError, match="batch_size=0"):
        get_model("luthier").create_from_arg_string(f"path={folder},max_gen_toks=16", {"batch_size": 0})
