"""The examples, end to end on a tiny model and real files: donor, graft, reload, resume; and the README's own code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, HfArgumentParser

import tasks
from graft import ADAPTER_FILES, GraftArguments, run, table
from make_donor import DonorArguments

README = Path(__file__).parents[1] / "README.md"


def arguments(world: dict[str, str], out: Path, **changes: object) -> GraftArguments:
    options = {"density": 0.05, "calibration_samples": 32, "max_train_samples": 64, "skip_train_samples": 64}
    return GraftArguments(**world, output_dir=str(out), **(options | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("selection", ["learned", "magnitude", "path_taylor"])
def test_graft_runs_saves_and_reports(world: dict[str, str], tmp_path: Path, selection: str) -> None:
    report = run(arguments(world, tmp_path, selection=selection))
    assert report["entries"] == round(0.05 * report["eligible"])
    assert report["graft"]["loss"] < report["base"]["loss"]
    assert report["donor"]["agreement"] == 1
    assert report["bytes"] == sum((tmp_path / name).stat().st_size for name in ADAPTER_FILES)
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["alpha"] == report["alpha"]
    card = ModelCard.load(tmp_path / "README.md")
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert measured["accuracy"] == pytest.approx(report["graft"]["accuracy"], abs=1e-6)
    assert measured["donor_f1"] == pytest.approx(report["donor"]["f1"], abs=1e-6)
    assert "`validation.jsonl`" in card.text and "skill_map.png" in card.text
    assert not re.search(re.escape(str(Path(world["base"]).parents[1])), str(card))
    assert f"{report['entries']:,} of {report['eligible']:,} entries" in table(report)


@pytest.mark.parametrize("selection", ["learned", "magnitude"])
def test_rows_without_labels_are_fitted_to_the_donor(world: dict[str, str], tmp_path: Path, selection: str) -> None:
    plain = dict(world)
    for name in ("train", "validation"):
        lines = Path(world[name]).read_text(encoding="utf-8").splitlines()
        plain[name] = str(tmp_path / f"{name}.jsonl")
        rows = [json.dumps({"sentence": json.loads(line)["sentence"]}) for line in lines]
        Path(plain[name]).write_text("\n".join(rows), encoding="utf-8")
    report = run(arguments(plain, tmp_path / "out", selection=selection))
    assert report["objective"] == "donor" and report["share_of_accuracy"] is None
    assert report["graft"]["kl"] < report["base"]["kl"] and "accuracy" not in report["graft"]
    assert report["donor"]["kl"] == pytest.approx(0, abs=1e-6)
    assert "The graft agrees with the donor in " in table(report)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["objective"] == "donor"
    assert "agreement" in ModelCard.load(tmp_path / "out" / "README.md").text
    with pytest.raises(ValueError, match="label_column one, got .* and 'mood'"):
        run(arguments(plain, tmp_path / "wrong", label_column="mood"))


def test_labels_can_be_left_aside(world: dict[str, str], tmp_path: Path) -> None:
    report = run(arguments(world, tmp_path, objective="donor", selection="learned"))
    assert report["objective"] == "donor" and report["graft"]["kl"] < report["base"]["kl"]
    assert report["share_of_accuracy"] > 0 and report["training_helped"] is not None


def test_graft_resumes_a_killed_run(world: dict[str, str], tmp_path: Path) -> None:
    whole = run(arguments(world, tmp_path / "whole", epochs=2, save_steps=2))
    checkpoint = str(tmp_path / "whole" / "checkpoints" / "checkpoint-2")
    resumed = run(arguments(world, tmp_path / "again", epochs=2, resume_from_checkpoint=checkpoint))
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "again")]
    assert files[0] == files[1]
    assert resumed["alpha"] == whole["alpha"]


@pytest.mark.parametrize("flags", [GraftArguments, DonorArguments])
def test_flags_are_written_with_hyphens_or_underscores(flags: type) -> None:
    words = ["--base", "b", "--text-columns", "one", "two", "--output-dir", "out"]
    for line in (words, [word.replace("text-columns", "text_columns").replace("-dir", "_dir") for word in words]):
        (read,) = HfArgumentParser(flags).parse_args_into_dataclasses(line)
        assert (read.base, read.text_columns, read.output_dir) == ("b", ["one", "two"], "out")


def test_base_without_donor_is_refused(world: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base and donor must be given together"):
        run(GraftArguments(base=world["base"], output_dir=str(tmp_path)))


@pytest.mark.parametrize("role", ["base", "donor"])
@pytest.mark.parametrize("model_class", [AutoModel, AutoModelForMaskedLM])
def test_a_checkpoint_without_a_head_for_the_task_is_refused(
    role: str, model_class: type[AutoModel], world: dict[str, str], tmp_path: Path
) -> None:
    """A pretrained model, or one for another task: its head would be random, and its scores on the card."""
    headless = model_class.from_config(AutoConfig.from_pretrained(world[role]))
    headless.save_pretrained(tmp_path / "headless")
    AutoTokenizer.from_pretrained(world[role]).save_pretrained(tmp_path / "headless")
    changed = {**world, role: str(tmp_path / "headless")}
    with pytest.raises(ValueError, match=rf"{role} must hold a trained head .*, got '.*headless' without .*classifier"):
        run(arguments(changed, tmp_path / "out"))
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_donor_made_with_other_flags_is_not_taken_for_this_one(world: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(Path(world["donor"]).parent, tmp_path / "out")
    (tmp_path / "out" / "metrics.json").rename(tmp_path / "out" / "donor_metrics.json")
    with pytest.raises(ValueError, match="output_dir must hold no donor made with other flags, got '.*out'"):
        run(GraftArguments(train=world["train"], validation=world["validation"], output_dir=str(tmp_path / "out")))


def test_validation_rows_are_never_fitted_on(world: dict[str, str]) -> None:
    donors = tasks.load_rows(world["train"], limit=64, seed=3)["text"]
    fresh = tasks.load_rows(world["train"], limit=96, skip=64, seed=3)["text"]
    everything = tasks.load_rows(world["train"])["text"]
    assert sorted([*donors, *fresh]) == sorted(everything)


@pytest.mark.slow
def test_embedded_task_keeps_modules_apart() -> None:
    train, test = (tasks.docstring_rows(split, 64) for split in ("train", "test"))
    assert not {*train["text"]} & {*test["text"]}
    assert [test["label"].count(label) for label in range(4)] == [16] * 4


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")  # no accelerator here
def test_readme_code_runs(world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) >= 2
    from graft import batches

    tokenizer = AutoTokenizer.from_pretrained(world["base"])
    rows = tasks.tokenize(tasks.load_rows(world["train"], limit=96), tokenizer)
    names = {"calibration": batches(rows.select(range(32)), tokenizer), "train": rows.select(range(32, 96))}
    for block in blocks:
        code = block.replace("path/to/base", world["base"]).replace("path/to/donor", world["donor"])
        # The README shows the densities of real models; these have a few thousand entries.
        code = code.replace("density=1e-4", "density=1e-2").replace("density=1e-3", "density=1e-2")
        exec(compile(code, str(README), "exec"), names)
    assert {path.name for path in (tmp_path / "skill").iterdir()} >= {*ADAPTER_FILES}
