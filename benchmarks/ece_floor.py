"""Measure the calibration error that a perfectly calibrated graft would show on a test file of this size.

    python benchmarks/ece_floor.py --donors out/adamw0 --train train.jsonl --validation test.jsonl

The expected calibration error of few examples is never 0, because the accuracy of each bin comes from a small sample.
Here labels are drawn from the graft's own confidences (magnitude mask, fitted alpha), which makes it calibrated by
construction. Its error on these labels is the floor: a measured error below it cannot be told from 0.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from peft import get_peft_model

import tasks
from density_recovery import Bench, embedded_donor
from flags import Flags
from peft_graft import GraftConfig, fit_alpha
from peft_graft.analysis.calibration import expected_calibration_error


def main() -> None:
    """Print the measured error, and the mean and the 5% and 95% quantiles of the simulated ones, for each donor."""
    parser = Flags(__doc__)
    parser.add_argument("--donors", nargs="+", type=Path, help="directories made by make_donor.py")
    parser.add_argument(
        "--train", default=tasks.DOCSTRINGS, help="training rows, the file that the donors were made from"
    )
    parser.add_argument("--validation", help="rows to measure on")
    parser.add_argument("--density", type=float, default=1e-2, help="density of the graft")
    parser.add_argument("--draws", type=int, default=1000, help="simulated label sets")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    parser.add_argument("--mask-rows", type=int, default=2048, help="as in density_recovery.py")
    parser.add_argument("--calibration-rows", type=int, default=512, help="as in density_recovery.py")
    parser.add_argument("--out", default="benchmarks/out", help="as in density_recovery.py")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    for directory in args.donors or [embedded_donor(args.out)]:
        bench = Bench(directory, args)
        config = GraftConfig(donor=str(directory / "donor"), density=args.density, alpha="auto", task_type="SEQ_CLS")
        model = get_peft_model(bench.load("base"), config)
        fit_alpha(model, bench.held_out, show_progress_bar=False)
        logits, labels = tasks.predict(model.eval(), bench.test, bench.tokenizer)
        chances = logits.double().softmax(-1)
        drawn = torch.multinomial(chances, args.draws, replacement=True, generator=generator)
        simulated = torch.tensor([expected_calibration_error(chances, column) for column in drawn.T])
        low, high = simulated.quantile(torch.tensor([0.05, 0.95], dtype=simulated.dtype)).tolist()
        print(
            f"{directory.name}: measured {expected_calibration_error(chances, torch.as_tensor(labels)):.4f}, "
            f"if calibrated {simulated.mean():.4f} (5% {low:.4f}, 95% {high:.4f})"
        )


if __name__ == "__main__":
    main()
