"""Every task type: data-driven rules with a fitted alpha, and a mask learned by a Trainer, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.functional import mse_loss
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForTokenClassification,
    BertModel,
    Trainer,
    TrainingArguments,
)

from grafts import MLP, held, same_bits
from models import VOCAB_SIZE, inputs, perturbed, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, word_tokenizer
from peft_graft import GraftConfig, fit_alpha, initialize_graft

Batch = dict[str, torch.Tensor]


def _loss_of_states(model: nn.Module, batch: Batch) -> torch.Tensor:
    """For what has no loss of its own: how far numbers in its two outputs are from the label."""
    output = model(batch["input_ids"])
    return mse_loss(output.last_hidden_state[:, 0, 0] + output.pooler_output[:, 0], batch["labels"])


def _loss_of_outputs(model: nn.Module, batch: Batch) -> torch.Tensor:
    return mse_loss(model(batch["x"]), batch["labels"])


class Task(NamedTuple):
    """A tiny model of one task type."""

    make: Callable[[], nn.Module]
    task_type: str | None
    loss_fn: Callable[[nn.Module, Batch], torch.Tensor] | None = None


def _known(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build().eval()

    return make


def _without_dropout() -> BertConfig:
    config = tiny_bert().config
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return config


TASKS = {
    "SEQ_CLS": Task(tiny_bert, "SEQ_CLS"),
    "TOKEN_CLS": Task(_known(lambda: BertForTokenClassification(_without_dropout())), "TOKEN_CLS"),
    "QUESTION_ANS": Task(_known(lambda: BertForQuestionAnswering(_without_dropout())), "QUESTION_ANS"),
    "CAUSAL_LM": Task(tiny_gpt2, "CAUSAL_LM"),
    "SEQ_2_SEQ_LM": Task(tiny_t5, "SEQ_2_SEQ_LM"),
    "FEATURE_EXTRACTION": Task(_known(lambda: BertModel(_without_dropout())), "FEATURE_EXTRACTION", _loss_of_states),
    "none": Task(_known(lambda: MLP(width=64)), None, _loss_of_outputs),
}
EVERY_TASK = pytest.mark.parametrize("task", sorted(TASKS))


def rows(task: str, count: int, seed: int) -> Batch:
    """A batch of random rows with random labels."""
    generator = torch.Generator().manual_seed(seed)

    def whole(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, (count, *shape), generator=generator)

    if task == "none":
        return {"x": torch.randn(count, 4, generator=generator), "labels": torch.randn(count, 3, generator=generator)}
    if task in ("SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        return inputs(TASKS[task].make(), batch=count, seed=seed)
    ids = {"input_ids": whole(VOCAB_SIZE, 7)}
    if task == "TOKEN_CLS":
        return ids | {"labels": whole(2, 7)}
    if task == "QUESTION_ANS":
        return ids | {"start_positions": whole(7), "end_positions": whole(7)}
    return ids | {"labels": torch.randn(count, generator=generator)}


def loss_of(task: str) -> dict[str, Any]:
    loss_fn = TASKS[task].loss_fn
    return {} if loss_fn is None else {"loss_fn": loss_fn}


def loss(task: str, model: nn.Module, batch: Batch) -> torch.Tensor:
    loss_fn = TASKS[task].loss_fn
    with torch.no_grad():
        return model.eval()(**batch).loss if loss_fn is None else loss_fn(model.eval(), batch)


def learned_donor(task: str) -> nn.Module:
    """The base after a few steps on the rows, so that there is a skill to find."""
    donor, batch = TASKS[task].make(), rows(task, 12, seed=0)
    optimizer = torch.optim.AdamW(donor.parameters(), lr=3e-3)
    for _ in range(15):
        optimizer.zero_grad()
        loss_fn = TASKS[task].loss_fn
        (donor(**batch).loss if loss_fn is None else loss_fn(donor, batch)).backward()
        optimizer.step()
    return donor.eval()


@pytest.mark.feature("data-driven rules and fitted alpha under every task type")
@pytest.mark.parametrize("selection", ["path_taylor", "fisher", "wanda"])
@EVERY_TASK
def test_a_data_driven_graft_is_made_saved_and_loaded(task: str, selection: str, tmp_path: Path) -> None:
    make, task_type, _ = TASKS[task]
    base, donor = make(), perturbed(make(), scale=0.1)
    config = GraftConfig(donor=donor, num_params=40, selection=selection, alpha="auto", task_type=task_type)
    model = get_peft_model(copy.deepcopy(base), config)
    batches = [rows(task, 3, seed) for seed in range(4)]
    fit = initialize_graft(model, batches, show_progress_bar=False, **loss_of(task))
    assert sum(map(len, held(model).values())) == 40
    assert fit is not None and fit.loss <= fit.loss_at_one and model.peft_config["default"].alpha == fit.alpha
    assert not [name for name, p in model.named_parameters() if p.requires_grad]
    wanted = loss(task, model, batches[0])
    assert wanted != loss(task, base, batches[0])
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert same_bits(loss(task, loaded, batches[0]), wanted)
    loaded.merge_adapter()
    assert same_bits(loss(task, loaded, batches[0]), wanted)


class Rows(torch.utils.data.Dataset):
    """Rows as a Trainer takes them."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(next(iter(self.batch.values())))

    def __getitem__(self, index: int) -> Batch:
        return {key: value[index] for key, value in self.batch.items()}


class LossTrainer(Trainer):
    """Takes the loss from a function, as one does for a model without one."""

    def __init__(self, loss_fn: Callable[[nn.Module, Batch], torch.Tensor], **options: Any) -> None:
        self.loss_fn = loss_fn
        super().__init__(**options)

    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, **_: Any) -> Any:
        value = self.loss_fn(model, inputs)
        return (value, None) if return_outputs else value


@pytest.mark.feature("a mask learned by Trainer under every task type")
@EVERY_TASK
def test_a_trainer_learns_a_mask(task: str, tmp_path: Path) -> None:
    make, task_type, loss_fn = TASKS[task]
    base, donor, batch = make(), learned_donor(task), rows(task, 12, seed=0)
    config = GraftConfig(donor=donor, density=0.02, selection="learned", alpha="auto", task_type=task_type)
    model = get_peft_model(copy.deepcopy(base), config)
    initialize_graft(model, [batch], show_progress_bar=False, **loss_of(task))
    start = loss(task, model, batch)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=20, per_device_train_batch_size=6, learning_rate=0.02,
        lr_scheduler_type="constant", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        report_to="none", remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    options: dict[str, Any] = {"model": model, "args": arguments, "train_dataset": Rows(batch)}
    (Trainer(**options) if loss_fn is None else LossTrainer(loss_fn, **options)).train()
    fit_alpha(model, [batch], show_progress_bar=False, **loss_of(task))
    wanted = loss(task, model, batch)
    assert wanted < start < loss(task, base, batch)
    model.save_pretrained(tmp_path / "skill")
    loaded = PeftModel.from_pretrained(make(), tmp_path / "skill")
    assert same_bits(loss(task, loaded, batch), wanted)
    assert sum(map(len, held(loaded).values())) == model.peft_config["default"].record.entries


@pytest.mark.filterwarnings("ignore:.*(deprecated|TorchScript):DeprecationWarning", "ignore:.*deprecated:FutureWarning")
@pytest.mark.feature("TRL's SFTTrainer trains a learned mask")
@pytest.mark.parametrize("way", ["model", "peft_config"])
def test_trl_trains_a_mask(way: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    base, batch = tiny_llama(), inputs(tiny_llama())
    config = GraftConfig(donor=perturbed(base, scale=0.3), density=0.02, selection="learned", task_type="CAUSAL_LM")
    start = held(get_peft_model(tiny_llama(), config))
    texts = [" ".join(f"t{(7 * row + word) % 60 + 1}" for word in range(8)) for row in range(12)]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=6, per_device_train_batch_size=4, learning_rate=0.3, max_length=16,
        save_strategy="no", logging_strategy="no", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=get_peft_model(base, config) if way == "model" else base,
        peft_config=None if way == "model" else config,
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"text": text} for text in texts]),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    logits = [p for p in trainer.model.parameters() if p.requires_grad]
    assert logits and all(not torch.equal(p, torch.ones_like(p)) for p in logits)
    trainer.save_model(str(tmp_path / "skill"))
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "skill")
    count = trainer.model.peft_config["default"].record.entries
    assert sum(map(len, held(loaded).values())) == count < sum(map(len, start.values()))
    with torch.no_grad():
        assert same_bits(loaded.eval()(**batch).logits, trainer.model.eval()(**batch).logits)
