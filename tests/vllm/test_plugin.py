"""vLLM finds the engine by an entry point that loads nothing of the package."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import vllm_stand_in

ROOT = Path(__file__).parents[2]


def test_the_entry_point_registers_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_stand_in.forget(monkeypatch)
    vllm_stand_in.install_stand_in(monkeypatch)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, function = project["entry-points"]["vllm.general_plugins"]["peft_graft"].split(":")
    register = getattr(import_module(module), function)
    register()
    register()  # vLLM may call it again, and refuses a second engine of the name
    made = vllm_stand_in.WeightTransferEngineFactory._registry["peft_graft"]()
    assert made.__name__ == "GraftWeightTransferEngine"
    vllm_stand_in.forget(monkeypatch)


def test_registering_waits_for_neither_peft_nor_torch() -> None:
    code = (
        "import sys, types\n"
        "factory = types.ModuleType('factory')\n"
        "factory.WeightTransferEngineFactory = types.SimpleNamespace(register_engine=print)\n"
        "sys.modules['vllm.distributed.weight_transfer.factory'] = factory\n"
        "for name in ('vllm', 'vllm.distributed', 'vllm.distributed.weight_transfer'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "import _peft_graft_vllm\n"
        "_peft_graft_vllm.register()\n"
        "print({'torch', 'peft', 'peft_graft'} & sys.modules.keys())\n"
    )
    source = str(ROOT / "src")
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": source}, cwd=ROOT
    )
    assert ran.stdout == "peft_graft peft_graft.vllm.engine GraftWeightTransferEngine\nset()\n", ran.stderr


def test_an_older_vllm_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_stand_in.forget(monkeypatch)
    monkeypatch.setitem(sys.modules, "vllm", None)
    import_module("_peft_graft_vllm").register()
    vllm_stand_in.forget(monkeypatch)
