"""What is put through PEFT's suites: a graft config that needs no arguments, a donor for any base, and the cases."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftConfig
from torch import nn

from peft_graft import GraftConfig, GraftModel
from peft_graft.tuner import modules_to_save

FIXED = {"selection": "magnitude"}


class Noise:
    """A donor for any base: the base plus noise from torch's generator, as PEFT's tests draw their random weights.

    It names no tensors before it has met a base, and then only the targeted ones: `modules_to_save` thus keep the
    base's values and train, as PEFT's tests expect.
    """

    name = "noise"

    def __init__(self, base: Mapping[str, torch.Tensor] | None = None) -> None:
        self._tensors = {}
        for name, tensor in (base or {}).items():
            # Almost equal sizes: no tensor dominates the budget, and a mask changes with a few steps of training.
            sizes = 0.3 + 1e-4 * torch.rand(tensor.shape)
            signs = torch.randint(2, tensor.shape) * 2 - 1
            self._tensors[name] = (tensor.float().cpu() + signs * sizes).to(tensor.dtype)

    def names(self) -> list[str]:
        """Names of the targeted tensors."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def get(self, name: str) -> torch.Tensor:
        """One tensor."""
        return self._tensors[name]


def meet_the_base() -> None:
    """Let a `Noise` donor see the base that it is grafted into."""
    stock = GraftModel._graft

    def graft(self: GraftModel, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        if isinstance(config.donor, Noise):
            config.donor = Noise(self.base_tensors(self.targets(adapter_name)))
        stock(self, adapter_name)

    GraftModel._graft = graft
    named = modules_to_save._named_by_user
    # Of a donor of files, a module that the user names and the donor lacks is refused.
    modules_to_save._named_by_user = lambda config: () if isinstance(config.donor, Noise) else named(config)


@dataclass
class Graft(GraftConfig):
    """A graft that asks for nothing: half of the entries of a noisy donor, chosen by a mask that can be trained."""

    donor: Any = field(default_factory=Noise)
    density: float | None = 0.5
    selection: str = "learned"
    # PEFT's tests ask every method for a start that changes the output with init_weights=False. A graft always does.
    init_weights: InitVar[bool] = False
    # ... and know one method that does so always, DEFT with para=True: see EXEMPTIONS.
    para: ClassVar[bool] = True

    def __post_init__(self, init_weights: bool) -> None:
        """Validate."""
        super().__post_init__()


class LoraLike(Graft):
    """A graft that takes the options of `LoraConfig`, for tests in which LoRA is only an example of a method."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Keep the options that a graft has too."""
        known = {field.name for field in dataclasses.fields(Graft)}
        super().__init__(*args, **{name: value for name, value in options.items() if name in known})

    @classmethod
    def of(cls, config: LoraConfig) -> LoraLike:
        """The graft with the same targets."""
        names = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform")
        return cls(task_type=config.task_type, **{name: getattr(config, name) for name in names})


class FixedLike(LoraLike):
    """The same, with a fixed patch."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Choose by magnitude."""
        super().__init__(*args, **{**options, **FIXED})


class TiedModel(nn.Module):
    """An embedding whose weight is also the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(100, 5)
        self.lin0 = nn.Linear(5, 5)
        self.head = nn.Linear(5, 100, bias=False)
        self.head.weight = self.emb.weight
        self.dtype = torch.float

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [9, 100]."""
        return self.head(self.lin0(self.emb(X))).mean(1).log_softmax(-1)


def _fixed(**options: Any) -> dict[str, Any]:
    return {**FIXED, **options}


# Cases called "fixed" hold a patch, "learned" ones a mask that trains. Name, model of the suite, config, options.
CUSTOM: list[tuple[str, str, type[Graft], dict[str, Any]]] = [
    (name, model, Graft, options)
    for name, model, options in [
        ("fixed MLP one module, by name", "MLP", _fixed(target_modules="lin0")),
        ("fixed MLP one module, in a list", "MLP", _fixed(target_modules=["lin1"], density=None, num_params=17)),
        ("fixed MLP two modules", "MLP", _fixed(target_modules=["lin0", "lin1"])),
        ("fixed MLP default targets", "MLP", _fixed()),
        ("fixed MLP all-linear", "MLP", _fixed(target_modules="all-linear")),
        ("fixed MLP everything", "MLP", _fixed(target_modules="all", density=1.0)),
        ("fixed MLP zeros", "MLP", _fixed(target_modules=["lin0"], donor="zeros")),
        ("fixed MLP random", "MLP", _fixed(target_modules=["lin0"], selection="random")),
        ("fixed MLP density per tensor", "MLP", _fixed(target_modules=["lin0", "lin1"], budget_scope="tensor")),
        ("fixed MLP whole tensors", "MLP", _fixed(target_modules=["lin0", "lin1"], granularity="tensor")),
        ("fixed MLP alpha", "MLP", _fixed(target_modules=["lin0"], alpha=0.5)),
        ("fixed MLP excluded", "MLP", _fixed(target_modules=r"lin\d", exclude_modules=["lin1"])),
        ("fixed MLP modules_to_save", "MLP", _fixed(target_modules=["lin0"], modules_to_save=["lin1"])),
        (
            "fixed MLP target_parameters",
            "MLP",
            _fixed(target_modules=[], target_parameters=["lin0.weight", "lin1.weight"]),
        ),
        ("fixed norms", "MLP_LayerNorm", _fixed(target_modules=["layernorm0", "layernorm1"])),
        ("fixed Embedding", "EmbConv1D", _fixed(target_modules=["emb"])),
        ("fixed transformers Conv1D", "EmbConv1D", _fixed(target_modules=["conv1d"])),
        ("fixed Embedding + Conv1D", "EmbConv1D", _fixed(target_modules=["emb", "conv1d"])),
        ("fixed Conv1d", "Conv1d", _fixed(target_modules=["conv1d"])),
        ("fixed Conv1d in groups", "Conv1dGroups", _fixed(target_modules=["conv1d", "lin0"])),
        ("fixed Conv2d", "Conv2d", _fixed(target_modules=["conv2d"])),
        ("fixed Conv2d + Linear", "Conv2d2", _fixed(target_modules=["conv2d", "lin0"])),
        ("fixed Conv2d 1x1", "Conv2d1x1", _fixed(target_modules=["conv2d"])),
        ("fixed Conv2d in groups", "Conv2dGroups2", _fixed(target_modules=["conv2d"])),
        ("fixed Conv3d", "Conv3d", _fixed(target_modules=["conv3d"])),
        ("fixed MHA", "MHA", _fixed(target_modules=["mha"])),
        ("fixed MHA + Linear", "MHA", _fixed(target_modules=["mha", "lin0"])),
        (
            "fixed bare parameters",
            "MlpUsingParameters",
            _fixed(target_modules=[], target_parameters=["lin0.weight", "lin1.bias"]),
        ),
        ("fixed tied weights", "tied", _fixed(target_modules=["emb", "lin0"])),
        ("learned MLP one module", "MLP", {"target_modules": ["lin0"]}),
        ("learned MLP two modules", "MLP", {"target_modules": ["lin0", "lin1"]}),
        ("learned MLP default targets", "MLP", {}),
        ("learned MLP zeros", "MLP", {"target_modules": ["lin0"], "donor": "zeros"}),
        ("learned MLP density per tensor", "MLP", {"target_modules": ["lin0", "lin1"], "budget_scope": "tensor"}),
        ("learned MLP alpha", "MLP", {"target_modules": ["lin0"], "alpha": 0.5}),
        ("learned MLP excluded", "MLP", {"target_modules": r"lin\d", "exclude_modules": ["lin1"]}),
        ("learned MLP modules_to_save", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
        ("learned norms", "MLP_LayerNorm", {"target_modules": ["layernorm0", "layernorm1"]}),
        ("learned Embedding + Conv1D", "EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
        ("learned Conv1d", "Conv1dBigger", {"target_modules": ["conv1d"]}),
        ("learned Conv2d", "Conv2d", {"target_modules": ["conv2d", "lin0"]}),
        ("learned Conv3d", "Conv3d", {"target_modules": ["conv3d"]}),
        ("learned MHA", "MHA", {"target_modules": ["mha"]}),
        (
            "learned bare parameters",
            "MlpUsingParameters",
            {"target_modules": [], "target_parameters": ["lin0.weight", "lin1.bias"]},
        ),
        ("learned tied weights", "tied", {"target_modules": ["emb", "lin0"]}),
    ]
]

# Two adapters in one MLP: name, method, config, options of the one and of the other.
TOGETHER = [
    (f"{kind} {name}", "graft", Graft, {**base, **one}, {**base, **other})
    for kind, base in (("fixed", FIXED), ("learned", {}))
    for name, one, other in [
        ("same targets", {"target_modules": ["lin0"]}, {"target_modules": ["lin0"]}),
        ("other targets", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
        ("overlapping targets", {"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"]}),
        ("same parameters", *({"target_modules": [], "target_parameters": ["lin0.weight"]},) * 2),
        (
            "other parameters of one module",
            {"target_modules": [], "target_parameters": ["lin0.weight"]},
            {"target_modules": [], "target_parameters": ["lin0.bias"]},
        ),
    ]
]


def for_task(task_type: Any) -> list[Any]:
    """Cases for transformers models: config, options."""
    options = {
        "fixed default": FIXED,
        "fixed everything": _fixed(target_modules="all"),
        "fixed zeros": _fixed(donor="zeros", density=0.1, budget_scope="tensor"),
        "fixed all-linear": _fixed(target_modules="all-linear", alpha=2.0),
        "learned default": {},
        "learned everything": {"target_modules": "all"},
        "learned all-linear": {"target_modules": "all-linear", "budget_scope": "tensor"},
    }
    common: dict[str, Any] = {"task_type": task_type}
    if task_type == "FEATURE_EXTRACTION":
        common["exclude_modules"] = ["pooler.dense"]  # what the suite differentiates does not come through it
    return [pytest.param(Graft, case | common, id=name) for name, case in options.items()]


def for_parameters(rows: list[Any]) -> Iterator[Any]:
    """Cases for experts: model, config, options, with the parameters that LoRA's cases name."""
    for model, method, options in rows:
        if issubclass(method, LoraConfig):
            ours = {name: options[name] for name in ("task_type", "target_modules", "target_parameters")}
            name = f"{model} {'+'.join(options['target_parameters'])}"
            yield pytest.param(model, Graft, _fixed(**ours), id=f"fixed {name}")
            yield pytest.param(model, Graft, ours, id=f"learned {name}")


def like_loras(rows: list[Any]) -> Iterator[Any]:
    """Rows with configs of LoRA as grafts; rows with those of other methods are left out."""
    for row in rows:
        values = row if isinstance(row, tuple) else (row,)
        if all(type(value) is LoraConfig for value in values if isinstance(value, PeftConfig)):
            grafted = tuple(LoraLike.of(value) if isinstance(value, LoraConfig) else value for value in values)
            yield grafted if isinstance(row, tuple) else grafted[0]


def in_place_of_lora(model: nn.Module, names: tuple[str, ...]) -> set[str]:
    """Names of the parameters that a graft has where LoRA has `lora_A` and `lora_B`."""
    found = set()
    for name in names:
        match = re.fullmatch(r"(.*)\.lora_(embedding_)?[AB]\.(\w+)(\.weight)?", name)
        start = f"{match[1]}.graft_patch.{match[3]}." if match else name
        found |= {ours for ours, _ in model.named_parameters() if ours.startswith(start)} or {name}
    return found
