"""The benchmarks: their flags, and the density-recovery curve on a tiny donor."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_flags_are_written_with_hyphens_or_underscores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    parser = importlib.import_module("flags").Flags("About it.")
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--out")
    for line in (["--new-tokens", "3", "--out", "a_b"], ["--new_tokens=3", "--out=a_b"]):
        read = parser.parse_args(line)
        assert (read.new_tokens, read.out) == (3, "a_b")
    with pytest.raises(SystemExit):
        parser.parse_args(["--new", "3"])


def test_a_recovery_curve_is_measured_resumed_and_tabulated(
    world: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    recovery, report = (importlib.import_module(f"density_{name}") for name in ("recovery", "report"))
    flags = [
        "--donors",
        str(Path(world["donor"]).parent),
        "--train",
        world["train"],
        "--validation",
        world["validation"],
    ]
    flags += ["--rules", "magnitude", "path_taylor", "--densities", "0.05", "--mask-rows", "32", "--score-rows", "32"]
    flags += ["--calibration-rows", "32", "--out", str(tmp_path)]
    for alphas in (["1"], ["1", "auto"]):
        monkeypatch.setattr("sys.argv", ["density_recovery.py", *flags, "--alphas", *alphas])
        recovery.main()
    (path,) = tmp_path.glob("*.csv")
    with path.open(encoding="utf-8") as file:
        rows = {(row["rule"], row["alpha_mode"]): row for row in csv.DictReader(file)}
    wanted = [(rule, mode) for mode in ("1", "auto") for rule in ("magnitude", "path_taylor")]
    assert list(rows) == [("donor", ""), ("base", ""), *wanted]
    assert all(float(rows["magnitude", "1"]["alpha"]) == 1 != float(rows[rule, "auto"]["alpha"]) for rule, _ in wanted)
    assert rows["magnitude", "1"]["entries"] == rows["path_taylor", "auto"]["entries"] != "0"

    monkeypatch.setattr("sys.argv", ["density_report.py", "--csv", str(path)])
    report.main()
    printed = capsys.readouterr().out
    assert "(1 seed): accuracy" in printed and printed.count("| path_taylor |") == 2


def test_objectives_are_compared_on_the_donor_and_on_noise(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    objectives = importlib.import_module("objectives")
    flags = ["--donors", str(Path(world["donor"]).parent), "--train", world["train"], "--out", str(tmp_path)]
    flags += ["--validation", world["validation"], "--densities", "0.05", "--mask-rows", "64"]
    monkeypatch.setattr("sys.argv", ["objectives.py", *flags, "--calibration-rows", "32"])
    objectives.main()
    path = tmp_path / f"{Path(world['donor']).parent.name}.csv"
    text = path.read_text(encoding="utf-8")
    rows = {(row["objective"], row["deltas"]): row for row in csv.DictReader(text.splitlines())}
    wanted = [(objective, deltas) for deltas in ("own", "shuffled") for objective in ("labels", "donor")]
    assert list(rows) == [("", "base"), ("", "donor"), *wanted]
    assert float(rows["", "donor"]["kl"]) == pytest.approx(0, abs=1e-6)
    assert float(rows["donor", "own"]["kl"]) < float(rows["", "base"]["kl"])
    assert all(float(rows[key]["end_loss"]) <= float(rows[key]["start_loss"]) for key in wanted)
    objectives.main()
    assert path.read_text(encoding="utf-8") == text  # every point is known
