"""Measure text generation with a patch, unmerged and merged, against the base without it.

    python benchmarks/generate.py --out benchmarks/results/speed/generate.csv

`generate` writes the patch once and removes it at the end, while separate forward passes would do both for every token.
Batch 1, greedy, from a prompt of 16 tokens; the seconds are those of one new token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import timing
from peft_graft import GraftConfig

SHAPES: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_layer=4, vocab_size=512, bos_token_id=None, eos_token_id=None)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512, hidden_size=2048, intermediate_size=5632, num_hidden_layers=2,
            num_attention_heads=32, num_key_value_heads=4, bos_token_id=None, eos_token_id=None,
        )
    ),
}  # fmt: skip
PROMPT = 16


def main() -> None:
    """Measure every shape and write one row per contender."""
    parser = timing.parser(__doc__, rounds=15)
    parser.add_argument("--density", type=float, default=1e-3, help="density of the patch")
    parser.add_argument("--new-tokens", type=int, default=48, help="tokens to generate")
    args = parser.parse_args()
    rows = []
    for shape, build in SHAPES.items():
        timing.start(args)
        base = build().to(args.device, getattr(torch, args.dtype)).eval()
        donor = timing.donor_of(base)
        models = {"base": base}
        for name in ("unmerged", "merged"):
            models[name] = get_peft_model(copy.deepcopy(base), GraftConfig(donor=donor, density=args.density))
        models["merged"].merge_adapter()
        models["lora r=8"] = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules=timing.LINEARS[shape]))
        ids = timing.tokens(1, PROMPT, args.device)

        def runner(model: nn.Module, ids: torch.Tensor = ids) -> Callable[[], dict[str, float]]:
            model.eval()

            def run() -> dict[str, float]:
                began = timing.clock(args.device)
                model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                    min_new_tokens=args.new_tokens, max_new_tokens=args.new_tokens,
                )  # fmt: skip
                return {"seconds": (timing.clock(args.device) - began) / args.new_tokens}

            return run

        runs = {name: runner(model) for name, model in models.items()}
        found = timing.table(timing.race(runs, args.rounds, args.seed, args.device), reference="base")
        about = {"shape": shape, "density": args.density, "new_tokens": args.new_tokens}
        rows += [about | row | timing.facts(args) for row in found]
    timing.write_csv(args.out, rows)


if __name__ == "__main__":
    main()
