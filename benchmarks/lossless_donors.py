"""Fine-tune donors of a causal LM on text, on one CPU core, for benchmarks/lossless.py.

    python benchmarks/lossless_donors.py --base path/to/SmolLM2-135M-Instruct --text train.jsonl --output-dir donors

Every donor is saved in bfloat16, like its base, and they differ in how they got there:

- `bf16`: weights, gradients and AdamW's states are bfloat16. An update that is smaller than half a step of bfloat16
  is lost, so most entries stay as they were.
- `master`: AdamW on float32 weights, rounded to bfloat16 at the end.
- `master_small_lr`: the same at a learning rate as reinforcement learning uses it.
- `lora`: a LoRA of rank 16, merged into the base.

The rows of `--text` have a `prompt` and a `completion`, or a `text`. A donor that is there already is
not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

from flags import Flags

LEARNING_RATES = {"bf16": 5e-5, "master": 5e-5, "master_small_lr": 1e-6, "lora": 2e-4}


def batches(args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Yield token ids, int64 [batch, length]: all texts one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    ids: list[int] = []
    with args.text.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            text = row.get("text") or f"{row['prompt']}\n{row['completion']}"
            ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            if len(ids) >= args.batch * args.length:
                yield torch.tensor(ids[: args.batch * args.length]).view(args.batch, args.length)
                ids = []


def train(kind: str, args: argparse.Namespace) -> nn.Module:
    """Fine-tune a copy of the base and return it in bfloat16."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    if kind == "bf16":  # computed in float32, which is faster on a CPU; weights, gradients and states are bfloat16
        trained = {name: nn.Parameter(each.detach().bfloat16()) for name, each in trained.items()}
    rate = LEARNING_RATES[kind]
    optimizer = torch.optim.AdamW(trained.values(), rate, weight_decay=0.0)
    warmup = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / (args.steps - warmup))
    )
    began = time.perf_counter()
    for step, ids in zip(range(args.steps), batches(args), strict=False):
        inputs = {"input_ids": ids, "labels": ids}
        weights = {name: each.float() for name, each in trained.items()}
        loss = functional_call(model, weights, kwargs=inputs).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"{kind} {step}: loss {loss.item():.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    if kind == "bf16":
        model.load_state_dict(trained, strict=False)
    if kind == "lora":
        model.bfloat16()  # as the base is loaded to serve: merged in bfloat16
        model = model.merge_and_unload()
    return model.bfloat16()


def main() -> None:
    """Train the donors that are not there yet."""
    parser = Flags(__doc__)
    parser.add_argument("--base", required=True, help="directory or Hub id of the base")
    parser.add_argument("--text", type=Path, required=True, help=".jsonl file of rows")
    parser.add_argument("--kinds", nargs="+", default=list(LEARNING_RATES), choices=list(LEARNING_RATES))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=4, help="sequences")
    parser.add_argument("--length", type=int, default=96, help="tokens of each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for kind in args.kinds:
        directory = args.output_dir / kind
        if (directory / "model.safetensors").exists():
            continue
        train(kind, args).save_pretrained(directory)


if __name__ == "__main__":
    main()
