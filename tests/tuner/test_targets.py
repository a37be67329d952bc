"""Which modules and bare parameters are grafted: by default, by name, by layer, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from grafts import MLP, graft, held, output, same_bits
from models import inputs, perturbed, tiny_bert, tiny_gpt2, tiny_llama, tiny_mixtral, tiny_roberta, tiny_t5, tiny_vit
from peft_graft import GraftConfig
from peft_graft.tuner import GraftLayer, GraftLinear


def targeted(model: PeftModel, adapter_name: str = "default") -> set[str]:
    return set(model.base_model.targets(adapter_name))


def names(model: nn.Module, *left_out: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if not any(part in name for part in left_out)}


@pytest.mark.parametrize(
    ("make", "left_out"),
    [
        (tiny_bert, ("_embeddings.", "classifier.")),
        (tiny_roberta, ("_embeddings.", "classifier.")),
        (tiny_gpt2, ("wte.", "wpe.")),
        (tiny_llama, ("embed_tokens.", "lm_head.")),
        (tiny_mixtral, ("embed_tokens.", "lm_head.")),
        (tiny_t5, ("shared.", "relative_attention_bias.")),
        (tiny_vit, ("cls_token", "position_embeddings", "classifier.")),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_default_is_all_but_embeddings_and_head(make: object, left_out: tuple[str, ...]) -> None:
    base = make()
    model = graft(base, "zeros", density=0.1)
    assert targeted(model) == names(base, *left_out)
    assert targeted(graft(base, "zeros", density=0.1, target_modules="all")) == names(base)


def test_the_default_is_the_same_for_a_second_adapter_after_everything() -> None:
    base = tiny_llama()
    model = graft(base, perturbed(base), density=0.1, target_modules="all")
    model.add_adapter("second", GraftConfig(donor=perturbed(base), density=0.1))
    assert targeted(model, "second") == names(base, "embed_tokens.", "lm_head.")


def test_the_targets_are_written_short_and_found_again() -> None:
    base = tiny_roberta()
    config = graft(base, "zeros", density=0.1).peft_config["default"]
    assert len(config.target_modules) < 15
    config.donor = "zeros"
    assert targeted(get_peft_model(tiny_roberta(), config)) == names(base, "_embeddings.", "classifier.")


def test_names_that_no_suffix_tells_apart_are_told_apart() -> None:
    class Model(nn.Module):
        base_model_prefix = "0"

        def __init__(self) -> None:
            super().__init__()
            self.add_module("0", nn.Linear(2, 2))
            self.head = nn.Sequential(nn.Linear(2, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(getattr(self, "0")(x))

    model = graft(Model(), "zeros", density=0.5)
    assert targeted(model) == {"0.weight", "0.bias"}
    assert model.peft_config["default"].target_modules == "0"


@pytest.mark.feature("target_modules: names, an expression, all-linear")
@pytest.mark.parametrize("targets", [["query", "dense"], r".*layer\.1.*(query|dense)"], ids=["names", "regex"])
def test_modules_are_chosen_by_suffix_or_expression(targets: object) -> None:
    base = tiny_bert()
    wanted = {name for name in names(base) if name.rpartition(".")[0].endswith(("query", "dense"))}
    if isinstance(targets, str):
        wanted = {name for name in wanted if "layer.1." in name}
    assert targeted(graft(base, "zeros", density=0.1, target_modules=targets)) == wanted


@pytest.mark.feature("target_modules: names, an expression, all-linear")
@pytest.mark.parametrize(
    ("base", "task", "others"),
    [
        (tiny_bert(), "SEQ_CLS", ("mbeddings", "LayerNorm", "classifier")),
        (tiny_gpt2(), "CAUSAL_LM", ("wte", "wpe", "ln_", "lm_head")),
    ],
    ids=["Linear", "Conv1D of transformers"],
)
def test_all_linear_finds_the_linears_again_for_a_second_adapter(
    base: nn.Module, task: str, others: tuple[str, ...]
) -> None:
    model = graft(base, perturbed(base), density=0.1, target_modules="all-linear", task_type=task)
    first = targeted(model)
    assert first == names(base, *others)
    assert all(isinstance(layer, GraftLinear) for layer in model.base_model._layers())
    model.add_adapter("second", GraftConfig(donor="zeros", density=0.1, target_modules="all-linear"))
    assert targeted(model, "second") == first


@pytest.mark.feature("exclude_modules")
@pytest.mark.parametrize("targets", [None, "all"])
@pytest.mark.parametrize("excluded", [["query", "embeddings.LayerNorm"], r".*(query|embeddings\.LayerNorm)"], ids=str)
def test_excluded_modules_are_left_alone(excluded: object, targets: str | None) -> None:
    base = tiny_bert()
    model = graft(base, "zeros", density=0.1, exclude_modules=excluded, target_modules=targets)
    left_out = () if targets else ("_embeddings.", "classifier.")
    assert targeted(model) == names(base, ".query.", "embeddings.LayerNorm", *left_out)
    assert not isinstance(model.base_model.model.bert.encoder.layer[0].attention.self.query, GraftLayer)


def test_an_expression_that_excludes_nothing_excludes_nothing() -> None:
    with pytest.warns(UserWarning, match="no modules were excluded"):
        model = graft(MLP(), "zeros", density=0.5, exclude_modules=r".*\.(first|second)")
    assert targeted(model) == names(MLP())


def test_excluded_bare_parameters_are_left_alone() -> None:
    base = tiny_vit()
    model = graft(base, "zeros", density=0.1, exclude_modules=["vit.embeddings"], target_modules="all")
    assert targeted(model) == names(base, "cls_token", "position_embeddings")


@pytest.mark.feature("layers_to_transform, layers_pattern")
@pytest.mark.parametrize("targets", [None, "all", "all-linear"])
@pytest.mark.parametrize(("layers", "pattern"), [(1, None), ([1], "layer"), ([0, 1], None)], ids=str)
def test_layers_are_chosen_by_number(layers: object, pattern: str | None, targets: str | None) -> None:
    base = tiny_bert()
    options = {"layers_to_transform": layers, "layers_pattern": pattern, "target_modules": targets}
    wanted = {name for name in names(base) if ".layer." in name and (layers == [0, 1] or ".layer.1." in name)}
    if targets == "all-linear":
        wanted = {name for name in wanted if "LayerNorm" not in name}
    assert targeted(graft(base, "zeros", density=0.1, **options)) == wanted


def test_nothing_to_target_is_an_error() -> None:
    with pytest.raises(ValueError, match="target_modules must match a module that owns parameters, got none"):
        graft(nn.Sequential(nn.Tanh()), "zeros", density=0.1)
    with pytest.raises(ValueError, match="Check exclude_modules and layers_to_transform"):
        graft(tiny_bert(), "zeros", density=0.1, layers_to_transform=7)
    with pytest.raises(ValueError, match="nowhere"):
        graft(tiny_bert(), "zeros", density=0.1, target_modules=["nowhere"])


# Bare parameters


@pytest.mark.feature("target_parameters, 3-D experts")
def test_bare_parameters_are_chosen_by_name() -> None:
    base = tiny_vit()
    donor, batch = perturbed(base, scale=0.5), inputs(base)
    wanted = {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
    model = graft(base, donor, density=1.0, target_parameters=["cls_token", "embeddings.position_embeddings"])
    assert targeted(model) == wanted
    with torch.no_grad():
        for name in wanted:
            base.get_parameter(name).copy_(donor.get_parameter(name))
    assert same_bits(output(model, batch), output(base, batch))
    assert same_bits(output(model.merge_and_unload(), batch), output(base, batch))


@pytest.mark.feature("target_parameters, 3-D experts")
@pytest.mark.parametrize("targets", [None, ["q_proj"]], ids=str)
def test_experts_are_chosen_one_parameter_at_a_time(targets: list[str] | None) -> None:
    base = tiny_mixtral()
    donor, batch = perturbed(base, scale=0.2), inputs(base)
    model = graft(base, donor, density=1.0, target_parameters=["experts.down_proj"], target_modules=targets)
    wanted = {f"model.layers.{i}.mlp.experts.down_proj" for i in range(2)}
    if targets:
        wanted |= {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert targeted(model) == wanted
    with torch.no_grad():
        for name in wanted:
            base.get_parameter(name).copy_(donor.get_parameter(name))
    assert same_bits(output(model, batch), output(base, batch))


def test_parameters_inside_attention_are_found_wrapped_or_not() -> None:
    base = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)).eval()
    donor, x = perturbed(base, scale=0.5), torch.randn(2, 3, 4)
    for modules in (None, ["linear1"], ["self_attn"]):
        model = graft(base, donor, density=1.0, target_modules=modules, target_parameters=["out_proj.weight"])
        assert "0.self_attn.out_proj.weight" in targeted(model)
        wanted = perturbed(base, scale=0).requires_grad_(False)
        for name in targeted(model):
            wanted.get_parameter(name).copy_(donor.get_parameter(name))
        assert same_bits(output(model, x), output(wanted, x))
        assert not same_bits(output(model, x), output(base, x))
    model.add_adapter("second", GraftConfig(donor=donor, density=1.0, target_parameters=["out_proj.weight"]))
    assert targeted(model, "second") == {"0.self_attn.out_proj.weight"}


def test_a_parameter_of_the_model_itself_needs_a_module_around_it() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.linear = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * self.linear(x)

    base = Scaled()
    donor, x = perturbed(base), torch.randn(2, 3)
    model = graft(base, donor, density=1.0, target_parameters=["scale"], target_modules=["linear"])
    assert list(held(model)) == ["linear.bias", "linear.weight", "scale"]
    assert same_bits(output(model, x), output(donor, x))


def test_a_parameter_of_a_model_that_is_a_leaf_is_refused() -> None:
    with pytest.raises(ValueError, match="parameters of submodules, got 'weight', which the model itself owns"):
        graft(nn.Linear(2, 2), "zeros", density=0.5, target_parameters=["weight"])


def test_parameters_that_are_not_there_are_an_error() -> None:
    with pytest.raises(ValueError, match="(?i)no .*target"):
        graft(tiny_vit(), "zeros", density=0.5, target_parameters=["nowhere"])
