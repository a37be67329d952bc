"""A small learned mask to train: rows, a base, a donor that knows the rows, and a Trainer without chance."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from grafts import graft
from models import inputs, tiny_bert


class Rows(torch.utils.data.Dataset):
    """A few labelled rows of random tokens."""

    def __init__(self, count: int = 16) -> None:
        self.batch = inputs(tiny_bert(), batch=count)

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index] for key, value in self.batch.items()}


def world() -> tuple[nn.Module, nn.Module]:
    """A base, and a donor that has learned the rows."""
    base = tiny_bert()
    base.config.hidden_dropout_prob = base.config.attention_probs_dropout_prob = 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = BertForSequenceClassification(BertConfig(**base.config.to_dict())).eval()
    donor, batch = copy.deepcopy(base), Rows().batch
    optimizer = torch.optim.AdamW(donor.parameters(), lr=1e-2)
    for _ in range(20):
        optimizer.zero_grad()
        donor(**batch).loss.backward()
        optimizer.step()
    return base, donor


BASE, DONOR = world()


def learner(**options: Any) -> PeftModel:
    options = {"density": 0.02, "selection": "learned", "task_type": "SEQ_CLS"} | options
    return graft(BASE, DONOR, **options)


def trainer(model: PeftModel, out: Path, steps: int = 4, callbacks: list[Any] | None = None, **options: Any) -> Trainer:
    defaults = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    arguments = TrainingArguments(output_dir=str(out), **(defaults | options))
    return Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(8), callbacks=callbacks)
