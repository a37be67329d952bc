"""The card of a saved adapter states the facts, for the Hub and for people, and no local path."""

from __future__ import annotations

import json
import math
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from adapter_cards import METRICS, facts, save
from grafts import graft
from models import perturbed, tiny_bert, tiny_gpt2
from peft_graft import GraftConfig
from peft_graft.adapter_files.card import refresh_card
from peft_graft.adapter_files.hub_names import strip_local_paths
from peft_graft.workflows.push import write_card


def test_saving_writes_our_card(tmp_path: Path) -> None:
    card = ModelCard.load(save(tmp_path, alpha=2.5, seed=7))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    told = facts(card.text)
    assert told["base"] == "[org/base](https://huggingface.co/org/base)"
    assert told["entries"] == f"{config['record']['entries']:,} of {config['record']['eligible']:,} eligible (5.0084%)"
    assert (told["alpha"], told["seed"], told["density"]) == ("2.5", "7", "0.05")
    assert config["record"]["fingerprint"]["sha256"][:16] in told["fingerprint of the base"]
    sizes = [(tmp_path / name).stat().st_size for name in ("adapter_model.safetensors", "adapter_config.json")]
    of_modules = "of which 204 for `modules_to_save`"
    assert told["bytes"] == f"{sizes[0]:,} for the tensors ({of_modules}), {sizes[1]:,} for the configuration"
    assert told["modules_to_save"] == "`classifier`"
    assert f"- torch {config['record']['provenance']['versions']['torch']}" in card.text
    assert "num_labels=3" in card.text
    assert "Measured" not in card.text and "[More Information Needed]" not in card.text


def test_metadata_is_what_the_hub_reads(tmp_path: Path) -> None:
    save(tmp_path)
    write_card(tmp_path, METRICS, repo_id="me/skill")
    data = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    assert data["library_name"] == "peft"
    assert (data["base_model"], data["base_model_relation"]) == ("org/base", "adapter")
    assert data["pipeline_tag"] == "text-classification"
    assert {"graft", "peft-graft", "base_model:adapter:org/base"} <= {*data["tags"]}
    (index,) = data["model-index"]
    assert index["name"] == "skill"
    (results,) = index["results"]
    assert results["dataset"]["name"] == "org/data"
    found = {metric["type"]: metric["value"] for metric in results["metrics"]}
    plain = {name: found[name] for name in ("accuracy", "f1", "ece", "agreement", "forgotten")}
    assert plain == METRICS["graft"]
    assert found["donor_accuracy"] == 0.9375 and found["base_f1"] == 0.25
    assert "donor_agreement" not in found and "loss" not in found


def test_measured_table_and_pictures(tmp_path: Path) -> None:
    path = save(tmp_path)
    curve = {"densities": [0.01, 0.1], "curves": {"magnitude": {"1": [0.6, 0.8]}}, "base": 0.5, "donor": 0.9}
    write_card(tmp_path, METRICS, recovery=curve)
    text = path.read_text()
    assert "| graft | 0.9062 | 0.8438 | 0.0938 | 0.9688 | 0.0156 |" in text
    assert "| donor | 0.9375 | 0.8750 | 0.0625 |  | 0.0312 |" in text
    assert "Measured on 1,024 rows of `org/data`." in text
    assert "Made with `/home" not in text and "512 rows for the mask or its scores and 64 rows for alpha" in text
    assert "Another split." in text
    for name in ("skill_map.png", "density_recovery.png"):
        assert f"]({name})" in text and (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_scores_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    path = save(tmp_path)
    write_card(tmp_path, {"graft": {"accuracy": math.nan, "f1": "high", "ece": 0.5}})
    results = ModelCard.load(path).data.eval_results
    assert [(result.metric_type, result.metric_value) for result in results] == [("ece", 0.5)]


def test_local_names_never_stand_on_a_card(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_bert(num_labels=3).save_pretrained(base)
    path = save(tmp_path / "out", name=str(base))
    card = ModelCard.load(path)
    assert str(tmp_path) not in str(card)
    assert card.data.base_model is None and "not published" in facts(card.text)["base"]
    # Without a name, the class cannot find the base by itself.
    assert "AutoPeft" not in card.text and "PeftModel.from_pretrained(base" in card.text
    # The configuration keeps it, so that the adapter loads on this machine.
    assert json.loads((path.parent / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


def test_zeros_and_alphas_by_tensor_are_told(tmp_path: Path) -> None:
    base = tiny_gpt2()
    model = graft(base, "zeros", density=0.05, task_type="CAUSAL_LM")
    model.peft_config["default"].alpha = {"a": 0.5, "b": 2.0}
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert facts(card.text)["donor"] == "zeros (the entries become 0)"
    assert facts(card.text)["alpha"] == "one per tensor, 0.5 to 2"
    assert card.data.pipeline_tag == "text-generation"
    assert "num_labels" not in card.text


def test_a_combined_graft_names_all_its_donors(tmp_path: Path) -> None:
    base = tiny_bert()
    model = graft(base, "zeros", density=0.05, task_type="SEQ_CLS")
    model.add_adapter("other", GraftConfig(donor=perturbed(base), density=0.05, task_type="SEQ_CLS"))
    model.peft_config["other"].donor = str(tmp_path)
    model.base_model.add_weighted_adapter(
        ["default", "other"], [1.0, 0.5], "both", combination_type="linear", modules_to_save_from="other"
    )
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    told = facts((tmp_path / "both" / "README.md").read_text())["donor"]
    count = model.peft_config["default"].record.entries
    assert told.startswith(
        f"combined (`linear`): 1.0 x {count} entries, donor zeros (the entries become 0); 0.5 x {count}"
    )
    assert told.endswith("donor not published (a local directory or a model in memory)")
    strip_local_paths(tmp_path / "both")
    assert str(tmp_path) not in (tmp_path / "both" / "adapter_config.json").read_text()


def test_names_cannot_break_out_of_the_table(tmp_path: Path) -> None:
    path = save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["selection"] = "a | b\n\n# Heading"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    refresh_card(tmp_path)
    assert "\n# Heading" not in path.read_text()
    assert facts(path.read_text())["rule"].startswith("`a b # Heading`")
