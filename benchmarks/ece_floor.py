"""How large a calibration error a perfectly calibrated graft would show on a test file of this size.

    python benchmarks/ece_floor.py --donors out/adamw0 --train train.jsonl --validation test.jsonl

The expected calibration error of few examples is never 0: each bin's accuracy is a small sample. For the magnitude
graft with a fitted alpha, labels are drawn from its own confidences, so that it is calibrated by construction, and the
error is measured as always. What is below the mean printed here cannot be told from 0.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import torch
from peft import get_peft_model

import tasks
from density_recovery import Bench, embedded_donor
from peft_graft import GraftConfig, fit_alpha
from peft_graft.analysis.calibration import expected_calibration_error


def main() -> None:
    """Print the measured error, and the mean and the 5% and 95% quantiles of the simulated ones, for each donor."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--donors", nargs="+", type=Path, help="directories made by make_donor.py")
    parser.add_argument("--train", default=tasks.DOCSTRINGS, help="what the donors were made from")
    parser.add_argument("--validation", help="the file to measure on")
    parser.add_argument("--density", type=float, default=1e-2, help="of the graft")
    parser.add_argument("--draws", type=int, default=1000, help="simulated label sets")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--mask_rows", type=int, default=2048, help="as in density_recovery.py")
    parser.add_argument("--calibration_rows", type=int, default=512, help="as in density_recovery.py")
    parser.add_argument("--out", default="benchmarks/out", help="as in density_recovery.py")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    for directory in args.donors or [embedded_donor(args.out)]:
        bench = Bench(directory, args)
        config = GraftConfig(donor=str(directory / "donor"), density=args.density, alpha="auto", task_type="SEQ_CLS")
        model = get_peft_model(bench._model("base"), config)
        fit_alpha(model, bench.held_out, progress=False)
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
