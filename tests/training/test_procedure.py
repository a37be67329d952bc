"""The published procedure, against its formula."""

from __future__ import annotations

import copy

import torch
from torch import nn

from batches import examples, gradient, loss_of, whole
from grafts import MLP, graft, held
from models import perturbed
from peft_graft import initialize_graft
from peft_graft.selection.topk import top_k_mask
from peft_graft.training.loss import mean_loss
from peft_graft.training.procedure import sigmoid_mask


def test_the_published_procedure_is_followed_step_by_step() -> None:
    base = MLP()
    train, validation, budget, lr = examples(), examples((5, 2)), 20, 1e6
    donor = copy.deepcopy(base)
    optimizer = torch.optim.Adam(donor.parameters(), lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        loss_of(donor, whole([*train, *validation])).backward()
        optimizer.step()
    names = sorted(name for name, _ in base.named_parameters())
    before = torch.cat([base.get_parameter(name).detach().flatten() for name in names])
    delta = torch.cat([donor.get_parameter(name).detach().flatten() for name in names]) - before

    def at(mask: torch.Tensor) -> nn.Module:
        model, values = copy.deepcopy(base), before + mask * delta
        for name in names:
            parameter = model.get_parameter(name)
            parameter.data.copy_(values[: parameter.numel()].view_as(parameter))
            values = values[parameter.numel() :]
        return model

    logits = torch.rand(len(delta), generator=torch.Generator().manual_seed(3))
    start = top_k_mask(delta.abs(), budget).float()
    losses, masks = [], []
    for _ in range(4):
        soft = start + (1 - 2 * start) * torch.sigmoid(logits - 10)
        masks.append(top_k_mask(soft, budget))
        losses.append(mean_loss(at(masks[-1].float()), validation, loss_of))
        found = gradient(at(soft), whole(train))
        push = torch.cat([found[name].flatten() for name in names]) * delta * (1 - 2 * start)
        logits -= lr * push * torch.sigmoid(logits - 10) * (1 - torch.sigmoid(logits - 10))
    best = masks[losses.index(min(losses))]
    assert losses.index(min(losses)) > 0 and not torch.equal(best, start.bool())

    model = graft(base, donor, num_params=budget, selection="sigmoid", seed=3)
    options = {"budget": budget, "steps": 3, "validation": validation, "seed": 3, "lr": lr}
    found = sigmoid_mask(model, model.base_model, "default", train, loss_fn=loss_of, show_progress_bar=False, **options)
    assert torch.equal(torch.cat([found[name].flatten() for name in names]), best.float())


def test_the_published_procedure_starts_at_magnitude_and_never_ends_worse() -> None:
    base = MLP()
    donor = perturbed(base, scale=0.5)
    batches, validation = examples(), examples((6,))
    start = graft(base, donor, num_params=15)
    model = graft(base, donor, num_params=15, selection="sigmoid")
    assert held(model) == held(start)
    initialize_graft(model, batches, calibration=validation, loss_fn=loss_of, show_progress_bar=False, steps=0)
    assert held(model) == held(start)
    initialize_graft(model, batches, calibration=validation, loss_fn=loss_of, show_progress_bar=False, steps=5)
    assert sum(map(len, held(model).values())) == model.peft_config["default"].record.entries == 15
    losses = [mean_loss(each.eval(), validation, loss_of) for each in (model, start)]
    assert losses[0] <= losses[1]
