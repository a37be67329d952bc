"""The house rules that a machine can check: floors, file sizes, and what the package never does."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "peft_graft"
# From the ground up. A file, or a folder with all its files, imports from lower floors, never from beside or above.
FLOORS = (
    {"_register", "calibration", "codec", "donors", "naming", "placing", "ranks", "tables", "topk"},
    {"conversion", "deltas", "fingerprint", "metrics", "pieces", "plots", "selection"},
    {"patch", "sieve"},
    {"card", "closeness", "compose", "geometry", "localization"},
    {"tuner"},
    {"anatomy", "scoring", "stored"},
    {"export", "extract", "hub", "stitching", "training"},
    {"cli"},
    {"__init__", "__main__"},
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 400


def _unit(module: tuple[str, ...]) -> str:
    """The file or folder that stands on a floor: `("tuner", "layer")` belongs to `tuner`."""
    return module[0] if module else "__init__"


def _module(path: Path) -> tuple[str, ...]:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts


def _imports(path: Path, source: str | None = None) -> set[tuple[str, ...]]:
    """Modules of the package that a file imports anywhere, also inside functions, as paths below the package."""
    is_package = path.name == "__init__.py"
    here = ("peft_graft", *path.relative_to(PACKAGE).with_suffix("").parts)
    parent = here[:-1]
    found: set[tuple[str, ...]] = set()
    tree = ast.parse(path.read_text(encoding="utf-8") if source is None else source)
    for node in ast.walk(tree):
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
    assert not homeless, f"give {sorted(homeless)} a floor, here and in CONTRIBUTING.md"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_lead_downward(path: Path) -> None:
    assert _climbs(path) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("deltas.py", "from .patch import Patch"),
        ("deltas.py", "from peft_graft.tuner.layer import GraftLayer"),
        ("deltas.py", "import peft_graft.patch"),
        ("deltas.py", "def f():\n    from . import patch"),
        ("tuner/layer.py", "from ..training import fit_alpha"),
        ("tuner/layer.py", "from .. import training"),
        ("patch.py", "from peft_graft import GraftConfig"),
        ("calibration.py", "from .selection import RULES"),
    ],
)
def test_climbing_imports_are_seen(file: str, source: str) -> None:
    assert len(_climbs(PACKAGE / file, source)) == 1


def test_downward_imports_are_not_complained_about() -> None:
    source = (
        "from ..deltas import stream\nfrom .. import patch\nfrom .mask import Slot\nimport torch\nfrom peft import x"
    )
    assert _climbs(PACKAGE / "tuner" / "layer.py", source) == []


def test_files_inside_a_folder_do_not_import_in_circles() -> None:
    edges = {
        _module(path): {t for t in _imports(path) if t and t[0] == "tuner"} for path in FILES if "tuner" in path.parts
    }
    done: set[tuple[str, ...]] = set()

    def visit(module: tuple[str, ...], trail: tuple[tuple[str, ...], ...]) -> None:
        assert module not in trail, f"circle: {' -> '.join('.'.join(m) for m in (*trail, module))}"
        if module not in done:
            for target in edges.get(module, set()):
                visit(target, (*trail, module))
            done.add(module)

    for module in edges:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{path.name} has {lines} lines: it holds two things"


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
