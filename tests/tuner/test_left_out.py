"""At density 1 over everything the logits are the donor's, or a line says by name what is missing and what to type."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

from grafts import graft, output, same_bits
from models import inputs, perturbed, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_qwen, tiny_t5
from peft_graft import DonorError, GraftConfig, Patch, extract


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("peft_graft")]


def argument(line: str) -> list[str]:
    """The modules that a line says to type after modules_to_save=."""
    return re.findall(r"'([^']+)'", re.search(r"modules_to_save=\[(.*?)\]", line)[1])


def made(way: str, base: nn.Module, donor: nn.Module, tmp_path: Path, **options: Any) -> nn.Module:
    """A graft of the two: of models in memory, of a donor in files, or of files alone."""
    if way == "memory":
        return graft(base, donor, **options)
    for role, model in (("base", base), ("donor", donor)):
        if not (tmp_path / role).exists():
            model.save_pretrained(tmp_path / role)
    if way == "donor in files":
        return graft(base, str(tmp_path / "donor"), **options)
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "out", overwrite=True, **options)
    return PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out")


WAYS = pytest.mark.parametrize("way", ["memory", "donor in files", "files"])


# Tensors that are not targeted


@WAYS
@pytest.mark.parametrize(
    ("build", "missing"),
    [
        (tiny_llama, {"embed_tokens", "lm_head"}),
        (tiny_gpt2, {"wte", "wpe"}),
        (tiny_mixtral, {"embed_tokens", "lm_head"}),
    ],
    ids=["llama", "gpt2", "mixtral"],
)
def test_untargeted_tensors_that_differ_are_named_with_what_takes_them(
    way: str, build: Callable[[], nn.Module], missing: set[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = build()
    donor, batch = perturbed(base), inputs(base)
    options = {"density": 1.0, "task_type": "CAUSAL_LM"}
    model = made(way, base, donor, tmp_path, **options)
    assert not torch.equal(output(model, batch), output(donor, batch))
    (line,) = lines(caplog)
    assert f"donor differs from the base in {line.split(' in ')[1].split()[0]} of" in line
    assert all(name in line for name in missing) and "--target-modules all" in line
    assert missing <= {name.rpartition(".")[2] for name in argument(line)}
    caplog.clear()
    for more in ({"target_modules": "all"}, {"modules_to_save": argument(line)}):
        model = made(way, base, donor, tmp_path, **options, **more)
        assert torch.equal(output(model, batch), output(donor, batch)), more
        assert lines(caplog) == []


@WAYS
def test_nothing_is_said_where_the_rest_is_equal(way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny_llama(torch.bfloat16)
    donor = perturbed(base)
    donor.model.embed_tokens.load_state_dict(base.model.embed_tokens.state_dict())
    donor.lm_head.load_state_dict(base.lm_head.state_dict())
    made(way, base, donor, tmp_path, density=0.1, task_type="CAUSAL_LM")
    assert lines(caplog) == []


def test_a_module_that_the_user_excluded_is_named(caplog: pytest.LogCaptureFixture) -> None:
    base = tiny_bert()
    graft(
        base, perturbed(base), density=0.1, target_modules="all", exclude_modules=["pooler.dense"], task_type="SEQ_CLS"
    )
    (line,) = lines(caplog)
    assert "in 2 of 2 tensors" in line and "bert.pooler.dense.bias" in line and "no exclude_modules" in line


# Donors with more than the base


def deeper(model: LlamaForCausalLM) -> LlamaForCausalLM:
    config = copy.deepcopy(model.config)
    config.num_hidden_layers += 1
    return LlamaForCausalLM(config).eval()


def with_biases(model: LlamaForCausalLM) -> LlamaForCausalLM:
    config = copy.deepcopy(model.config)
    config.attention_bias = True
    return LlamaForCausalLM(config).eval()


@WAYS
@pytest.mark.parametrize(
    ("change", "name"), [(deeper, "model.layers.2.input_layernorm.weight"), (with_biases, "self_attn.k_proj.bias")]
)
@pytest.mark.filterwarnings("ignore:donor's configuration must compute as the base's")
def test_a_donor_with_more_is_refused_by_name(
    way: str, change: Callable[[nn.Module], nn.Module], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tiny_llama()
    donor = change(base)
    with pytest.raises(DonorError, match=rf"no tensors beyond the base's, got \d+ .*{name}.*\(--allow-extra\)"):
        made(way, base, donor, tmp_path, density=1.0, task_type="CAUSAL_LM")
    made(way, base, donor, tmp_path, density=1.0, target_modules="all", task_type="CAUSAL_LM", allow_extra=True)
    assert [name for line in lines(caplog) if name in line]


def test_more_modules_than_a_plain_base_are_refused() -> None:
    base = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    donor = nn.Sequential(*perturbed(base), nn.Linear(2, 2))
    with pytest.raises(
        DonorError, match=r"got 2 in 'Sequential' for which Sequential has no place \(2\.bias, 2\.weight\)"
    ):
        graft(base, donor, density=1.0)


@pytest.mark.parametrize("way", ["donor in files", "files"])
@pytest.mark.filterwarnings("ignore:donor's configuration must compute as the base's")
def test_more_experts_are_refused(way: str, tmp_path: Path) -> None:
    base = tiny_mixtral()
    config = copy.deepcopy(base.config)
    config.num_local_experts = 8
    with pytest.raises(DonorError, match=r"of another shape .*\(4, .*\) in the base, \(8, .*\) in the donor"):
        made(way, base, type(base)(config), tmp_path, density=1.0, task_type="CAUSAL_LM")


def test_a_head_that_the_class_has_no_place_for_is_named(caplog: pytest.LogCaptureFixture) -> None:
    donor = perturbed(tiny_bert())
    base = BertModel(donor.config).eval()
    graft(base, donor, density=1.0, target_modules="all")
    assert lines(caplog) == [
        "donor has 2 tensors for which BertModel has no place (classifier.bias, classifier.weight): they are left out."
    ]


# Configurations


@WAYS
@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 1e-2},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_config_that_computes_something_else_is_told_and_recorded(
    way: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    base = tiny_llama()
    donor = perturbed(LlamaForCausalLM(LlamaConfig(**{**base.config.to_dict(), **changes}))).eval()
    field = next(iter(changes))
    with pytest.warns(UserWarning, match=rf"configuration must compute as the base's.*{field}.* in the donor"):
        model = made(way, base, donor, tmp_path, density=1.0, target_modules="all", task_type="CAUSAL_LM")
    recorded = model.peft_config["default"].record.provenance["donor_config"]
    assert all(name.startswith(field) for name in recorded) and recorded
    model.save_pretrained(tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "configuration of the donor" in card and f"`{next(iter(recorded))}`" in card
    # What the message says to do gives the donor.
    same = LlamaForCausalLM(donor.config)
    same.load_state_dict(base.state_dict())
    model = graft(same.eval(), donor, density=1.0, target_modules="all")
    assert torch.equal(output(model, inputs(base)), output(donor, inputs(base)))


def test_the_number_of_experts_per_token_is_told() -> None:
    base = tiny_mixtral()
    donor = perturbed(base)
    donor.config.num_experts_per_tok = 1
    with pytest.warns(UserWarning, match=r"num_experts_per_tok \(2 in the base, 1 in the donor\)"):
        graft(base, donor, density=1.0, target_modules="all")


def test_another_sliding_window_is_told() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    base = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=None)).eval()
    donor = perturbed(MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=2))).eval()
    with pytest.warns(UserWarning, match=r"sliding_window \(None in the base, 2 in the donor\)"):
        model = graft(base, donor, density=1.0, target_modules="all")
    assert not torch.equal(output(model, inputs(base)), output(donor, inputs(base)))


def test_fields_that_change_no_logits_are_not_told() -> None:
    base = tiny_llama()
    donor = perturbed(base)
    donor.config.update(
        {"use_cache": False, "attention_dropout": 0.1, "eos_token_id": 5, "max_position_embeddings": 64}
    )
    donor.config.torch_dtype, donor.config.initializer_range = "bfloat16", 0.5
    graft(base, donor, density=1.0, target_modules="all")  # a warning is an error here


# Tied weights and modules to save


def untied(model: nn.Module) -> nn.Module:
    """A donor whose head was untied and trained."""
    donor = perturbed(model)
    donor.config.tie_word_embeddings = False
    donor.lm_head.weight = nn.Parameter(donor.lm_head.weight.detach() + 1)
    return donor


@WAYS
@pytest.mark.parametrize("build", [lambda: tiny_llama(tied=True), tiny_qwen, tiny_gpt2], ids=["llama", "qwen", "gpt2"])
def test_an_untied_head_of_a_donor_is_told_and_can_be_taken(
    way: str, build: Callable[[], nn.Module], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = build()
    donor, batch = untied(base), inputs(base)
    options = {"density": 1.0, "target_modules": "all", "task_type": "CAUSAL_LM"}
    with pytest.warns(UserWarning, match=r"must tie .*lm_head\.weight.*modules_to_save=\['lm_head'\]"):
        made(way, base, donor, tmp_path, **options)
    model = made(way, base, donor, tmp_path, **options, modules_to_save=["lm_head"])
    assert torch.equal(output(model, batch), output(donor, batch))
    assert lines(caplog) == []


@WAYS
@pytest.mark.parametrize("tied_base", [True, False], ids=["tied base", "untied base"])
@pytest.mark.parametrize("targets", [None, "all"], ids=str)
@pytest.mark.parametrize("modules", [["lm_head"], ["embed_tokens"]], ids=str)
def test_a_tied_donor_gives_its_head_under_any_name(
    way: str, modules: list[str], targets: str | None, tied_base: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, donor = tiny_llama(tied=tied_base), perturbed(tiny_llama(tied=True))
    options = {"density": 1.0, "target_modules": targets, "modules_to_save": modules, "task_type": "CAUSAL_LM"}
    model = made(way, base, donor, tmp_path, **options)
    for name, wrapper in model.named_modules():
        if name.endswith(modules[0]) and hasattr(wrapper, "modules_to_save"):
            assert same_bits(wrapper.modules_to_save["default"].weight, donor.lm_head.weight)
            if way != "files":
                assert not wrapper.modules_to_save["default"].weight.requires_grad
    same = torch.equal(output(model, inputs(base)), output(donor, inputs(base)))
    assert same or "weight" in " ".join(lines(caplog))
    if targets == "all" or (tied_base and modules == ["embed_tokens"]):
        assert same and lines(caplog) == []


@WAYS
def test_a_named_module_that_the_donor_lacks_is_refused(way: str, tmp_path: Path) -> None:
    base = tiny_bert()
    donor = BertModel(base.config, add_pooling_layer=False)
    options = {"density": 1.0, "exclude_modules": ["pooler.dense"], "modules_to_save": ["pooler"]}
    with pytest.raises(DonorError, match=r"donor must hold the modules in modules_to_save, got .*pooler\.dense\.bias"):
        made(way, base, donor, tmp_path, task_type="SEQ_CLS", **options)


def test_a_head_that_the_task_adds_may_stay_the_bases() -> None:
    base = tiny_bert()
    donor = perturbed(BertModel(base.config)).eval()
    model = graft(base, donor, density=1.0, task_type="SEQ_CLS")
    head = model.base_model.model.classifier.modules_to_save["default"]
    assert same_bits(head.weight, base.classifier.weight) and head.weight.requires_grad


def test_a_module_that_the_base_lacks_is_refused() -> None:
    base = tiny_llama()
    with pytest.raises(ValueError, match=r"modules_to_save must name modules of the base, got \['lm_haed'\]"):
        graft(base, perturbed(base), density=1.0, modules_to_save=["lm_haed"])


def test_a_tied_encoder_decoder_gives_its_embeddings() -> None:
    base = tiny_t5()
    donor = perturbed(base)
    model = graft(base, donor, density=1.0, modules_to_save=["shared"], task_type="SEQ_2_SEQ_LM", target_modules="all")
    assert torch.equal(output(model, inputs(base)), output(donor, inputs(base)))


# Running statistics


def resnet() -> ResNetForImageClassification:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2)
    torch.manual_seed(0)
    return ResNetForImageClassification(config).eval()


def trained(model: nn.Module) -> nn.Module:
    """A donor whose running statistics have moved."""
    donor = perturbed(model).train()
    with torch.no_grad():
        for _ in range(3):
            donor(torch.randn(8, 3, 16, 16))
    return donor.eval()


@WAYS
def test_running_statistics_are_told_and_carried_when_asked(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = resnet()
    donor, batch = trained(base), torch.randn(4, 3, 16, 16)
    model = made(way, base, donor, tmp_path, density=1.0, target_modules="all")
    assert not torch.equal(output(model, batch), output(donor, batch))
    (line,) = lines(caplog)
    assert "other running statistics than the base" in line and "running_mean" in line
    assert argument(line) == ["normalization"]
    caplog.clear()
    model = made(way, base, donor, tmp_path, density=1.0, target_modules="all", modules_to_save=argument(line))
    assert torch.equal(output(model, batch), output(donor, batch)) and lines(caplog) == []
    model.save_pretrained(tmp_path / "again")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again")
    assert torch.equal(output(loaded, batch), output(donor, batch))
    merged = loaded.merge_and_unload()
    assert torch.equal(output(merged, batch), output(donor, batch))


def test_running_statistics_of_plain_modules_are_named_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    donor = perturbed(base).train()
    donor(torch.randn(8, 4))
    x = torch.randn(3, 4)
    graft(base, donor, density=1.0)
    (line,) = lines(caplog)
    assert "2 buffers (1.running_mean, 1.running_var)" in line
    model = graft(base, donor, density=1.0, modules_to_save=argument(line))
    assert torch.equal(output(model, x), output(donor, x))


def test_statistics_that_are_equal_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    base = resnet()
    graft(base, perturbed(base), density=1.0, target_modules="all")
    assert lines(caplog) == []


# The budget


def test_a_budget_beyond_what_differs_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = tiny_llama(torch.bfloat16)
    donor = copy.deepcopy(base)
    with torch.no_grad():
        donor.model.layers[1].mlp.up_proj.weight[:3] += 1
    for way in ("memory", "files"):
        model = made(way, base, donor, tmp_path, density=0.5, task_type="CAUSAL_LM")
        assert model.peft_config["default"].record.entries == 48
        assert [line.split(":")[0] for line in lines(caplog)] == [
            f"budget is capped at 48 of {round(0.5 * model.peft_config['default'].record.eligible):,} entries"
        ]
        caplog.clear()
        assert torch.equal(output(model, inputs(base)), output(donor, inputs(base)))
    extract(tmp_path / "base", tmp_path / "donor", tmp_path / "exact", exact=True)
    capped, exact = (Patch.load(tmp_path / name / "adapter_model.safetensors").num_params for name in ("out", "exact"))
    assert capped == exact == 48


def test_a_learned_mask_has_no_more_budget_than_candidates(caplog: pytest.LogCaptureFixture) -> None:
    base = tiny_llama()
    donor = copy.deepcopy(base)
    with torch.no_grad():
        donor.model.norm.weight[:5] += 1
    model = get_peft_model(base, GraftConfig(donor=donor, num_params=9, selection="learned"))
    assert model.peft_config["default"].record.entries == 5
    assert "capped at 5 of 9 entries" in lines(caplog)[0]


def test_the_log_is_below_the_package(caplog: pytest.LogCaptureFixture) -> None:
    base = tiny_llama()
    logging.getLogger("peft_graft").setLevel(logging.ERROR)
    try:
        graft(base, perturbed(base), density=0.1)
    finally:
        logging.getLogger("peft_graft").setLevel(logging.NOTSET)
    assert lines(caplog) == []
