"""Publishing and fetching over real HTTP: the unmodified clients, in processes of their own, and a Hub on loopback."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import PeftModel

from adapter_cards import METRICS, save
from grafts import output
from hub_client import Client, ClientError
from hub_server import Fault, Hub
from models import inputs, perturbed, tiny_bert
from peft_graft import Patch
from peft_graft.workflows.push import push, write_card

pytestmark = pytest.mark.hub

CONFIG = {"donor": "org/finetuned", "donor_revision": "v1", "density": 0.02}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@dataclass
class World:
    """A Hub with a base and a sharded donor, one client that may write, and one that has never seen anything."""

    hub: Hub
    writer: Client
    reader: Client
    base: Path
    base_commit: str
    donor_commit: str

    def card(self, repo_id: str, revision: str = "main") -> ModelCard:
        return ModelCard(self.hub.files(repo_id, revision)["README.md"].decode())

    def config(self, repo_id: str, revision: str = "main") -> dict[str, Any]:
        return json.loads(self.hub.files(repo_id, revision)["adapter_config.json"])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("hub")
    base, donor = tiny_bert(), perturbed(tiny_bert())
    base.save_pretrained(root / "base")
    donor.save_pretrained(root / "donor", max_shard_size="20KB")
    assert len(list((root / "donor").glob("*.safetensors"))) > 1
    with (
        Hub() as hub,
        Client(hub.endpoint, root / "writer", token="hf_me") as writer,
        Client(hub.endpoint, root / "reader") as reader,
    ):
        base_commit = hub.add("org/base", contents(root / "base"))
        hub.add("org/finetuned", {"config.json": b"{}"})
        donor_commit = hub.add("org/finetuned", contents(root / "donor"), ref="v1")
        yield World(hub, writer, reader, root / "base", base_commit, donor_commit)


@pytest.fixture(scope="module")
def skill(world: World) -> dict[str, Any]:
    """me/skill, made of a sharded donor on the Hub and pushed with model.push_to_hub."""
    return world.writer("graft_and_push", "org/base", CONFIG, "me/skill", commit_message="a skill", tags=["sentiment"])


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter whose base is a local directory."""
    directory = tmp_path_factory.mktemp("saved")
    world.writer("graft_and_save", str(world.base), {**CONFIG, "density": 0.05}, str(directory))
    (directory / "private_notes.txt").write_text("not for the Hub")
    return directory


# model.push_to_hub


@pytest.mark.feature("push_to_hub, from_pretrained of the Hub")
def test_model_push_uploads_adapter_and_card_in_one_commit(world: World, skill: dict[str, Any]) -> None:
    repository = world.hub.repositories["me/skill"]
    assert set(world.hub.files("me/skill")) - {".gitattributes"} == ADAPTER
    assert [message for message in repository.messages.values() if message != "initial commit"] == ["a skill"]
    assert any(request.startswith("PUT /lfs/") for request in world.hub.requests)


def test_model_push_keeps_what_the_stock_card_loses(world: World, skill: dict[str, Any]) -> None:
    data = world.card("me/skill").data.to_dict()
    assert data["library_name"] == "peft"
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "adapter"
    assert {"graft", "peft-graft", "base_model:adapter:org/base", "sentiment"} <= {*data["tags"]}
    text = world.card("me/skill").text
    assert 'AutoPeftModelForSequenceClassification.from_pretrained("me/skill"' in text
    assert text.index("import peft_graft") < text.index("from peft import")


def test_published_config_names_commits(world: World, skill: dict[str, Any]) -> None:
    config = world.config("me/skill")
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", world.base_commit)
    assert (config["donor"], config["donor_revision"]) == ("org/finetuned", world.donor_commit)
    assert world.base_commit in world.card("me/skill").text and world.donor_commit in world.card("me/skill").text


# Back again, in a process that has never seen it


@pytest.mark.feature("push_to_hub, from_pretrained of the Hub")
def test_fresh_process_loads_the_same_model(world: World, skill: dict[str, Any]) -> None:
    assert world.reader("load", str(world.base), "me/skill") == skill["logits"]
    assert world.reader("load_auto", "me/skill") == skill["logits"]
    (snippet,) = re.findall(r"```python\n(.*?)```", world.card("me/skill").text, flags=re.S)
    assert world.reader("run", snippet) == skill["logits"]
    assert skill["logits"] != output(tiny_bert(), inputs(tiny_bert())).tolist()


@pytest.mark.feature("push_to_hub, from_pretrained of the Hub")
def test_revisions_branches_and_pull_requests_load(world: World, skill: dict[str, Any]) -> None:
    made = {
        name: world.writer("graft_and_push", "org/base", {**CONFIG, "density": density}, "me/versions", **options)
        for name, density, options in (
            ("old", 0.03, {}),
            ("dense", 0.5, {"revision": "dense"}),
            ("refs/pr/1", 0.1, {"create_pr": True}),
            ("main", 0.2, {}),
        )
    }
    assert made["refs/pr/1"]["pr"] == "refs/pr/1"
    for name, result in made.items():
        revision = result["oid"] if name == "old" else name
        assert world.reader("load", str(world.base), "me/versions", revision=revision) == result["logits"]
    assert len({json.dumps(result["logits"]) for result in made.values()}) == 4
    switched = world.reader("load_second", "org/base", "me/skill", "me/versions", revision="dense")
    assert switched == made["dense"]["logits"]


def test_cache_serves_when_offline(world: World, skill: dict[str, Any]) -> None:
    assert world.reader("load", str(world.base), "me/skill", revision=skill["oid"]) == skill["logits"]
    asked = len(world.hub.requests)
    # This process is offline, as all tests are; only the cache is the reader's.
    cache = world.reader.home / "hub"
    model = PeftModel.from_pretrained(tiny_bert(), "me/skill", revision=skill["oid"], cache_dir=cache)
    assert output(model, inputs(tiny_bert())).tolist() == skill["logits"]
    with pytest.raises((OSError, ValueError)):
        PeftModel.from_pretrained(tiny_bert(), "me/never-seen", cache_dir=cache)
    assert len(world.hub.requests) == asked


# push(repo_id, directory)


def test_push_uploads_the_adapter_and_nothing_else(world: World, saved: Path) -> None:
    before = contents(saved)
    world.writer("push", "me/directory", str(saved))
    files = world.hub.files("me/directory")
    assert set(files) - {".gitattributes"} == ADAPTER | {"skill_map.png"}
    assert files["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    assert contents(saved) == before
    assert "](skill_map.png)" in files["README.md"].decode() and files["skill_map.png"].startswith(b"\x89PNG")
    assert "# directory" in files["README.md"].decode()


def test_published_files_name_no_local_paths(world: World, saved: Path, tmp_path: Path) -> None:
    assert str(world.base) in (saved / "adapter_config.json").read_text()  # so that it loads here
    world.writer("push", "me/paths", str(saved))
    assert any(str(world.base) in warning for warning in world.writer.warnings)
    files = world.hub.files("me/paths")
    assert [name for name, body in files.items() if str(world.base.parent).encode() in body] == []
    assert world.config("me/paths")["base_model_name_or_path"] is None
    assert world.card("me/paths").data.base_model is None


def test_base_directory_gets_the_name_on_record(world: World, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_bert().save_pretrained(base)
    recorded = json.loads((base / "config.json").read_text()) | {"_name_or_path": "org/base"}
    (base / "config.json").write_text(json.dumps(recorded))
    result = world.writer("graft_and_push", str(base), CONFIG, "me/recorded")
    assert any("org/base" in warning for warning in world.writer.warnings)
    assert world.config("me/recorded")["base_model_name_or_path"] == "org/base"
    assert world.card("me/recorded").data.base_model == "org/base"
    assert world.reader("load_auto", "me/recorded") == result["logits"]


def test_edits_on_the_hub_survive_the_next_push(world: World, saved: Path) -> None:
    world.writer("push", "me/edited", str(saved))
    card = world.card("me/edited")
    card.text = card.text.replace("## Limits", "My own words.\n\n## Limits")
    card.data.license = "apache-2.0"
    world.hub.add("me/edited", {**world.hub.files("me/edited"), "README.md": str(card).encode()})
    for repeat in (
        lambda: world.writer("push", "me/edited", str(saved)),
        lambda: world.writer("graft_and_push", "org/base", CONFIG, "me/edited"),
    ):
        repeat()
        again = world.card("me/edited")
        assert again.text.count("My own words.") == 1
        assert again.data.license == "apache-2.0"
    assert f"| density | {CONFIG['density']} |" in again.text  # the facts are the new adapter's
    assert again.data.base_model == "org/base"


def test_push_into_branch_and_pull_request(world: World, saved: Path) -> None:
    world.writer("push", "me/pushed", str(saved), commit_message="first")
    main = world.hub.files("me/pushed")
    assert "first" in world.hub.repositories["me/pushed"].messages.values()
    metrics = {name: {"accuracy": score} for name, score in (("base", 0.5), ("donor", 0.9), ("graft", 0.8))}
    world.writer("push", "me/pushed", str(saved), revision="measured", metrics=metrics)
    proposed = world.writer("push", "me/pushed", str(saved), create_pr=True, metrics=metrics)
    assert world.hub.files("me/pushed") == main
    for revision in ("measured", proposed["pr"]):
        results = world.card("me/pushed", revision).data.eval_results
        found = {result.metric_type: result.metric_value for result in results}
        assert found == {"accuracy": 0.8, "donor_accuracy": 0.9, "base_accuracy": 0.5}


# Who may


def test_push_without_a_token_is_refused(world: World, saved: Path) -> None:
    with pytest.raises(ClientError, match="(?s)401.*hf auth login"):
        world.reader("push", "me/forbidden", str(saved))
    with pytest.raises(ClientError, match="401"):
        world.writer("push", "me/forbidden", str(saved), token=False)
    with pytest.raises(ClientError, match="(?s)403.*write access"):
        world.reader("push", "me/forbidden", str(saved), token="hf_you")
    with pytest.raises(ClientError, match="401"):
        world.reader("graft_and_push", str(world.base), {**CONFIG, "donor": "zeros"}, "me/forbidden")
    assert "me/forbidden" not in world.hub.repositories


def test_strangers_may_propose(world: World, saved: Path) -> None:
    world.writer("push", "me/open", str(saved))
    main = world.hub.files("me/open")
    proposed = world.reader("push", "me/open", str(saved), create_pr=True, token="hf_you", metrics={"graft": {"f1": 1}})
    assert proposed["pr"] == "refs/pr/1"
    assert world.hub.files("me/open") == main


def test_private_means_private(world: World, saved: Path) -> None:
    world.writer("push", "me/secret", str(saved), private=True)
    assert world.hub.repositories["me/secret"].private
    with pytest.raises(ClientError):
        world.reader("load", str(world.base), "me/secret")
    assert world.reader("load", str(world.base), "me/secret", token="hf_me")
    world.writer("push", "me/public", str(saved), private=False)
    with pytest.raises(ClientError, match="private must be as the existing repository"):
        world.writer("push", "me/public", str(saved), private=True)


def test_a_token_reads_private_repositories(world: World, saved: Path, tmp_path: Path) -> None:
    """Each verb hands it on to every download; the reader's process has none of its own."""
    for name, files in (("base", contents(world.base)), ("donor", contents(world.base.parent / "donor"))):
        world.hub.add(f"me/private-{name}", files)
        world.hub.repositories[f"me/private-{name}"].private = True
    world.writer("push", "me/private-skill", str(saved), private=True)
    names = ("me/private-base", "me/private-donor")
    with pytest.raises(ClientError):
        world.reader("files_verbs", *names, str(tmp_path), None)
    counts = world.reader("files_verbs", *names, str(tmp_path), "hf_me")
    assert counts[0] == counts[1] == counts[2] > 0 and counts[3] > counts[0]
    with pytest.raises(ClientError):
        world.reader("inspect", "me/private-skill", None)
    assert world.reader("inspect", "me/private-skill", "hf_me") > 0


# When something breaks


def test_failed_upload_is_tried_again(world: World, saved: Path) -> None:
    world.hub.lfs.clear()
    fault = Fault(r"PUT /lfs/", 503)
    world.hub.faults = [fault]
    world.writer("push", "me/retried", str(saved))
    assert fault.times == 0
    assert set(world.hub.files("me/retried")) >= ADAPTER


@pytest.mark.parametrize(("broken", "status"), [(r"PUT /lfs/", 400), (r"POST .*/commit/", 500), (r"lfs/verify", 400)])
def test_broken_push_changes_nothing(
    world: World, saved: Path, skill: dict[str, Any], broken: str, status: int
) -> None:
    before = dict(world.hub.repositories["me/skill"].refs)
    world.hub.lfs = {file.oid: file.content for commit in world.hub.repositories["me/skill"].commits.values()
                     for file in commit.values() if file.lfs}  # fmt: skip
    world.hub.faults = [Fault(broken, status)]
    with pytest.raises(ClientError, match=f"{status}|Error while uploading"):
        world.writer("push", "me/skill", str(saved))
    assert world.hub.repositories["me/skill"].refs == before


def test_truncated_download_is_refused(world: World, saved: Path) -> None:
    world.writer("push", "me/truncated", str(saved))
    world.hub.faults = [Fault(r"GET /lfs/", "short")]
    with pytest.raises(ClientError, match="Consistency check failed"):
        world.reader("load", str(world.base), "me/truncated")
    cached = world.reader.home / "hub" / "models--me--truncated"
    assert not list(cached.rglob("*.safetensors"))
    world.hub.faults = [Fault(r"GET /lfs/", "cut")]  # the connection breaks: the client asks for the rest
    assert world.reader("load", str(world.base), "me/truncated")
    (file,) = cached.rglob("*.safetensors")
    assert file.read_bytes() == (saved / "adapter_model.safetensors").read_bytes()


# Trainer


def test_trainer_pushes_a_card_of_ours(world: World, tmp_path: Path) -> None:
    config = {**CONFIG, "num_params": 40}
    del config["density"]
    world.writer("train_and_push", str(world.base), config, "me/trained", str(tmp_path / "out"), tags=["mine"])
    card, files = world.card("me/trained"), world.hub.files("me/trained")
    data = card.data.to_dict()
    assert data["library_name"] == "peft"
    assert {"graft", "peft-graft", "mine", "generated_from_trainer"} <= {*data["tags"]}
    assert "## What it is" in card.text and "## Training procedure" in card.text and "learning_rate" in card.text
    leaks = {name for name, body in files.items() if str(world.base.parent).encode() in body}
    assert leaks == set()
    (tmp_path / "adapter.safetensors").write_bytes(files["adapter_model.safetensors"])
    assert Patch.load(tmp_path / "adapter.safetensors").num_params == 40
    for commit in world.hub.repositories["me/trained"].commits.values():  # also those of the checkpoints
        if config_file := commit.get("adapter_config.json"):
            assert str(world.base) not in config_file.content.decode()


def test_metrics_may_come_from_a_file(tmp_path: Path) -> None:
    path = save(tmp_path / "adapter")
    (tmp_path / "metrics.json").write_text(json.dumps(METRICS))
    write_card(tmp_path / "adapter", tmp_path / "metrics.json")
    assert "0.9062" in path.read_text()


def test_only_whole_grafts_have_a_card_and_are_published(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="directory must hold a saved graft"):
        write_card(tmp_path)
    with pytest.raises(ValueError, match="got 'no directory'"):
        push("me/skill", tmp_path / "nowhere")
