"""Train and fit grafts on what the donor says, KL(donor || graft), with no labels and no second model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from accelerate.utils import extract_model_from_parallel, send_to_device
from huggingface_hub.utils import tqdm
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.functional import kl_div

from ..checkpoints.donor import MAX_LISTED
from ..checkpoints.pairing import FLOAT_DTYPES, Donor, DonorError, ZerosDonor, find_names
from ..tuner import GraftModel
from ..tuner.apply.in_place import has_patch
from ..tuner.backends.quantized import require_float
from ..tuner.backends.sharded import require_whole
from ..tuner.left_out import BaseTensor, aliases_of, base_tensors
from .donor_outputs import (
    LABELS,
    TOP_K,
    CountedTokens,
    Distributions,
    DonorOutputs,
    OutputsWriter,
    TokenKind,
    counted_positions,
    row_keys,
    tensors_by_row,
)
from .in_use import find_tuner, require_in_use
from .loss import LossFn, default_loss, loss_of
from .measure import scoring_mode

# The donor's pass


@contextmanager
def donor_in_place(model: nn.Module, tuner: GraftModel, adapter_name: str) -> Iterator[None]:
    """Make the base the donor for as long as this context lasts, in evaluation mode and with all adapters off.

    All tensors that the donor has are read one at a time and written into the base's own memory; the base's values wait
    on the CPU, and are written back in the end, bit for bit, also after an exception.

    Args:
        model: The model whose forward is wanted.
        tuner: The graft model inside of it.
        adapter_name: Name of the adapter whose donor is meant.

    Raises:
        DonorError: There is no donor any more, or it lacks parameters of the model, or has others.
        ValueError: The base is quantized or sharded, or a patch is in place.
    """
    pairs = _donor_names(tuner, adapter_name)
    donor = tuner.donors[adapter_name]
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    off = [wrapper for wrapper in wrappers if not wrapper.disable_adapters]
    saved: list[tuple[torch.Tensor, torch.Tensor]] = []
    with scoring_mode(model, tuner):
        try:
            for wrapper in off:
                wrapper.enable_adapters(False)
            for tensor, name in pairs:
                held = tensor.values()
                saved.append((held, held.to("cpu", copy=True)))
                held.copy_(_value(donor, name, held))
            yield
        finally:
            for held, values in saved:
                held.copy_(values)
            for wrapper in off:
                wrapper.enable_adapters(True)


def _donor_names(tuner: GraftModel, adapter_name: str) -> list[tuple[BaseTensor, str]]:
    """Find the donor's name of every tensor of the base that it has.

    Raises:
        DonorError: As `donor_in_place`.
        ValueError: As `donor_in_place`.
    """
    donor = tuner.donors.get(adapter_name)
    if donor is None or isinstance(donor, ZerosDonor):
        raise DonorError(
            f"adapter {adapter_name!r} must have a donor with outputs, got "
            f"{'zeros' if donor else 'none: a saved adapter does not need it any more'}. Use objective='labels', or "
            "make the graft from its donor."
        )
    require_float(tuner._layers(), "compared with the donor's outputs")
    tensors = base_tensors(tuner.model)
    owned = {tensor.names[0]: tensor for tensor in tensors if not tensor.is_buffer}
    remedy = "Call peft_graft.store_donor_outputs before the model is sharded, or open outputs that you have stored."
    parameters = {
        name: cast(torch.Tensor, tensor.module._parameters[tensor.attribute]) for name, tensor in owned.items()
    }
    require_whole(parameters, "replaced by the donor's", remedy)
    if any(has_patch(parameter) for parameter in parameters.values()):
        raise ValueError(
            "base must hold its own values while the donor's outputs are computed, got a patch in place. Leave "
            "`with model.applied()` first."
        )
    prefix = getattr(tuner.model, "base_model_prefix", "")
    found = find_names(
        [name for tensor in tensors for name in tensor.names],
        donor,
        (prefix,) if prefix else (),
        aliases_of(tuner.model, donor),
    )
    pairs, lost = [], []
    for tensor in tensors:
        name = next((found[each] for each in tensor.names if each in found), None)
        fits = name is not None and tuple(donor.shape(name)) == tuple(tensor.values().shape)
        if name is not None and fits:
            pairs.append((tensor, name))
        elif not tensor.is_buffer:
            lost.append(tensor.names[0])
    if lost:
        raise DonorError(
            f"donor must hold every parameter of the model to have outputs of its own, got {donor.name!r} without "
            f"{', '.join(lost[:MAX_LISTED])}{', ...' if lost[MAX_LISTED:] else ''} of the base's shape. Use "
            "objective='labels', or a donor with its head."
        )
    return pairs


def _value(donor: Donor, name: str, held: torch.Tensor) -> torch.Tensor:
    """Read a tensor of the donor that is to stand in for one of the base.

    Raises:
        DonorError: It is quantized.
    """
    value = donor.get(name)
    if held.is_floating_point() and value.dtype not in FLOAT_DTYPES:
        raise DonorError(
            f"donor tensors must be float64, float32, float16 or bfloat16, got {value.dtype} in {name!r} of "
            f"{donor.name!r}. Load full-precision weights."
        )
    return value


def store_donor_outputs(
    model: nn.Module,
    dataloader: Iterable[Any],
    *,
    adapter_name: str = "default",
    top_k: int | None = None,
    tokens: CountedTokens | None = None,
    output_dir: str | os.PathLike[str] | None = None,
    show_progress_bar: bool = True,
) -> DonorOutputs:
    """Compute the donor's outputs for rows of data, once, and keep them for `objective="donor"`.

    The base becomes the donor for one pass over the rows that are not known yet, and is itself again afterwards, bit
    for bit. What is kept are the log-probabilities of all classes, or of a vocabulary's `top_k` likeliest tokens and of
    all others together. Rows are found again by what they hold, in any order and with any padding.

    `initialize_graft`, `fit_alpha` and `DonorObjectiveMixin` call this themselves; call it first to choose options, or
    to write the outputs to files.

    Args:
        model: A model with a graft whose donor is at hand; not sharded.
        dataloader: Batches, with or without labels. Of several ranks each may have its share.
        adapter_name: Name of the adapter.
        top_k: Tokens of a vocabulary that are kept one by one. Default 64, or as before.
        tokens: Positions that count, see `DonorOutputs`. Default `"completion"`, or as before.
        output_dir: New directory to write the outputs to, batch by batch; with several ranks, another on each. By
            default they stay in memory.
        show_progress_bar: Show a progress bar.

    Returns:
        All outputs kept for this adapter.

    Raises:
        DonorError: The donor is not at hand, or lacks parameters of the model.
        ValueError: The options are not those of outputs that are kept already; the model's outputs are no logits of two
            or more classes; its base is quantized or sharded, or it is merged.
        FileExistsError: `output_dir` exists.
    """
    model = extract_model_from_parallel(model)
    tuner = find_tuner(model)
    require_in_use(tuner, adapter_name)
    state = tuner.states[adapter_name]
    kept = _with_options(state.donor_outputs, top_k, tokens)
    missing = _unknown_batches(tuner, dataloader, kept)
    first = next(missing, None)
    if first is None:
        state.donor_outputs = kept
        if output_dir is not None:
            kept.save(output_dir)
        return kept
    writer = None if output_dir is None else OutputsWriter(output_dir, kept.top_k, kept.tokens)
    with (
        writer or nullcontext(),
        donor_in_place(model, tuner, adapter_name),
        torch.no_grad(),
        tqdm(desc="donor's outputs", unit="batch", disable=not show_progress_bar, leave=False) as bar,
    ):
        for keys, batch in chain([first], missing):
            logits, counts = _counted_logits(tuner, batch, _run(model, tuner, batch), kept.tokens)
            (writer or kept).add(keys, counts, Distributions.of(logits, kept.top_k))
            bar.update()
    if output_dir is not None:
        kept.extend(DonorOutputs.open(output_dir))
    state.donor_outputs = kept
    return kept


def use_donor_outputs(
    model: nn.Module, outputs: DonorOutputs | str | os.PathLike[str], *, adapter_name: str = "default"
) -> DonorOutputs:
    """Give an adapter outputs that were stored before, from this or another process, instead of its donor's own.

    Args:
        model: A model with a graft; it may be sharded, and its donor need not be at hand.
        outputs: The outputs, or the directory that holds them.
        adapter_name: Name of the adapter.

    Returns:
        The outputs.

    Raises:
        ValueError: The directory holds none, or damaged ones.
    """
    kept = outputs if isinstance(outputs, DonorOutputs) else DonorOutputs.open(outputs)
    find_tuner(model).states[adapter_name].donor_outputs = kept
    return kept


def _with_options(kept: DonorOutputs | None, top_k: int | None, tokens: CountedTokens | None) -> DonorOutputs:
    """Return the outputs that are kept already, or a place for new ones.

    Raises:
        ValueError: They were made with other options.
    """
    if kept is None:
        return DonorOutputs(TOP_K if top_k is None else top_k, tokens or "completion")
    if (top_k or kept.top_k, tokens or kept.tokens) != (kept.top_k, kept.tokens):
        raise ValueError(
            f"top_k and tokens must be those of the outputs that are kept, {kept.top_k} and {kept.tokens!r}, got "
            f"{top_k!r} and {tokens!r}. Leave them out, or forget the others first: "
            "use_donor_outputs(model, DonorOutputs(top_k, tokens))."
        )
    return kept


def _unknown_batches(
    tuner: GraftModel, dataloader: Iterable[Any], kept: DonorOutputs
) -> Iterator[tuple[list[bytes], Mapping[str, Any]]]:
    """Yield the batches in which a row is not known yet, with the keys of their rows."""
    for batch in dataloader:
        keys = row_keys(batch, kept.tokens, _kind(tuner) == "decoder")
        if any(key not in kept for key in keys):
            yield keys, batch


def _kind(tuner: GraftModel) -> TokenKind:
    """Return what the outputs for a token are about, in models that have one for each."""
    if getattr(getattr(tuner.model, "config", None), "is_encoder_decoder", False):
        return "decoder"
    can_generate = getattr(tuner.model, "can_generate", None)
    return "next" if can_generate is not None and can_generate() else "same"


def _run(model: nn.Module, tuner: GraftModel, batch: Mapping[str, Any], with_labels: bool = False) -> Any:
    """Run a model on a batch, without labels unless they are wanted or the decoder's inputs are made from them."""
    keep = with_labels or _kind(tuner) == "decoder"
    inputs = {name: value for name, value in batch.items() if keep or name not in LABELS}
    return model(**send_to_device(inputs, next(model.parameters()).device))


def _counted_logits(
    tuner: GraftModel, batch: Mapping[str, Any], output: Any, tokens: CountedTokens
) -> tuple[torch.Tensor, list[int]]:
    """Pick the outputs that count.

    Returns:
        Logits [M, C] of the counted positions, row by row, and the number of these in each row.

    Raises:
        ValueError: The outputs are no logits of two or more classes.
    """
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    inputs = tensors_by_row(batch)
    several = getattr(getattr(tuner.model, "config", None), "problem_type", None) == "multi_label_classification"
    labels = inputs.get("labels")
    several = several or (labels is not None and labels.is_floating_point())
    if logits is None or logits.ndim not in (2, 3) or logits.shape[-1] < 2 or several:
        got = "several labels for a row" if several else "none" if logits is None else f"shape {tuple(logits.shape)}"
        raise ValueError(
            "outputs must be logits of two or more classes, for rows [B, C] or for tokens [B, T, C], of which one is "
            f"right, got {got}. Use objective='labels', or pass a loss_fn of your own."
        )
    if logits.ndim == 2:
        return logits, [1] * logits.shape[0]
    counted = counted_positions(inputs, (logits.shape[0], logits.shape[1]), tokens, _kind(tuner))
    return logits[counted.to(logits.device)], counted.sum(1).tolist()


# The loss


def donor_loss(model: nn.Module, batch: Mapping[str, Any], *, adapter_name: str = "default") -> torch.Tensor:
    """Compute the mean of KL(donor || graft) over a batch's rows, or over its tokens that count.

    KL = sum over classes of p_donor * (log p_donor - log p_graft). Of a vocabulary, all tokens beyond the donor's
    likeliest are one class, so that the loss is a lower bound, and 0 where the graft says what the donor says. With the
    config's `donor_weight` w below 1 it is w * KL + (1 - w) * the model's own loss on the labels.

    Args:
        model: A model with a graft, in any wrapper, whose donor's outputs for these rows are stored.
        batch: Mapping of tensors; labels are needed for a weight below 1 only.
        adapter_name: Name of the adapter.

    Returns:
        The loss in nats, a scalar.

    Raises:
        ValueError: The donor has not seen some rows; the outputs are no logits of two or more classes.
    """
    return _donor_loss_and_output(model, batch, adapter_name)[0]


def _donor_loss_and_output(model: nn.Module, batch: Mapping[str, Any], adapter_name: str) -> tuple[torch.Tensor, Any]:
    tuner = find_tuner(model)
    config, kept = tuner.peft_config[adapter_name], tuner.states[adapter_name].donor_outputs
    if kept is None:
        raise ValueError(
            f"donor's outputs must be stored before they are compared, got none for adapter {adapter_name!r}. Call "
            "peft_graft.store_donor_outputs(model, dataloader) first."
        )
    weight = config.donor_weight
    output = _run(model, tuner, batch, with_labels=weight < 1)
    logits, counts = _counted_logits(tuner, batch, output, kept.tokens)
    donor = kept.get(row_keys(batch, kept.tokens, _kind(tuner) == "decoder"), counts).to(logits.device)
    loss = divergence(donor, logits).sum() / max(1, logits.shape[0])
    if weight < 1:
        loss = weight * loss + (1 - weight) * loss_of(output, batch)
    return loss, output


def divergence(donor: Distributions, logits: torch.Tensor) -> torch.Tensor:
    """Compute KL(donor || graft) at each position.

    Args:
        donor: The donor's distributions.
        logits: The graft's logits, float [M, C].

    Returns:
        In nats, float32 [M].
    """
    logits = logits.float()
    if donor.ids is None or donor.log_rest is None:
        return kl_div(logits.log_softmax(-1), donor.log_probs, reduction="none", log_target=True).sum(-1)
    norm, ids = logits.logsumexp(-1), donor.ids.long()
    kept = logits.gather(-1, ids) - norm.unsqueeze(-1)
    rest = logits.scatter(-1, ids, float("-inf")).logsumexp(-1) - norm
    of_kept = kl_div(kept, donor.log_probs, reduction="none", log_target=True).sum(-1)
    return of_kept + kl_div(rest, donor.log_rest, reduction="none", log_target=True)


def objective_loss(
    model: nn.Module,
    batches: Iterable[Any],
    adapter_name: str,
    loss_fn: LossFn | None = None,
    show_progress_bar: bool = True,
) -> LossFn:
    """Return the loss that an adapter's config asks for, with the donor's outputs for these batches stored if need be.

    Args:
        model: A model with a graft.
        batches: All batches that the loss will see.
        adapter_name: Name of the adapter.
        loss_fn: A loss of the user's own, which is returned as it is.
        show_progress_bar: Show a progress bar.

    Returns:
        Mean loss of a batch.
    """
    if loss_fn is not None:
        return loss_fn
    if find_tuner(model).peft_config[adapter_name].objective == "labels":
        return default_loss
    store_donor_outputs(model, batches, adapter_name=adapter_name, show_progress_bar=show_progress_bar)
    return partial(donor_loss, adapter_name=adapter_name)


class DonorObjectiveMixin:
    """Let any Trainer train masks with the objective of the adapter's config.

        class GraftTrainer(DonorObjectiveMixin, Trainer):
            pass

    With `objective="donor"` the donor's outputs for all rows are computed before training (each rank does its share),
    and for rows of evaluation when they first come; the loss is `donor_loss`. Rows need no labels. With
    `objective="labels"` nothing changes.

    Attributes:
        adapter_name: Name of the adapter whose donor is asked; `"default"` unless set.
    """

    adapter_name: str = "default"
    model: Any
    args: Any
    train_dataset: Any
    get_test_dataloader: Any

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Store the donor's outputs, then train."""
        if self._follows_donor():
            self._store_training_rows()
            self.model_accepts_loss_kwargs = False  # the loss is a mean over each batch, whatever num_items_in_batch
        return cast(Any, super()).train(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """Compute the loss of the config's objective."""
        if not self._follows_donor():
            return cast(Any, super()).compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss, output = _donor_loss_and_output(model, inputs, self.adapter_name)
        return (loss, output) if return_outputs else loss

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Store the donor's outputs for rows that are new, then evaluate."""
        if self._follows_donor():
            store_donor_outputs(self.model, dataloader, adapter_name=self.adapter_name, show_progress_bar=False)
        return cast(Any, super()).evaluation_loop(dataloader, *args, **kwargs)

    def _follows_donor(self) -> bool:
        return find_tuner(self.model).peft_config[self.adapter_name].objective == "donor"

    def _store_training_rows(self) -> None:
        if not isinstance(self.train_dataset, Sized):
            raise ValueError(
                f"train_dataset must have a length, got {type(self.train_dataset).__name__}: the donor sees all rows "
                "before training. Store outputs for your rows with store_donor_outputs, and train with donor_loss."
            )
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            with torch.random.fork_rng():  # the order of the rows in training stays what it would be
                rows = self.get_test_dataloader(self.train_dataset)
                kept = store_donor_outputs(
                    self.model,
                    rows,
                    adapter_name=self.adapter_name,
                    show_progress_bar=not self.args.disable_tqdm,
                )
        finally:
            self.args.dataloader_drop_last = drops
        kept.share()
