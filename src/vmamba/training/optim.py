"""Optimiser, schedule and moving average of a run, built by timm from the recipe."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn, optim

from vmamba.training.recipe import OptimizerOptions


def parameter_groups(model: nn.Module, options: OptimizerOptions) -> list[dict[str, Any]]:
    """Return the parameters that are trained, in groups of one weight decay and one factor of the learning rate.

    Weight decay spares every parameter of one dimension. The clean form also spares what `model.no_weight_decay()`
    names: A, D and the bias of Δ. The published form decays A and the bias of Δ, which have two dimensions, as the
    authors' training did: by name it spared the position embedding alone.
    """
    spared = {"pos_embed"}
    if options.decay_form == "clean" and hasattr(model, "no_weight_decay"):
        spared |= set(model.no_weight_decay())  # type: ignore[operator]
    if options.layer_decay == 1:
        return param_groups_weight_decay(model, options.weight_decay, no_weight_decay_list=spared)
    return param_groups_layer_decay(
        model, options.weight_decay, no_weight_decay_list=spared, layer_decay=options.layer_decay
    )


def make_optimizer(
    groups: list[dict[str, Any]], options: OptimizerOptions, batch_size: int = 0, fused: bool = False
) -> optim.Optimizer:
    """Return AdamW.

    Args:
        groups: What `parameter_groups` gives.
        options: Rates and decay.
        batch_size: Images in an update, for rates that are given for another number; 0 takes the rates as they are.
        fused: Whether one kernel updates all parameters; for GPUs.

    Raises:
        ValueError: There is nothing to train.
    """
    if not any(group["params"] for group in groups):
        raise ValueError("no parameter of the model is trained")
    scale = options.rate_scale(batch_size or options.lr_batch)
    extra: dict[str, Any] = {"fused": True} if fused else {}
    return create_optimizer_v2(
        groups,
        opt="adamw",
        lr=options.lr * scale,
        weight_decay=options.weight_decay,
        betas=options.betas,
        eps=options.eps,
        **extra,
    )


def make_schedule(
    optimizer: optim.Optimizer, options: OptimizerOptions, epochs: int, steps: int, batch_size: int = 0
) -> CosineLRScheduler:
    """Return the learning rate per iteration: a linear warm-up, at most half of the run, then a cosine.

    `schedule.step_update(n)` sets the rate for iteration n; it is a function of n alone, so a resumed run needs no
    state of it.

    Args:
        optimizer: Whose rate is set.
        options: Rates and length of the warm-up.
        epochs: Length of the run.
        steps: Iterations in an epoch.
        batch_size: Images in an update, as for `make_optimizer`.
    """
    total = max(epochs * steps, 1)
    warmup = min(round(options.warmup_epochs * steps), total // 2)
    scale = options.rate_scale(batch_size or options.lr_batch)
    return CosineLRScheduler(
        optimizer,
        t_initial=total - warmup,
        lr_min=min(options.min_lr, options.lr) * scale,
        warmup_t=warmup,
        warmup_lr_init=min(options.warmup_lr, options.lr) * scale,
        warmup_prefix=True,
        t_in_epochs=False,
    )


class MovingAverage(ModelEmaV3):
    """timm's moving average of the weights of one model.

    timm collects the state dicts of both models at every update. For a model of some hundred tensors that takes the
    host milliseconds, while the device waits for it; here it is done once.
    """

    _floating: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None
    _others: tuple[tuple[Tensor, Tensor], ...] = ()

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Move the averages towards the parameters and buffers of the model, which must always be the same one."""
        if self._floating is None:
            tensors = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
            pairs = list(zip(*tensors, strict=True))
            averages, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
            self._floating = averages, values
            self._others = tuple(pair for pair in pairs if not pair[0].is_floating_point())
        torch._foreach_lerp_(*self._floating, weight=1.0 - decay)
        for average, value in self._others:
            average.copy_(value)


def make_ema(model: nn.Module, options: OptimizerOptions) -> MovingAverage | None:
    """Return a moving average of the weights; None when its decay is 0."""
    if not options.ema_decay:
        return None
    return MovingAverage(model, decay=options.ema_decay, use_warmup=options.ema_warmup)
