"""`luthier eval`: a model on a dataset, by reward functions over sampled completions, or by the loss of its own tokens.

A folder ``base_output_directory/run_name`` is left with ``config.yml``, ``results.json`` (at the end, in one piece)
and, where something was sampled, ``completions.jsonl``, which grows while the command runs.

Left out on purpose: going on with an evaluation that was interrupted. The next run sets its completions aside.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from luthier import mesh as mesh_lib
from luthier import remote
from luthier.checkpoint import disk
from luthier.commands import evaluate_samples, evaluate_text
from luthier.config import EvalConfig
from luthier.data import files, reasoning, source
from luthier.data.rows import Rows
from luthier.data.schemas import Selection
from luthier.errors import UserError
from luthier.rollout import prompts, reward
from luthier.rollout.chosen import Chosen
from luthier.rollout.estimators import Interval
from luthier.rollout.opened import open_model
from luthier.rollout.prompts import Prompt
from luthier.rollout.reward import Reward
from luthier.train import display, folder

RESULTS = "results.json"


def run(config: EvalConfig) -> None:
    """Run ``luthier eval``: check what is cheap to check, open the model, score, write and print the results.

    Raises UserError for what the user can mend, RunError where the results cannot be written.
    """
    console = display.console()
    place = _folder(config)
    rewards = reward.load(_named(config), config.reward_kwargs)
    if not rewards and config.rollout_engine == "vllm":
        raise UserError("rollout_engine=vllm: without reward_functions nothing is sampled. Give some, or leave it out.")
    rows = open_rows(config)
    reward.check_columns({each.name: reward.needs(each) for each in rewards}, rows.columns, rows.source)
    asked = _prompts(config, rows, rewards) if rewards else []
    chosen = None if rewards else source.selection(config, rows)
    ids: list[list[int]] = []
    with Chosen(config, partial(console.print, markup=False)) as engine:

        def look(place: Any, tokenizer: Any) -> None:
            ids.extend(prompts.encode(config, asked, tokenizer))
            engine.look(place, tokenizer, ids)

        opened = open_model(engine.keys, look)
        with mesh_lib.use(opened.mesh):
            if chosen is None:
                job = evaluate_samples.prepare(config, opened, asked, ids, rewards, engine.open(opened))
                results = evaluate_samples.evaluate(job, folder.open_(config), console)
            else:
                results = evaluate_text.evaluate(config, opened, rows, chosen, console)
    results = {"model": opened.name, "dataset": rows.source} | results
    _write(folder.open_(config) / RESULTS, results)
    display.table(console, f"{opened.name} on {rows.source}", dict(lines(results)))
    console.print(f"Written to {place}.")


def open_rows(config: EvalConfig) -> Rows:
    """Return the rows of the split that is asked for, or of the held-out split that there is, formatted."""
    splits = files.open_splits(config.hf_path, config.hf_name, config.hf_access_token)
    usual = [name for name in ("test", "validation") if name in splits] or list(splits)
    split = config.hf_eval_split or usual[0]
    return source.formatted(config, files.open_split(splits, split, config.hf_path, "hf_eval_split"))


def lines(results: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (name, value) of the numbers in ``results``, as they are printed."""
    for name, measures in results.get("rewards", {}).items():
        for measure, value in measures.items():
            if isinstance(value, Mapping):
                interval = Interval(**value)
                yield f"{name} {measure}", f"{interval.value:.4f}  (95%: {interval.low:.4f} to {interval.high:.4f})"
            elif value:
                yield f"{name} {measure}", str(value)
    for group in ("completions", "text"):
        for name, value in results.get(group, {}).items():
            shown = ", ".join(f"{key} {count}" for key, count in value.items()) if isinstance(value, Mapping) else value
            yield name, f"{shown:.4f}" if isinstance(shown, float) else f"{shown}"
    yield "seconds", f"{results['seconds']:.1f}"


def _prompts(config: EvalConfig, rows: Rows, rewards: Sequence[Reward]) -> list[Prompt]:
    chosen = prompts.choose(config, rows)
    if isinstance(chosen, Selection) and chosen.schema == "text":
        raise UserError(
            f"reward_functions={[each.name for each in rewards]}: {rows.source} has plain text, which asks for no "
            "completion. Leave them out to score the text itself, or map its columns by train_data_columns."
        )
    return prompts.read(rows, chosen, config.system_prompt)


def _named(config: EvalConfig) -> list[str]:
    own = ["reasoning_gym"] if config.hf_path.startswith(reasoning.PREFIX) else []
    return config.reward_functions or own


def _folder(config: EvalConfig) -> Path:
    place = folder.check(config)
    if (place / RESULTS).exists():
        raise UserError(f"{place}: holds the results of an evaluation. Choose another run_name, or remove the folder.")
    return place


def _write(path: Path, results: Mapping[str, Any]) -> None:
    draft = path.with_name(f".{path.name}")
    with disk.writing(path, "the results", lambda: "The completions are whole. Make room, and run it again."):
        draft.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(path)
    remote.push(path)
