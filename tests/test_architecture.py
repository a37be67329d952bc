"""The house rules that a machine can check: floors, circles, and what the package never does."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "peft_graft"
CONTRIBUTING = Path(__file__).parents[1] / "CONTRIBUTING.md"
# From the ground up. A room imports from lower floors, never from beside or above.
FLOORS = (
    ("peft_compat",),
    ("checkpoints",),
    ("selection", "patch"),
    ("analysis", "adapter_files"),
    ("tuner",),
    ("training",),
    ("workflows",),
    ("cli", "vllm"),
    ("__init__", "__main__"),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))


def _unit(module: tuple[str, ...]) -> str:
    """The room that a module belongs to: `("tuner", "layer")` belongs to `tuner`."""
    return module[0] if module else "__init__"


def _module(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts


def _is_for_types_only(node: ast.AST) -> bool:
    """Return whether this is `if TYPE_CHECKING:`, which only type checkers enter."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _nodes(tree: ast.AST, with_types: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if with_types or not _is_for_types_only(node):
            yield node
            yield from _nodes(node, with_types)


def _imports(path: Path, source: str | None = None, with_types: bool = True) -> set[tuple[str, ...]]:
    """Modules of the package that a file imports anywhere, also inside functions, as paths below the package."""
    is_package = path.name == "__init__.py"
    here = ("peft_graft", *path.relative_to(PACKAGE).with_suffix("").parts)
    parent = here[:-1]
    found: set[tuple[str, ...]] = set()
    tree = ast.parse(path.read_text(encoding="utf-8") if source is None else source)
    for node in _nodes(tree, with_types):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = parent[: len(parent) - node.level + 1] if node.level else ()
            base = (*start, *(node.module.split(".") if node.module else ()))
            # `from . import storage` names a module; `from .layer import GraftLayer` names what is in one.
            targets = [(*base, alias.name) if _is_module((*base, alias.name)) else base for alias in node.names]
        else:
            continue
        found |= {target[1:] for target in targets if target[0] == "peft_graft" and target != here}
    return found - ({()} if is_package else set())


def _is_module(dotted: tuple[str, ...]) -> bool:
    path = PACKAGE.parent.joinpath(*dotted)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _climbs(path: Path, source: str | None = None) -> list[str]:
    """Imports of a file that do not lead downward."""
    own = _unit(_module(path))
    return [
        f"{own} (floor {FLOOR_OF[own]}) imports {'.'.join(target) or 'peft_graft'} (floor {FLOOR_OF[_unit(target)]})"
        for target in sorted(_imports(path, source))
        if _unit(target) != own and FLOOR_OF[_unit(target)] >= FLOOR_OF[own]
    ]


def test_every_file_has_a_floor() -> None:
    assert FILES
    homeless = {_unit(_module(path)) for path in FILES} - FLOOR_OF.keys()
    assert not homeless, f"give {sorted(homeless)} a floor"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_lead_downward(path: Path) -> None:
    assert _climbs(path) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("checkpoints/pairing.py", "from ..patch.patch import Patch"),
        ("checkpoints/pairing.py", "from peft_graft.tuner.layer import GraftLayer"),
        ("checkpoints/pairing.py", "import peft_graft.patch.patch"),
        ("checkpoints/pairing.py", "def f():\n    from .. import patch"),
        ("tuner/layer.py", "from ..training.alpha import fit_alpha"),
        ("tuner/layer.py", "from .. import training"),
        ("patch/patch.py", "from peft_graft import GraftConfig"),
        ("selection/topk.py", "from ..patch.patch import Patch"),
    ],
)
def test_climbing_imports_are_seen(file: str, source: str) -> None:
    assert len(_climbs(PACKAGE / file, source)) == 1


def test_downward_imports_are_not_complained_about() -> None:
    source = (
        "from ..checkpoints.pairing import stream\nfrom .. import patch\nfrom .mask import Slot\n"
        "import torch\nfrom peft import x"
    )
    assert _climbs(PACKAGE / "tuner" / "layer.py", source) == []


def test_modules_do_not_import_in_circles() -> None:
    edges = {_module(path): {target for target in _imports(path, with_types=False) if target} for path in FILES}
    done: set[tuple[str, ...]] = set()

    def visit(module: tuple[str, ...], trail: tuple[tuple[str, ...], ...]) -> None:
        assert module not in trail, f"circle: {' -> '.join('.'.join(m) for m in (*trail, module))}"
        if module not in done:
            for target in edges.get(module, set()):
                visit(target, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


def table_of_rooms() -> str:
    """The table of rooms that CONTRIBUTING.md shows: floors, rooms, what each is for, its modules."""
    lines = ["| floor | room | what it does | modules |", "| --- | --- | --- | --- |"]
    for floor, rooms in enumerate(FLOORS[:-1]):
        for room in rooms:
            folder = PACKAGE / room
            purpose = (ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or "").strip()
            modules = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.py"))]
            listed = ", ".join(f"`{name}`" for name in modules if not name.endswith("__init__.py"))
            lines.append(f"| {floor} | `{room}/` | {purpose.splitlines()[0]} | {listed} |")
    return "\n".join(lines) + "\n"


def test_contributing_shows_the_rooms() -> None:
    table = table_of_rooms()
    assert table in CONTRIBUTING.read_text(encoding="utf-8"), (
        f"run `python tests/test_architecture.py`, which writes this table into CONTRIBUTING.md:\n{table}"
    )


def test_nothing_is_called_utils() -> None:
    assert [path for path in PACKAGE.rglob("*") if "util" in path.name] == []


def _offences(source: str) -> list[str]:
    """What the package never does: assert (python -O drops it), catch everything, unpickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            found.append(f"line {node.lineno}: assert")
        elif isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(t is None or (isinstance(t, ast.Name) and t.id in {"Exception", "BaseException"}) for t in caught):
                found.append(f"line {node.lineno}: broad except")
        elif isinstance(node, ast.arg) and "sparsity" in node.arg:
            found.append(f"line {node.lineno}: an argument called {node.arg}; the word is density")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            if "pickle" in names:
                found.append(f"line {node.lineno}: pickle")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_the_package_never_asserts_catches_everything_or_unpickles(path: Path) -> None:
    assert _offences(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "assert x",
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept (ValueError, BaseException):\n    pass",
        "def f(sparsity): ...",
        "import pickle",
        "from pickle import loads",
    ],
)
def test_offences_are_seen(source: str) -> None:
    assert len(_offences(source)) == 1


def test_narrow_excepts_are_fine() -> None:
    assert _offences("try:\n    f()\nexcept (ValueError, KeyError):\n    pass") == []


def _write_table() -> None:
    text = CONTRIBUTING.read_text(encoding="utf-8")
    start = text.index("| floor |")
    end = text.index("\n\n", start) + 1
    CONTRIBUTING.write_text(text[:start] + table_of_rooms() + text[end:], encoding="utf-8")


if __name__ == "__main__":
    _write_table()
