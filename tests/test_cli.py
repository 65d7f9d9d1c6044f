"""The command line as a user meets it: help, mistakes, exit codes, and what is imported before they are seen."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from luthier import __version__, cli, config
from luthier.commands import keys
from luthier.config import SftConfig
from luthier.errors import RunError, UserError

DOCS = Path(__file__).parents[1] / "docs"
HEAVY = ("jax", "numpy", "transformers", "datasets", "grain", "optax", "orbax", "torch", "rich")
TYPO = "luthier sft: unknown key `setps` (command line). Did you mean `steps`?\n"


def run(*arguments: str, module: str = "luthier") -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def training(monkeypatch):
    """Put a stand-in where the training loop would be imported."""
    received = []
    module = type(sys)("luthier.train.sft")
    module.run = received.append
    monkeypatch.setitem(sys.modules, "luthier.train.sft", module)
    return module, received


def test_help_names_every_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown and command.summary in shown for name, command in cli.COMMANDS.items())


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_each_command(name, capsys):
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"luthier {name} {cli.COMMANDS[name].usage}" in shown
    assert all(key in shown for key in cli.COMMANDS[name].shown_keys)
    assert max(map(len, shown.splitlines())) <= 100


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"luthier {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["no command", "sft, rl, generate, chat"]),
        (["stf"], ["unknown command `stf`", "Did you mean `sft`?"]),
        (["qqqq"], ["unknown command `qqqq`", "sft, rl, generate, chat"]),
        (["sft", "setps=3"], ["luthier sft: unknown key `setps`", "`steps`"]),
        (["sft"], ["luthier sft: no model", "model_name=..."]),
        (["keys", "stf"], ["luthier keys: no keys for `stf`", "Did you mean `sft`?"]),
    ],
)
def test_a_mistake_exits_2_with_one_message(arguments, parts, capsys):
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("luthier")
    assert shown.err.count("\n") == 1
    assert all(part in shown.err for part in parts), shown.err


def test_a_command_gets_its_resolved_configuration(training):
    _, received = training
    assert cli.main(["sft", "model_name=m", "hf_path=d", "steps=3"]) == 0
    (config,) = received
    assert isinstance(config, SftConfig)
    assert config.steps == 3


def fails(training, error: BaseException) -> None:
    def run(config):
        raise error

    training[0].run = run


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (UserError("row 3: no messages"), 2, "luthier sft: row 3: no messages\n"),
        (RunError("step 3: loss nan"), 1, "luthier sft: step 3: loss nan\n"),
        (KeyboardInterrupt(), 130, "luthier: interrupted\n"),
    ],
)
def test_what_ends_a_run_has_its_exit_code(training, capsys, error, code, shown):
    fails(training, error)
    assert cli.main(["sft", "model_name=m", "hf_path=d"]) == code
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize("error", [ZeroDivisionError(), SystemExit(143)])
def test_a_fault_of_ours_and_an_exit_are_let_through(training, error):
    fails(training, error)
    with pytest.raises(type(error)):
        cli.main(["sft", "model_name=m", "hf_path=d"])


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["sft", "--help"], 0), (["sft", "setps=3"], 2), (["keys", "sft"], 0)],
)
def test_nothing_heavy_is_imported_for_help_and_typos(arguments, code):
    program = (
        f"import sys; from luthier.cli import main; code = main({arguments!r}); "
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]; sys.exit(str(heavy) if heavy else code)"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert finished.returncode == code, finished.stderr


def busy_seconds() -> float:
    """Return the processor time of finished child processes: unlike time on the wall, no busy neighbour adds to it."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("module", "arguments", "code", "shown"),
    [
        ("luthier", ["--help"], 0, ""),
        ("luthier", ["sft", "setps=3"], 2, TYPO),
        ("luthier.train.sft", ["setps=3"], 2, TYPO),
    ],
)
def test_help_and_typos_are_answered_within_a_second(module, arguments, code, shown):
    before = busy_seconds()
    finished = run(*arguments, module=module)
    assert busy_seconds() - before < 1.0
    assert (finished.returncode, finished.stderr) == (code, shown)


def test_the_page_of_keys_is_in_step():
    written = (DOCS / "keys.md").read_text(encoding="utf-8")
    assert written == "\n".join(map(keys.markdown, config.COMMANDS)), "run `make docs`"


def test_keys_on_a_terminal_are_a_table(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["keys", "sft"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in SftConfig.model_fields)
    assert "| ---" not in shown


def test_what_else_failed_is_told_after_the_first_failure(monkeypatch, capsys):
    def fail(settings):
        error = RunError("the loss is no number")
        error.add_note("the last checkpoint could not be written")
        raise error

    monkeypatch.setattr(cli, "_run", lambda name, arguments: fail(arguments))
    assert cli.main(["sft", "steps=1"]) == 1
    assert capsys.readouterr().err == "luthier sft: the loss is no number\nthe last checkpoint could not be written\n"
