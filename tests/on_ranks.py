"""What the processes that test_distributed.py launches do: make masks, and write down what each rank has.

    torchrun --nproc_per_node 2 tests/on_ranks.py OUT [TASK ...]
    torchrun --nproc_per_node 2 tests/on_ranks.py OUT graft.py [FLAG ...]

The engine is whatever the launcher says. Rank r writes OUT/<task>/rank<r>.json, and rank 0 alone the adapter beside it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

torch.set_num_threads(1)  # before the donor is trained: every process needs the same

from accelerate import Accelerator, PartialState  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from accelerate.utils import DeepSpeedPlugin, DistributedType  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import Trainer  # noqa: E402
from transformers.integrations import HfDeepSpeedConfig  # noqa: E402

import graft  # noqa: E402
import tasks  # noqa: E402
from grafts import graft as grafted  # noqa: E402
from grafts import held  # noqa: E402
from learning import Rows, learner, trainer  # noqa: E402
from models import inputs, perturbed, tiny_gpt2, tiny_llama, tiny_mamba, tiny_vit  # noqa: E402
from peft_graft import AlphaCallback, DonorObjectiveMixin, GraftConfig, fit_alpha, initialize_graft  # noqa: E402
from peft_graft.tuner.backends.sharded import is_sharded  # noqa: E402

BATCH = 4


class GraftTrainer(DonorObjectiveMixin, Trainer):
    """A Trainer with the objective of the config."""


def scores(out: Path) -> dict[str, Any]:
    """Every rule that looks at data, each rank with a part of the batches; alpha fitted on the parts too."""
    found: dict[str, Any] = {}
    state = PartialState()
    rows = [{key: value[i : i + BATCH] for key, value in Rows().batch.items()} for i in range(0, 16, BATCH)]
    mine = rows if state.num_processes == 1 else rows[:3] if state.is_main_process else rows[3:]
    for selection in ("taylor", "path_taylor", "fisher", "wanda", "sigmoid"):
        scope = "tensor" if selection == "taylor" else "global"
        model = learner(selection=selection, density=0.05, alpha="auto", alpha_scope=scope)
        fit = initialize_graft(model, mine, calibration=mine, show_progress_bar=False, steps=2)
        found[selection] = {"held": held(model), "alpha": fit.alpha, "loss": fit.loss}
    model = learner(selection="wanda", density=0.05)
    initialize_graft(model, rows if state.is_main_process else [], show_progress_bar=False)
    found["one_rank"] = held(model)
    other = learner(selection="fisher", density=0.05 + 0.01 * state.process_index)
    found["refused"] = [said(lambda: initialize_graft(other, mine, show_progress_bar=False))]
    return found


def trains(out: Path, **config: Any) -> dict[str, Any]:
    """A Trainer, with alpha fitted on the way; accumulates to the same rows per step whatever the number of ranks."""
    model = learner(density=0.05, alpha="auto", **config)
    accumulate = 4 // PartialState().num_processes
    options = {"average_tokens_across_devices": False, "gradient_accumulation_steps": accumulate, "max_grad_norm": 0}
    arguments = trainer(model, out / "checkpoints", **options).args
    callback = AlphaCallback([Rows().batch], head_start=1)
    run = GraftTrainer(model, arguments, train_dataset=Rows(), callbacks=[callback])
    run.train()
    if PartialState().is_main_process:
        run.model.save_pretrained(out / "adapter")
    PartialState().wait_for_everyone()
    return seen(run.model) | {"losses": [*callback.losses.values()]}


def follows(out: Path) -> dict[str, Any]:
    """The same with the donor's outputs for labels: each rank computes those of its share."""
    return trains(out, objective="donor")


def loops(out: Path) -> dict[str, Any]:
    """A loop over accelerator.prepare, as in Accelerate's own examples."""
    accelerator = prepared_for(BATCH, gradient_accumulation_steps=4 // PartialState().num_processes)
    model = learner(density=0.05)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Rows(), batch_size=BATCH))
    model.train()
    for _ in range(4):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
    state_dict = accelerator.get_state_dict(model)
    plain = accelerator.unwrap_model(model)
    if accelerator.is_main_process:
        plain.save_pretrained(out / "adapter", state_dict=state_dict)
    accelerator.wait_for_everyone()
    return seen(plain)


def prepared_for(batch: int, **options: Any) -> Accelerator:
    """An accelerator; DeepSpeed is told the size of a rank's batch, and not to clip gradients as it would."""
    accelerator = Accelerator(**options)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        config = accelerator.deepspeed_plugin.deepspeed_config
        config |= {"train_micro_batch_size_per_gpu": batch, "gradient_clipping": 0}
    return accelerator


def kinds(out: Path) -> dict[str, Any]:
    """Models that are hard to shard: in bfloat16, recomputed, tied, with bare parameters, with weights read afar."""
    models: dict[str, tuple[nn.Module, str, dict[str, Any]]] = {
        "llama": (tiny_llama(torch.bfloat16), "LlamaDecoderLayer", {}),
        "recomputed": (tiny_llama(seed=1), "LlamaDecoderLayer", {}),
        "gpt2": (tiny_gpt2(), "GPT2Block", {"target_modules": "all"}),
        "vit": (tiny_vit(), "ViTLayer", {"target_modules": "all"}),
        "mamba": (tiny_mamba(), "MambaBlock", {}),
    }
    found: dict[str, Any] = {}
    for name, (base, layer, options) in models.items():
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = layer
        accelerator = prepared_for(BATCH, gradient_accumulation_steps=2 // PartialState().num_processes)
        model = grafted(base, perturbed(base, scale=0.2), selection="learned", density=0.05, **options)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if name == "recomputed":
            plain = model.base_model.model  # by its name before and after transformers 5.20
            enable = getattr(plain, "activation_checkpointing_enable", None) or plain.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        halves = [{key: value[half::2] for key, value in inputs(base, batch=2 * BATCH).items()} for half in range(2)]
        model, optimizer = accelerator.prepare(model, optimizer)
        model.train()
        for batch in 3 * halves[accelerator.process_index :: accelerator.num_processes]:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
        plain = accelerator.unwrap_model(model)
        sharded = sum(is_sharded(parameter) for parameter in plain.parameters())
        fit = fit_alpha(model, halves, alpha_scope="tensor", show_progress_bar=False)
        plain.save_pretrained(out / name, is_main_process=accelerator.is_main_process)
        found[name] = {"alpha": fit.alpha, "loss": fit.loss, "sharded": sharded}
        AcceleratorState._reset_state()
    return found


def partitioned(out: Path) -> dict[str, Any]:
    """A base that ZeRO-3 partitions while it is loaded: no rank ever holds the whole of it."""
    state = PartialState()
    base = tiny_llama()
    if state.is_main_process:
        base.save_pretrained(out / "base")
        perturbed(base, scale=0.2).save_pretrained(out / "donor")
    state.wait_for_everyone()
    on_disk = {"donor": str(out / "donor"), "density": 0.05}
    if state.is_main_process:
        get_peft_model(tiny_llama(), GraftConfig(**on_disk)).save_pretrained(out / "wanted")
    state.wait_for_everyone()
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    keep = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero})

    def load() -> nn.Module:
        return type(base).from_pretrained(out / "base")

    model = get_peft_model(load(), GraftConfig(**on_disk))
    model.save_pretrained(out / "adapter", is_main_process=state.is_main_process)
    loaded = PeftModel.from_pretrained(load(), out / "wanted")
    scored = get_peft_model(load(), GraftConfig(**on_disk, selection="fisher"))
    del keep
    return {
        "held": [held(model), held(loaded)],
        "sharded": sum(is_sharded(parameter) for parameter in model.parameters()),
        "refused": [
            said(model.merge_adapter),
            said(lambda: initialize_graft(scored, [inputs(base)], show_progress_bar=False)),
        ],
    }


def shards(out: Path) -> dict[str, Any]:
    """The same loop over torch's own FSDP2, without Accelerate: half of every tensor on each of two ranks."""
    state, model = PartialState(), learner(density=0.05)
    for layer in model.base_model.model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batches = list(DataLoader(Rows(), batch_size=BATCH))[state.process_index :: state.num_processes]
    model.train()
    for _ in range(4):
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = seen(model)  # without gradients, so that the mask is settled
    model.save_pretrained(out / "adapter", is_main_process=state.is_main_process)
    return found | {"refused": refused(model)}


def refused(model: Any) -> list[str]:
    """What is said to who asks for what cannot be done with shards."""
    scored = learner(selection="fisher", density=0.05)
    fully_shard(scored)
    uneven = [Rows(2).batch] * (1 + PartialState().process_index)

    def save_while_training() -> None:
        model(**Rows(2).batch).loss.backward()
        with tempfile.TemporaryDirectory() as directory:
            model.save_pretrained(directory)

    return [
        said(model.merge_adapter),
        said(lambda: initialize_graft(scored, [Rows(2).batch], show_progress_bar=False)),
        said(lambda: fit_alpha(model, uneven, show_progress_bar=False)),
        said(save_while_training),
    ]


def said(attempt: Callable[[], Any]) -> str:
    """The message of the error."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return "nothing"


def seen(model: Any) -> dict[str, Any]:
    """What this rank has: its candidates, its mask, its alpha, and what the model says."""
    state = model.base_model.states["default"]
    sharded = sum(is_sharded(parameter) for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        logits = model(**Rows(8).batch).logits.tolist()
    masks = {name: state.mask(name).tolist() for name in state.logits()}
    return {"held": held(model), "masks": masks, "alpha": state.alpha, "logits": logits, "sharded": sharded}


USUAL = (scores, trains, follows, loops, shards)
TASKS: dict[str, Callable[[Path], dict[str, Any]]] = {task.__name__: task for task in (*USUAL, kinds, partitioned)}


def pretend_that_cpus_shard() -> None:
    """Let Accelerate shard on CPUs: it looks at what was asked for only where there are GPUs."""
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def use_gloo() -> None:
    """Let DeepSpeed's processes talk on CPUs too, where Accelerate chooses nothing by itself."""
    original = PartialState.__init__

    def init(self: PartialState, cpu: bool = False, **kwargs: Any) -> None:
        original(self, cpu, **(kwargs | {"backend": "gloo"}))

    PartialState.__init__ = init


def partition_everything() -> None:
    """Let ZeRO-3 partition the smallest parameters too: it would leave all of a tiny model whole."""
    original = DeepSpeedPlugin.__post_init__

    def post_init(self: DeepSpeedPlugin) -> None:
        original(self)
        self.hf_ds_config.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = post_init


def main() -> None:
    """Do the tasks, and write down the engine that did them."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        pretend_that_cpus_shard()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        use_gloo()
        partition_everything()
    tasks.launched()
    out, *names = sys.argv[1:]
    if names[:1] == ["graft.py"]:
        sys.argv = names
        graft.main()
        return
    for name in names or [task.__name__ for task in USUAL]:
        folder = Path(out) / name
        found = TASKS[name](folder)
        state = PartialState()
        found |= {"world": state.num_processes, "engine": state.distributed_type.value}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"rank{state.process_index}.json").write_text(json.dumps(found), encoding="utf-8")
        if AcceleratorState._shared_state:
            AcceleratorState._reset_state()  # keeps the group


if __name__ == "__main__":
    main()
