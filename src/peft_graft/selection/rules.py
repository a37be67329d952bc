"""Score the entries of a delta: the table of selection rules, and how to add one."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args, overload

import torch

from .topk import SelectionError

__all__ = [
    "RULES",
    "Evidence",
    "Measurement",
    "Rule",
    "RuleKind",
    "SelectionError",
    "get_rule",
    "register_rule",
    "tensor_generator",
]

RuleKind = Literal["data_free", "scored", "trained", "procedure"]
Measurement = Literal["gradient", "path_gradient", "squared_gradient", "input_norm", "sigmoid"]
Blocks = Literal["any_order", "in_order", "never"]

# The measurements that each kind of rule may ask for; None for no data.
_MEASUREMENTS: dict[RuleKind, tuple[Measurement | None, ...]] = {
    "data_free": (None,),
    "scored": ("gradient", "path_gradient", "squared_gradient", "input_norm"),
    "trained": (None,),
    "procedure": ("sigmoid",),
}


@dataclass(frozen=True)
class Evidence:
    """Everything that a rule may look at to score one tensor, or one block of it.

    Args:
        name: Name of the tensor.
        base: Base values, any shape and float dtype.
        delta: `donor - base`, float32, the same shape.
        measured: The measurement that the rule asks for, float32, broadcastable to the shape; None for a rule without
            data.
        seed: Seed of the rule, any integer.
        generator: Random numbers of the tensor, which do not depend on other tensors, for a rule whose `blocks` are
            `"in_order"`; None where the tensor comes as a whole: `tensor_generator(name, seed)` is the same.
    """

    name: str
    base: torch.Tensor
    delta: torch.Tensor
    measured: torch.Tensor | None = None
    seed: int = 0
    generator: torch.Generator | None = None


Score = Callable[[Evidence], torch.Tensor]


@dataclass(frozen=True)
class Rule:
    """A selection rule: a name, how it scores, and what it needs for that.

    Args:
        name: The value of `GraftConfig(selection=...)`.
        score: Function from `Evidence` to the scores of these entries: real, the delta's shape, higher = keep.
        help: One sentence for `--help` and the docs.
        kind: `"data_free"`: base and delta are enough. `"scored"`: one measurement on data comes first
            (`initialize_graft`). `"trained"`: the scores choose candidates, and a Trainer trains the mask among them.
            `"procedure"`: the scores choose the patch that a procedure of its own starts from (`initialize_graft`).
        evidence: The measurement in `Evidence.measured`, for the kind `"scored"`: `"gradient"` (mean gradient of the
            loss at the base), `"path_gradient"` (its mean on the way from base to donor), `"squared_gradient"` or
            `"input_norm"`. For the kind `"procedure"`, the procedure: `"sigmoid"`.
        blocks: How `peft_graft.extract`, which never holds a tensor as a whole, may call `score`, with 1-D parts of a
            tensor: in `"any_order"` and several threads, where the score of an entry depends on nothing but that entry;
            `"in_order"`, where random numbers are drawn; `"never"`, where it depends on the rest of the tensor.
    """

    name: str
    score: Score
    help: str
    kind: RuleKind = "data_free"
    evidence: Measurement | None = None
    blocks: Blocks = "any_order"

    @property
    def needs_data(self) -> bool:
        """Return whether `initialize_graft` must see data before there is a mask."""
        return self.kind in ("scored", "procedure")

    @property
    def trains_mask(self) -> bool:
        """Return whether the scores only say where the training of the mask starts."""
        return self.kind in ("trained", "procedure")


RULES: dict[str, Rule] = {}


@overload
def register_rule(
    name: str,
    score: None = None,
    *,
    help: str,
    kind: RuleKind = "data_free",
    evidence: Measurement | None = None,
    blocks: Blocks = "any_order",
) -> Callable[[Score], Score]: ...


@overload
def register_rule(
    name: str,
    score: Score,
    *,
    help: str,
    kind: RuleKind = "data_free",
    evidence: Measurement | None = None,
    blocks: Blocks = "any_order",
) -> Score: ...


def register_rule(
    name: str,
    score: Score | None = None,
    *,
    help: str,
    kind: RuleKind = "data_free",
    evidence: Measurement | None = None,
    blocks: Blocks = "any_order",
) -> Score | Callable[[Score], Score]:
    """Add a selection rule, to be used by its name in `GraftConfig(selection=...)`.

    A rule gives every entry a score; it neither sorts nor counts. Who loads a saved adapter does not need the rule: the
    mask is made, and the name is only a record. As a decorator:

        @register_rule("relative", help="|delta| / |base|")
        def relative(evidence: Evidence) -> torch.Tensor:
            return evidence.delta.abs() / (evidence.base.float().abs() + 1e-3)

    or as a function: `register_rule("relative", relative, help="|delta| / |base|")`.

    Args:
        name: Name of the rule, not yet in `RULES`. `del RULES[name]` takes it away again.
        score: Function from `Evidence` to scores; left out in a decorator.
        help: One sentence for `--help` and the docs.
        kind: As in `Rule`.
        evidence: As in `Rule`.
        blocks: As in `Rule`.

    Returns:
        `score`, or the decorator, which returns the function as it is.

    Raises:
        SelectionError: One message for all arguments that do not fit.
    """

    def register(function: Score) -> Score:
        problems = _problems(Rule(name, function, help, kind, evidence, blocks))
        if problems:
            raise SelectionError(" ".join(problems))
        RULES[name] = Rule(name, function, help, kind, evidence, blocks)
        return function

    return register if score is None else register(score)


def get_rule(name: str) -> Rule:
    """Look a rule up by name.

    Raises:
        SelectionError: The name is not in `RULES`.
    """
    if name not in RULES:
        raise SelectionError(
            f"selection must be one of {sorted(RULES)}, got {name!r}. Add your own with peft_graft.register_rule."
        )
    return RULES[name]


def tensor_generator(name: str, seed: int) -> torch.Generator:
    """Return the random numbers of one tensor, which do not depend on the other tensors."""
    # The CPU generator looks at no more than 32 bits of its seed.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def random(evidence: Evidence) -> torch.Tensor:
    """Score uniformly at random in [0, 1): the floor every other rule must beat."""
    generator = evidence.generator or tensor_generator(evidence.name, evidence.seed)
    return torch.rand(evidence.delta.shape, generator=generator).to(evidence.delta.device)


def magnitude(evidence: Evidence) -> torch.Tensor:
    """Score by |delta| (the base patch of Panigrahi et al. 2023, section 2)."""
    return evidence.delta.abs()


def taylor(evidence: Evidence) -> torch.Tensor:
    """Score by |g * delta|, g the mean gradient at the base: the first-order change of the loss.

    Ranked by absolute value: taking only the entries that lower the loss overshoots.
    """
    return (_measured(evidence) * evidence.delta).abs()


def fisher(evidence: Evidence) -> torch.Tensor:
    """Score by E[g^2] * delta^2: the second-order change of the loss under a diagonal empirical Fisher."""
    return _measured(evidence) * evidence.delta.square()


def wanda(evidence: Evidence) -> torch.Tensor:
    """Score by |delta| * ||x||, x the input that multiplies the entry: the change of the layer's output."""
    return evidence.delta.abs() * _measured(evidence)


def _measured(evidence: Evidence) -> torch.Tensor:
    if evidence.measured is None:
        raise SelectionError(
            f"evidence must be measured on data, got None for {evidence.name!r}. Call peft_graft.initialize_graft."
        )
    return evidence.measured


def _problems(rule: Rule) -> list[str]:
    """Return one sentence for each argument of `register_rule` that does not fit."""
    problems = []
    if not isinstance(rule.name, str) or not rule.name or any(map(str.isspace, rule.name)):
        problems.append(f"name must be a word without spaces, got {rule.name!r}: it is typed on the command line.")
    elif rule.name in RULES:
        problems.append(f"name must be new, got {rule.name!r}. To replace that rule, del RULES[{rule.name!r}] first.")
    if not callable(rule.score):
        problems.append(f"score must be a function of Evidence, got {type(rule.score).__name__}.")
    if not isinstance(rule.help, str) or not rule.help.strip() or "\n" in rule.help:
        problems.append(f"help must be one line of text, got {rule.help!r}: --help shows it beside the name.")
    if rule.kind not in _MEASUREMENTS:
        problems.append(f"kind must be one of {list(_MEASUREMENTS)}, got {rule.kind!r}.")
    elif rule.evidence not in (allowed := _MEASUREMENTS[rule.kind]):
        listed = ", ".join(map(repr, allowed))
        problems.append(f"evidence of a {rule.kind!r} rule must be one of {listed}, got {rule.evidence!r}.")
    if rule.blocks not in get_args(Blocks):
        problems.append(f"blocks must be one of {list(get_args(Blocks))}, got {rule.blocks!r}.")
    return problems


register_rule("random", random, help="uniformly at random; the floor", blocks="in_order")
register_rule("magnitude", magnitude, help="|delta|; data-free")
register_rule("taylor", taylor, kind="scored", evidence="gradient", help="|g * delta| with the gradient at the base")
register_rule(
    "path_taylor",
    taylor,
    kind="scored",
    evidence="path_gradient",
    help="|g * delta| with the gradient averaged from base to donor",
)
register_rule(
    "fisher", fisher, kind="scored", evidence="squared_gradient", help="g^2 * delta^2 with the gradient at the base"
)
register_rule("wanda", wanda, kind="scored", evidence="input_norm", help="|delta| * ||x|| with the input of the layer")
register_rule("learned", magnitude, kind="trained", help="mask logits trained by any Trainer, starting from |delta|")
register_rule(
    "sigmoid",
    magnitude,
    kind="procedure",
    evidence="sigmoid",
    help="the published procedure (Panigrahi et al. 2023), for parity",
)
