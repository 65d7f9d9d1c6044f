"""The command line: `luthier COMMAND [recipe.yml] key=value ...`.

Everything is parsed and checked before a command's own module is imported, so that help and a typo take no time.

Left out on purpose: option parsing. A command has keys, and `config` holds them.
"""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from luthier import __version__, parting, runtime
from luthier.errors import RunError, UserError, did_you_mean


@dataclass(frozen=True)
class Command:
    """A command: its usage, what it does, the module whose ``run`` does it, and the keys that its help shows.

    Where ``config.COMMANDS`` has keys for it, ``run`` is given the resolved configuration, else the bare arguments.
    """

    usage: str
    summary: str
    module: str
    shown_keys: tuple[str, ...] = ()


COMMANDS = {
    "sft": Command(
        "[recipe.yml] key=value ...",
        "Fine-tune a model on conversations or text.",
        "luthier.train.sft",
        (
            *("model_name", "load_parameters_path", "hf_path", "train_split", "hf_eval_split", "train_data_columns"),
            *("run_name", "base_output_directory", "steps", "num_epoch", "per_device_batch_size"),
            *("gradient_accumulation_steps", "max_target_length", "learning_rate"),
        ),
    ),
    "rl": Command(
        "[recipe.yml] key=value ...",
        "Improve a model by reinforcement learning: GRPO, GSPO and their kin.",
        "luthier.train.rl",
        (
            *("model_name", "load_parameters_path", "hf_path", "train_split", "hf_eval_split", "reward_functions"),
            *("run_name", "base_output_directory", "loss_algo", "steps", "prompts_per_step", "num_generations"),
            *("max_new_tokens", "learning_rate", "environment", "chips_per_vm"),
        ),
    ),
    "generate": Command(
        "[recipe.yml] key=value ...",
        "Complete prompts, as JSON lines.",
        "luthier.commands.generate",
        (
            *("load_parameters_path", "model_name", "prompt", "prompts_path", "system_prompt", "use_chat_template"),
            *("num_generations", "max_new_tokens", "temperature", "top_p", "stop", "seed", "output_path"),
        ),
    ),
    "chat": Command(
        "[recipe.yml] key=value ...",
        "Talk with a model, or with several side by side.",
        "luthier.commands.chat",
        ("load_parameters_path", "model_name", "compare", "system_prompt", "max_new_tokens", "temperature", "top_p"),
    ),
    "eval": Command(
        "[recipe.yml] key=value ...",
        "Score a model on a dataset: completions by reward functions, or texts by loss.",
        "luthier.commands.evaluate",
        (
            *("load_parameters_path", "model_name", "hf_path", "hf_eval_split", "train_data_columns"),
            *("reward_functions", "num_generations", "max_new_tokens", "temperature", "system_prompt"),
            *("run_name", "base_output_directory"),
        ),
    ),
    "lm-eval": Command(
        "arguments of lm_eval", "Run the lm-eval harness, with `--model luthier`.", "luthier.commands.lm_eval"
    ),
    "serve": Command(
        "[recipe.yml] key=value ...",
        "Answer OpenAI's HTTP API.",
        "luthier.commands.serve",
        (
            *("load_parameters_path", "model_name", "host", "port", "api_key", "served_model_name"),
            *("max_num_seqs", "max_target_length", "max_queue", "max_new_tokens", "temperature", "top_p"),
        ),
    ),
    "vllm": Command(
        "[recipe.yml] key=value ...",
        "Run a vLLM server that takes the weights of trainers elsewhere.",
        "luthier.commands.vllm",
        (
            *("load_parameters_path", "model_name", "host", "port", "vllm_python", "vllm_arguments"),
            *("dtype", "max_target_length", "lora_rank"),
        ),
    ),
    "convert": Command(
        "[recipe.yml] key=value ...",
        "Merge an adapter into its model; turn a Hugging Face folder into a GGUF file, and back.",
        "luthier.commands.convert",
        ("load_parameters_path", "model_name", "lora_path", "output_path", "output_format", "dtype", "gguf_type"),
    ),
    "plan": Command(
        "sft|rl [recipe.yml] topology=NAME key=value ...",
        "Say whether a run fits a machine and how fast it can be, before anyone pays for one.",
        "luthier.commands.plan",
        ("topology", "topology_num_slices", "compile", "search", "output_path"),
    ),
    "keys": Command("[command]", "List every key of a command: type, default, meaning.", "luthier.commands.keys"),
}

TRAINING = {"sft", "rl"}
"""Commands whose process is set up for heavy work first."""

USAGE = """\
Usage: luthier COMMAND ...

{commands}

`luthier COMMAND --help` says more about one; `luthier --version` prints the version.
"""

KEYS_HELP = """\
Keys are set, the weakest first, by their defaults, by `key: value` lines in the recipe, by
environment variables such as LUTHIER_STEPS=100, and by key=value on the command line.

{keys}

`luthier keys {command}` lists all {count} of them.
"""


def main(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code: 0 done, 1 a failed run, 2 a mistake to mend, 130 interrupted.

    A fault of our own is left to raise, and a run that a signal stops raises SystemExit with its code.
    """
    name, *rest = arguments or [""]
    try:
        if name in ("-h", "--help", "help"):
            print(usage(), end="")
        elif name == "--version":
            print(f"luthier {__version__}")
        elif name not in COMMANDS:
            raise UserError(_unknown(name))
        elif "-h" in rest or "--help" in rest:
            print(help_text(name), end="")
        else:
            _run(name, rest)
    except (UserError, RunError) as error:
        # What else failed on the way out, such as the last checkpoint on a full disk, is a note of the first failure.
        message = "\n".join([str(error), *getattr(error, "__notes__", [])])
        print(f"luthier {name if name in COMMANDS else ''}".rstrip() + f": {message}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print("luthier: interrupted", file=sys.stderr)
        return 130
    return 0


def entry(*command: str) -> None:
    """Serve as the console script, and with a ``command`` as ``python -m`` of that command's module."""
    arguments = [*command, *sys.argv[1:]]
    if arguments and arguments[0] in TRAINING:
        runtime.tune_allocator()
    with parting.ending_together():
        raise SystemExit(main(arguments))


def usage() -> str:
    """Return the help that names the commands."""
    width = max(map(len, COMMANDS))
    return USAGE.format(commands="\n".join(f"  {name:<{width}}  {each.summary}" for name, each in COMMANDS.items()))


def help_text(name: str) -> str:
    """Return the help of one command."""
    from luthier import config

    command = COMMANDS[name]
    text = f"Usage: luthier {name} {command.usage}\n\n{command.summary}\n"
    if name not in config.COMMANDS:
        return text
    rows = {row.name: row for group in config.describe(name).values() for row in group}
    width = max(map(len, command.shown_keys))
    keys = "\n".join(
        textwrap.fill(rows[key].meaning, 100, initial_indent=f"  {key:<{width}}  ", subsequent_indent=" " * (width + 4))
        for key in command.shown_keys
    )
    return text + "\n" + KEYS_HELP.format(keys=keys, command=name, count=len(rows))


def _run(name: str, arguments: Sequence[str]) -> None:
    from luthier import config

    settings = config.resolve(name, arguments, os.environ) if name in config.COMMANDS else arguments
    importlib.import_module(COMMANDS[name].module).run(settings)


def _unknown(name: str) -> str:
    if not name:
        return f"no command: give one of {', '.join(COMMANDS)}. `luthier --help` says more."
    hint = did_you_mean(name, list(COMMANDS)) or f" There are {', '.join(COMMANDS)}."
    return f"unknown command `{name}`.{hint}"
