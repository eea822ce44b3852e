"""Optimiser, schedule and moving average of a run, built by timm from the recipe."""

from __future__ import annotations

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn, optim

from vmamba.training.recipe import OptimizerOptions


def make_optimizer(model: nn.Module, options: OptimizerOptions) -> optim.Optimizer:
    """Return AdamW over two groups: matrices, which are decayed, and all the rest, which is not.

    The rest is every parameter of one dimension and whatever `model.no_weight_decay()` names.
    """
    return create_optimizer_v2(
        model,
        opt="adamw",
        lr=options.lr,
        weight_decay=options.weight_decay,
        betas=options.betas,
        eps=options.eps,
    )


def make_schedule(optimizer: optim.Optimizer, options: OptimizerOptions, epochs: int, steps: int) -> CosineLRScheduler:
    """Return the learning rate per iteration: a linear warm-up, at most half of the run, then a cosine.

    `schedule.step_update(n)` sets the rate for iteration n; it is a function of n alone, so a resumed run needs no
    state of it.

    Args:
        optimizer: Whose rate is set.
        options: Rates and length of the warm-up.
        epochs: Length of the run.
        steps: Iterations in an epoch.
    """
    total = max(epochs * steps, 1)
    warmup = min(round(options.warmup_epochs * steps), total // 2)
    return CosineLRScheduler(
        optimizer,
        t_initial=total - warmup,
        lr_min=min(options.min_lr, options.lr),
        warmup_t=warmup,
        warmup_lr_init=min(options.warmup_lr, options.lr),
        warmup_prefix=True,
        t_in_epochs=False,
    )


def make_ema(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """Return a moving average of the weights, which starts fast and slows down to `decay`; None when that is 0."""
    return ModelEmaV3(model, decay=decay, use_warmup=True) if decay else None
