"""The house rules that can be checked: imports point one way, files and functions are small, all is documented."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "luthier"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room may import from rooms on lower floors and from itself; the ground floor's rooms may import one another.
FLOORS = (
    # "": the package itself, for its version
    ("", "errors", "types", "keys", "config", "mesh", "memory", "parting", "processes", "remote", "runtime"),
    ("data", "model"),
    ("algorithms", "checkpoint"),
    ("rollout",),
    ("train",),
    ("plan",),
    ("commands",),
    ("cli",),
    ("__main__",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80


def named(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room(module: str) -> str:
    """Return the room of a dotted module: ``luthier.data.chat`` lies in ``data``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def own_room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported_rooms(tree: ast.Module) -> set[str]:
    """Return the rooms that a file imports from, lazily or not; a file run as a program may hand over to the cli."""
    body = [node for node in tree.body if not _is_main_block(node)]
    rooms = set()
    for node in (inner for outer in body for inner in ast.walk(outer)):
        if isinstance(node, ast.Import):
            rooms |= {room(alias.name) for alias in node.names if alias.name.split(".")[0] == "luthier"}
        elif isinstance(node, ast.ImportFrom) and node.level:
            rooms.add("a relative import")
        elif isinstance(node, ast.ImportFrom) and node.module == "luthier":
            rooms |= {alias.name if alias.name in FLOOR else "" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("luthier."):
            rooms.add(room(node.module or ""))
    return rooms


def _is_main_block(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def misplaced(home: str, rooms: set[str]) -> set[str]:
    """Return those of ``rooms`` that ``home`` may not import from."""
    floor = FLOOR[home]
    return {other for other in rooms if other != home and (other not in FLOOR or FLOOR[other] >= max(floor, 1))}


@pytest.mark.parametrize("path", FILES, ids=named)
def test_imports_point_one_way(path):
    assert own_room(path) in FLOOR, f"{named(path)}: a room that the house does not have"
    wrong = misplaced(own_room(path), imported_rooms(parsed(path)))
    assert not wrong, f"{named(path)} imports from {sorted(wrong)}, which lies above or beside it"


def test_the_walk_sees_lazy_imports_and_upward_ones():
    lazy = "def f():\n    from luthier.train import sft\n    import luthier.model.rope\n"
    rooms = imported_rooms(ast.parse(lazy + "from luthier import cli, config\n"))
    assert rooms == {"train", "model", "cli", "config"}
    assert misplaced("data", rooms) == {"train", "model", "cli"}
    assert misplaced("config", {"errors", "mesh"}) == set()
    assert misplaced("errors", {"data"}) == {"data"}


@pytest.mark.parametrize("path", FILES, ids=named)
def test_files_and_functions_are_small(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE_LINES
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", FILES, ids=named)
def test_what_is_public_is_documented(path):
    tree = parsed(path)
    assert ast.get_docstring(tree), "the module has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{node.name} has no docstring"


def is_sum(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "sum"


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "masked.py"], ids=named)
def test_masked_means_are_written_in_one_file(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            inline = is_sum(node.left) and any(is_sum(inner) for inner in ast.walk(node.right))
            assert not inline, f"line {node.lineno}: a mean over a mask; algorithms/masked.py has it"
