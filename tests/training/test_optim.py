import math

import pytest
import torch

from vmamba.models.registry import create_model
from vmamba.training.optim import make_ema, make_optimizer, make_schedule
from vmamba.training.recipe import OptimizerOptions


@pytest.fixture
def model():
    return create_model("vmamba_test")


def test_only_matrices_are_decayed(model):
    optimizer = make_optimizer(model, OptimizerOptions(weight_decay=0.07))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        state_space = leaf in ("A_logs", "Ds", "dt_projs_bias")
        expected = 0.0 if parameter.ndim == 1 or state_space else 0.07
        assert decay[id(parameter)] == expected, name


def test_optimizer_takes_its_options(model):
    options = OptimizerOptions(lr=3e-4, betas=(0.8, 0.9), eps=1e-6)
    (group, _) = make_optimizer(model, options).param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.9), 1e-6)


def test_schedule_warms_up_then_follows_the_cosine(model):
    options = OptimizerOptions(lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=2)
    optimizer = make_optimizer(model, options)
    schedule = make_schedule(optimizer, options, epochs=10, steps=50)
    rates = []
    for update in range(500):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    for update in range(100):
        assert rates[update] == pytest.approx(1e-6 + (1e-3 - 1e-6) * update / 100)
    for update in range(100, 500):
        share = (update - 100) / 400
        assert rates[update] == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * share)) / 2)


def test_warm_up_takes_at_most_half_of_a_short_run(model):
    options = OptimizerOptions(lr=1e-3, warmup_epochs=20)
    optimizer = make_optimizer(model, options)
    schedule = make_schedule(optimizer, options, epochs=1, steps=10)
    rates = []
    for update in range(10):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates.index(max(rates)) == 5
    assert max(rates) == pytest.approx(1e-3)


def test_moving_average_starts_fast_and_can_be_off(model):
    assert make_ema(model, 0.0) is None
    ema = make_ema(model, 0.9999)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    ema.update(model, step=1)
    assert all(torch.equal(p, torch.ones_like(p)) for p in ema.module.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(2.0)
    ema.update(model, step=1000)
    first = next(ema.module.parameters())
    assert 1.0 < first.max() < 1.02
