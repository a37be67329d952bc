"""Real processes: one mask whatever the engine and the number of ranks, one writer, and runs that survive a kill."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

import on_ranks
from learning import learner, trainer
from peft_graft.training.callbacks import last_checkpoint

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "examples" / "configs"
PROGRAM = str(ROOT / "tests" / "on_ranks.py")
SHARDING = ("zero3", "fsdp2")
SECONDS = 600

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="deepspeed is not installed (DS_BUILD_OPS=0 pip install --no-build-isolation --no-deps deepspeed)",
)
ENGINES = [
    pytest.param("ddp"),
    pytest.param("fsdp2"),
    pytest.param("zero2", marks=needs_deepspeed),
    pytest.param("zero3", marks=needs_deepspeed),
]


def start(engine: str, out: Path, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """Launch two processes under an engine, with the configuration that the examples have for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    path = os.pathsep.join([*(str(ROOT / name) for name in ("src", "tests", "examples")), *sys.path[1:]])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    if engine == "ddp":
        command = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
        environment["ACCELERATE_USE_CPU"] = "true"
    else:
        command = ["accelerate.commands.launch", "--config_file", str(CONFIGS / f"{engine}.yaml")]
        command += ["--num_processes", "2", "--main_process_port", port]
    if engine == "fsdp2":
        # Accelerate 1.15 would shard BERT's embeddings twice.
        command += ["--fsdp_transformer_layer_cls_to_wrap", "BertLayer"]
        environment["ACCELERATE_USE_CPU"] = "true"
    if engine.startswith("zero"):
        environment.pop("ACCELERATE_USE_CPU", None)  # Accelerate would forget DeepSpeed
        environment["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, "-m", *command, PROGRAM, str(out), *arguments]
    with log.open("wb") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)


def launch(engine: str, out: Path, *arguments: str) -> None:
    """Run two processes to their end, which must be a good one."""
    out.mkdir(parents=True, exist_ok=True)
    log = out / "log.txt"
    process = start(engine, out, *arguments, log=log)
    try:
        status = process.wait(SECONDS)
    finally:
        stop(process)
    assert status == 0, log.read_text(encoding="utf-8", errors="replace")[-4000:]


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a launcher and its processes, if they are still there."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()
        process.wait()


def found(out: Path, task: str) -> list[dict[str, Any]]:
    """What each of the two ranks has written down."""
    return [json.loads((out / task / f"rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def adapter(out: Path) -> bytes:
    """The tensors that rank 0 has saved."""
    return (out / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """What one process finds by itself."""
    out = tmp_path_factory.mktemp("alone")
    results = {}
    for name in ("scores", "trains", "follows", "loops"):
        results[name] = on_ranks.TASKS[name](out / name)
        AcceleratorState._reset_state(reset_partial_state=True)
    yield out, results
    PartialState._reset_state()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes find under DDP, and with torch's own FSDP2."""
    out = tmp_path_factory.mktemp("together")
    launch("ddp", out)
    return out


def test_there_are_two_processes(together: Path) -> None:
    for task in ("scores", "trains", "follows", "loops", "shards"):
        assert [rank["world"] for rank in found(together, task)] == [2, 2]


@pytest.mark.parametrize("selection", ["taylor", "path_taylor", "fisher", "wanda", "sigmoid"])
def test_ranks_that_share_the_batches_find_the_mask_of_one_process(
    selection: str, alone: tuple[Path, dict[str, Any]], together: Path
) -> None:
    wanted = alone[1]["scores"][selection]
    for rank in found(together, "scores"):
        assert rank[selection]["held"] == wanted["held"]
        assert rank[selection]["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert rank[selection]["alpha"] == pytest.approx(wanted["alpha"], rel=1e-3)
    one, two = found(together, "scores")
    assert one[selection] == two[selection]


def test_a_rank_may_have_no_batches(alone: tuple[Path, dict[str, Any]], together: Path) -> None:
    for rank in found(together, "scores"):
        assert rank["one_rank"] == alone[1]["scores"]["wanda"]["held"]


def test_ranks_that_find_different_masks_are_told(together: Path) -> None:
    for rank in found(together, "scores"):
        assert "mask must be the same on every rank, got digests from" in rank["refused"][0]


@pytest.mark.feature("DDP and FSDP2")
@pytest.mark.parametrize("task", ["trains", "follows", "loops", "shards"])
def test_two_processes_learn_the_mask_of_one_that_accumulates(
    task: str, alone: tuple[Path, dict[str, Any]], together: Path
) -> None:
    out, results = alone
    task_alone = "loops" if task == "shards" else task
    assert_same(found(together, task), results[task_alone])
    assert adapter(together / task / "adapter") == adapter(out / task_alone / "adapter")
    assert all((rank["sharded"] > 0) == (task == "shards") for rank in found(together, task))


def assert_same(ranks: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    """Every rank has the mask and the scale of one process, and the model says the same."""
    for rank in ranks:
        assert {key: rank[key] for key in ("held", "masks", "alpha")} == {
            key: wanted[key] for key in ("held", "masks", "alpha")
        }
        torch.testing.assert_close(torch.tensor(rank["logits"]), torch.tensor(wanted["logits"]))


def test_the_masks_have_changed_in_training(alone: tuple[Path, dict[str, Any]]) -> None:
    start = learner(density=0.05).base_model.states["default"]
    for task in ("trains", "follows", "loops"):
        assert alone[1][task]["masks"] != {name: start.mask(name).tolist() for name in start.logits()}


def test_what_shards_cannot_do_is_refused_with_a_remedy(together: Path) -> None:
    wanted = [
        ("parameters must be whole to be merged, got ", "merge it in a model that is not sharded"),
        ("parameters must be whole to be scored on data, got 36 ", "Call initialize_graft before accelerator.prepare"),
        ("dataloader must hold as many batches on every rank of a sharded model, got 1 to 2. ", "Give every rank all"),
        ("mask logits must be whole to be saved, got shards. ", "state_dict=accelerator.get_state_dict(model)"),
    ]
    for rank in found(together, "shards"):
        assert len(rank["refused"]) == len(wanted)
        for said, (what, remedy) in zip(rank["refused"], wanted, strict=True):
            assert what in said and remedy in said


def test_one_process_goes_on_where_two_were(together: Path) -> None:
    checkpoint = last_checkpoint(together / "trains" / "checkpoints")
    assert checkpoint is not None and checkpoint.endswith("checkpoint-4")
    run = trainer(learner(density=0.05, alpha="auto"), together / "on", steps=6)
    run.train(resume_from_checkpoint=checkpoint)
    assert run.state.global_step == 6


# Every engine, with the files of examples/configs


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES[1:])
def test_every_engine_learns_the_mask_of_one_process(
    engine: str, alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, results = alone
    launch(engine, tmp_path, "trains", "follows", "loops")
    for task in ("trains", "follows", "loops"):
        ranks = found(tmp_path, task)
        assert {rank["world"] for rank in ranks} == {2}
        assert {rank["engine"] for rank in ranks} == {"FSDP" if engine == "fsdp2" else "DEEPSPEED"}
        assert {rank["sharded"] > 0 for rank in ranks} == {engine in SHARDING}
        assert_same(ranks, results[task])
        assert adapter(tmp_path / task / "adapter") == adapter(out / task / "adapter")


@pytest.fixture(scope="module")
def kinds_alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What one process finds for models of many kinds."""
    out = tmp_path_factory.mktemp("kinds")
    return out, on_ranks.kinds(out)


@pytest.mark.slow
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine.values[0] != "zero2"])
def test_every_kind_of_model_can_be_sharded(
    engine: str, kinds_alone: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, wanted = kinds_alone
    launch(engine, tmp_path, "kinds")
    one, two = found(tmp_path, "kinds")
    assert one == two and one["world"] == 2
    for name, alone in wanted.items():
        assert adapter(tmp_path / "kinds" / name) == adapter(out / name), name
        assert one[name]["loss"] == pytest.approx(alone["loss"], rel=1e-3)
        assert (one[name]["sharded"] > 0) == (engine in SHARDING)


@pytest.mark.slow
@needs_deepspeed
def test_a_base_that_was_never_whole_is_grafted_without_data(tmp_path: Path) -> None:
    launch("zero3", tmp_path, "partitioned")
    for rank in found(tmp_path, "partitioned"):
        assert rank["sharded"] > 0 and rank["held"][0] == rank["held"][1]
        assert "merge it in a model that is not sharded" in rank["refused"][0]
        assert "on a base loaded without zero.Init" in rank["refused"][1]
    assert adapter(tmp_path / "partitioned" / "adapter") == adapter(tmp_path / "partitioned" / "wanted")


def flags(world: dict[str, str], out: Path) -> list[str]:
    """What to tell the example."""
    options = {"density": 0.05, "calibration_samples": 32, "max_train_samples": 64, "skip_train_samples": 64}
    options |= {"batch_size": 8, "epochs": 5, "save_steps": 2, "resume_from_checkpoint": "last", "output_dir": out}
    return ["graft.py", *(part for name, value in (world | options).items() for part in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def example(world: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What examples/graft.py makes of two undisturbed processes."""
    out = tmp_path_factory.mktemp("example")
    launch("ddp", out, *flags(world, out))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_example_survives_the_kill_of_a_rank(
    engine: str,
    rank: int,
    example: Path,
    world: dict[str, str],
    tmp_path: Path,
) -> None:
    """It is killed while it writes a checkpoint; the same command again goes on, and ends as if nothing had been."""
    log = tmp_path / "log.txt"
    process = start(engine, tmp_path, *flags(world, tmp_path), log=log)
    checkpoints, waits = tmp_path / "checkpoints", time.monotonic() + SECONDS
    try:
        while not (checkpoints / "checkpoint-8").exists():
            assert process.poll() is None and time.monotonic() < waits, log.read_text(errors="replace")[-4000:]
            time.sleep(0.001)
        ranks = psutil.Process(process.pid).children(recursive=True)
        next(child for child in ranks if child.environ().get("RANK") == str(rank)).send_signal(signal.SIGKILL)
        assert process.wait(SECONDS) != 0
    finally:
        stop(process)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    kept = last_checkpoint(checkpoints)
    assert kept is not None and int(kept.rpartition("-")[2]) >= 6
    launch(engine, tmp_path, *flags(world, tmp_path))
    assert adapter(tmp_path) == adapter(example)
    reports = [json.loads((out / "metrics.json").read_text(encoding="utf-8")) for out in (tmp_path, example)]
    assert reports[0]["alpha"] == reports[1]["alpha"]
