"""Private names of other libraries: all in one table, all there, used nowhere else, and shown in the documentation."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft.tuners import tuners_utils
from peft.utils import other
from torch import nn

import peft_graft
from peft_graft.peft_compat import peft_names, private_names, torch_names
from peft_graft.peft_compat.private_names import AT_IMPORT, LIBRARIES, NAMES, PrivateName, is_there, require_names
from peft_graft.peft_compat.transformers_names import is_experts

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "peft_graft"
PAGE = ROOT / "docs" / "private_names.md"
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name != "peft_compat")
OTHERS = {*LIBRARIES, "safetensors", "bitsandbytes", "torchao", "deepspeed"}
LAST = {row.name.rpartition(".")[2]: row for row in NAMES}
_HEAD = """# Private names

Names of other libraries that their documentation does not promise, and what this package needs them for. They are in
`peft_graft/peft_compat/`, and nowhere else; importing `peft_graft` checks that the installed versions have them and, if
not, says which are missing. Of the libraries that few need, the tests named here would notice.

Written by `python tests/peft_compat/test_private_names.py`.

"""


def page() -> str:
    """The page of the documentation that shows the table."""
    lines = ["| Name | Used to | Checked |", "| --- | --- | --- |"]
    for row in NAMES:
        shown = f"{row.name}({', '.join(row.parameters)})" if row.parameters else row.name
        lines.append(f"| `{shown}` | {row.why} | {row.checked} |")
    return _HEAD + "\n".join(lines) + "\n"


# The table


def test_the_documentation_shows_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python tests/peft_compat/test_private_names.py`"


def test_rows_are_unique_and_what_checks_them_exists() -> None:
    assert len({row.name for row in NAMES}) == len(NAMES) == len(LAST)
    for row in NAMES:
        named = re.match(r"tests/\S+\.py", row.checked)
        assert row.checked == AT_IMPORT or not row.checked.startswith("tests/") or (ROOT / named[0]).is_file(), row.name
        assert row.library in LIBRARIES or row.checked != AT_IMPORT


def test_versions_are_those_of_the_project() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    for library, versions in LIBRARIES.items():
        name = library.replace("_", "-")
        assert f"{name}{versions.supported}" in declared
        assert f"{name}=={versions.tested}" in pinned


@pytest.mark.parametrize("row", [row for row in NAMES if row.library in LIBRARIES], ids=lambda row: row.name)
def test_every_name_is_there(row: PrivateName) -> None:
    if row.checked == AT_IMPORT:
        assert is_there(row)
        assert not is_there(row._replace(name=f"{row.name}_gone", set_by=row.set_by))


def test_a_module_in_fsdp_is_under_its_name() -> None:
    from torch.distributed.fsdp import _common_utils

    assert _common_utils.FSDP_WRAPPED_MODULE == torch_names.FSDP_WRAPPED


def test_experts_of_transformers_bear_their_mark() -> None:
    config = transformers.MixtralConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = transformers.MixtralModel(config)
    if transformers.__version__ < "5.2":
        pytest.skip("transformers 5.0 has no mark")
    assert is_experts(model.layers[0].mlp.experts) and not is_experts(nn.Linear(1, 1))


# What is missing


@pytest.mark.feature("a PEFT before 0.21", "no: ImportError at once, which names the versions")
@pytest.mark.parametrize(
    ("owner", "name", "missing"),
    [
        (tuners_utils.BaseTuner, "_replace_module", r"\S+\.BaseTuner\._replace_module\(parent, child_name, new_module"),
        (tuners_utils.BaseTuner, "_get_adapter_state_dict", r"\S+\.BaseTuner\._get_adapter_state_dict"),
        (tuners_utils, "check_adapters_to_merge", r"\S+\.tuners_utils\.check_adapters_to_merge"),
        (peft.PeftModel, "_enable_peft_forward_hooks", r"peft\.PeftModel\._enable_peft_forward_hooks"),
    ],
)
def test_a_peft_without_what_is_needed_is_refused_by_name(
    owner: object, name: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_names()
    monkeypatch.delattr(owner, name)
    monkeypatch.setattr(private_names, "version", lambda library: {"peft": "0.12.0"}[library])
    wanted = rf"peft 0\.12\.0 lacks {missing}.*Supported are peft>=0\.21;.*pip install peft=={LIBRARIES['peft'].tested}"
    with pytest.raises(ImportError, match=wanted):
        require_names()
    require_names("torch", "transformers")


def test_a_hook_with_other_parameters_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuners_utils.BaseTuner, "inject_adapter", lambda self, model, adapter_name: None)
    with pytest.raises(ImportError, match=r"lacks peft\.tuners\.tuners_utils\.BaseTuner\.inject_adapter\(model, "):
        require_names("peft")


def test_attributes_of_instances_are_looked_for_where_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.hooks.add_hook_to_module", lambda module, hook: setattr(module, "_hook", hook))
    with pytest.raises(ImportError, match=r"accelerate \S+ lacks accelerate\.hooks\.ModelHook\._hf_hook\. Supported"):
        require_names()
    monkeypatch.delattr("accelerate.hooks.add_hook_to_module")
    with pytest.raises(ImportError, match=r"accelerate\.hooks\.ModelHook\._hf_hook"):
        require_names()


def test_one_message_names_what_all_libraries_lack() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r})\n"
        + """
import torch, transformers.core_model_loading, peft.utils.other
del torch._C.DisableTorchFunctionSubclass, transformers.core_model_loading.dot_natural_key
del peft.utils.other._get_submodules
try:
    import peft_graft
except ImportError as error:
    print(error)
"""
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"torch \S+ lacks torch\._C\.DisableTorch\w+; transformers \S+ lacks \S+dot_natural_key\(s\); peft \S+ lacks "
        r"peft\.utils\.other\._get_submodules\(model, key\)\. Supported are torch>=\S+, transformers>=\S+, peft>=\S+;",
        done.stdout,
    ), done.stdout


# Nowhere else


def _is_private(name: str) -> bool:
    public = ("_replace", "_asdict", "_make", "_fields", "_field_defaults")  # of every NamedTuple
    return bool(re.fullmatch(r"_[A-Za-z]\w*", name)) and name not in public


def _own_names(trees: dict[Path, ast.Module]) -> set[str]:
    """Private names that the package itself defines, somewhere."""
    found = {path.stem for path in trees}
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
    return found


def offences(tree: ast.Module, own: set[str]) -> Iterator[str]:
    """Find private names of other libraries that have no row, or must be taken from `peft_compat`."""
    pieces = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in OTHERS:
            path = f"{node.module}."
            hidden = [part for part in node.module.split(".") if _is_private(part)]
            listed = [a.name for a in node.names if _is_private(a.name) or path + a.name in {r.name for r in NAMES}]
            yield from (f"line {node.lineno}: {node.module} imported for {name}" for name in hidden + listed)
        elif isinstance(node, ast.Import):
            names = [part for a in node.names if a.name.split(".")[0] in OTHERS for part in a.name.split(".")]
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in pieces:
            names = [node.value.removesuffix(".")]
        for name in names:
            row = LAST.get(name)
            if (_needs_row(row) and not row.elsewhere) if row else (_is_private(name) and name not in own):
                yield f"line {node.lineno}: {name}"


def _needs_row(row: PrivateName) -> bool:
    """Whether a name is surely the library's: other rooms have public names from `peft_compat`."""
    last = row.name.rpartition(".")[2]
    return _is_private(last) or row.library in ("bitsandbytes", "deepspeed")


TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
OWN = _own_names(TREES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_private_names_of_others_are_in_one_room(path: Path) -> None:
    assert list(offences(TREES[path], OWN)) == []


@pytest.mark.parametrize(
    "source",
    [
        "from peft.utils.other import _get_submodules",
        "from peft.tuners.tuners_utils import check_target_module_exists",
        "def f():\n    from transformers.models._private import x",
        "import torch._dynamo",
        "torch._C.DisableTorchFunctionSubclass()",
        "torch.ops.aten._unsafe_view(x, x.shape)",
        "tensor._version",
        "getattr(module, '_hf_hook', None)",
        "inner.removeprefix('_fsdp_wrapped_module.')",
        "name.replace('_orig_mod.', '')",
        "model._tied_weights_keys",
        "hasattr(parameter, 'ds_tensor')",
    ],
)
def test_private_names_are_seen(source: str) -> None:
    assert len(list(offences(ast.parse(source), OWN))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "module._parameters['weight']",
        "self._own\nself._own = 1",
        "from .state_dict import _private",
        "from peft import PeftModel",
        "point._replace(x=1)",
        "f'{name}_logits'",
        "super()._check_merge_allowed()",
    ],
)
def test_others_are_not_complained_about(source: str) -> None:
    tree = ast.parse(source)
    assert list(offences(tree, _own_names({Path("x.py"): tree}))) == []


def overridden() -> Iterator[tuple[type, str, object]]:
    """Private methods of our classes that a class of another library has too: class, name, the other's method."""
    for info in pkgutil.walk_packages(peft_graft.__path__, "peft_graft."):
        if info.name == "peft_graft.vllm.engine":  # a class of vLLM's, which few have
            continue
        module = importlib.import_module(info.name) if not info.name.endswith("__main__") else peft_graft
        for cls in vars(module).values():
            if not inspect.isclass(cls) or cls.__module__ != info.name:
                continue
            for name, method in vars(cls).items():
                if _is_private(name) and (inspect.isroutine(method) or isinstance(method, classmethod | property)):
                    bases = [base for base in cls.__mro__[1:] if base.__module__.split(".")[0] in OTHERS]
                    yield from ((cls, name, vars(base)[name]) for base in bases if name in vars(base))


def test_overridden_hooks_have_rows_and_take_what_the_library_passes() -> None:
    found = list(overridden())
    assert {name for _, name, _ in found} >= {"_create_and_replace", "_replace_module", "_get_adapter_state_dict"}
    for cls, name, hook in found:
        row = LAST.get(name)
        assert row is not None and row.elsewhere, f"{cls.__name__}.{name} overrides a private method without a row"
        theirs = list(inspect.signature(getattr(hook, "__func__", hook)).parameters.values())[1:]
        named = [each.name for each in theirs if each.kind is not inspect.Parameter.VAR_KEYWORD]
        ours = inspect.signature(getattr(vars(cls)[name], "__func__", vars(cls)[name])).parameters
        takes_all = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= {p.kind for p in ours.values()}
        assert takes_all or set(named) <= set(ours), f"{cls.__name__}.{name} lacks {set(named) - set(ours)}"
        assert set(row.parameters) <= set(named)


def test_names_come_without_the_underscore() -> None:
    parent, target, name = peft_names.get_submodules(nn.Sequential(nn.Linear(1, 1)), "0")
    assert name == "0" and target is parent[0]
    assert peft_names.get_submodules is other._get_submodules
    tensor = torch.zeros(2)
    before = torch_names.version_of(tensor)
    tensor.add_(1)
    assert torch_names.version_of(tensor) == before + 1


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
