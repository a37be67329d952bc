"""The Accelerate files of examples/configs: Accelerate reads them, and its launcher understands every line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env

HAS_FSDP2 = "fsdp_version" in vars(launch_command_parser().parse_args(["examples/graft.py"]))
FOLDER = Path(__file__).parents[1] / "examples" / "configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
TYPES = {
    "fsdp2": DistributedType.FSDP,
    "multi_gpu": DistributedType.MULTI_GPU,
    "multi_node": DistributedType.MULTI_GPU,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def test_there_is_a_file_for_every_engine() -> None:
    assert {path.stem for path in CONFIGS} == TYPES.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_the_file(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.distributed_type == TYPES[path.stem]
    assert config.mixed_precision == "no" and config.use_cpu is False


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_launcher_has_a_flag_for_every_line_about_an_engine(path: Path) -> None:
    if path.stem == "fsdp2" and not HAS_FSDP2:
        pytest.skip("FSDP2 needs accelerate >= 1.6")
    known = vars(launch_command_parser().parse_args(["examples/graft.py"])).keys()
    lines = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {**lines.get("fsdp_config", {}), **lines.get("deepspeed_config", {})}.keys() <= known


@pytest.mark.skipif(not HAS_FSDP2, reason="FSDP2 needs accelerate >= 1.6")
def test_fsdp_is_version_2_with_sharded_checkpoints() -> None:
    flags = ["--config_file", str(FOLDER / "fsdp2.yaml"), "--num_processes", "2", "examples/graft.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(flags))
    told = prepare_multi_gpu_env(arguments)
    assert told["ACCELERATE_USE_FSDP"] == "true" and told["FSDP_VERSION"] == "2"
    assert told["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"
    assert told["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"
    assert told["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_deepspeed_has_the_stage_of_its_name_and_leaves_loading_alone() -> None:
    for stage in (2, 3):
        config = load_config_from_file(str(FOLDER / f"zero{stage}.yaml")).deepspeed_config
        assert config["zero_stage"] == stage
    assert config["zero3_init_flag"] is False and config["zero3_save_16bit_model"] is True


def test_several_machines_are_counted_together() -> None:
    config = load_config_from_file(str(FOLDER / "multi_node.yaml"))
    assert config.num_machines > 1 and config.num_processes % config.num_machines == 0
