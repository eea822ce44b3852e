import math

import pytest
import torch
from timm.utils import ModelEmaV3

from vmamba.models.registry import create_model
from vmamba.training.optim import make_ema, make_optimizer, make_schedule, parameter_groups
from vmamba.training.recipe import OptimizerOptions


@pytest.fixture
def model():
    return create_model("vmamba_test")


def adamw(model, options, batch_size=0):
    return make_optimizer(parameter_groups(model, options), options, batch_size)


def test_only_matrices_are_decayed(model):
    optimizer = adamw(model, OptimizerOptions(weight_decay=0.07))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        state_space = leaf in ("A_logs", "Ds", "dt_projs_bias")
        expected = 0.0 if parameter.ndim == 1 or state_space else 0.07
        assert decay[id(parameter)] == expected, name


def test_the_published_form_decays_A_and_the_bias_of_delta_too(model):
    options = OptimizerOptions(weight_decay=0.07, decay_form="published")
    groups = parameter_groups(model, options)
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or name.endswith(".bias")  # as published.json has it; Ds has one dimension
        assert decay[id(parameter)] == (0.0 if spared else 0.07), name
    leaves = {name.rpartition(".")[2] for name, p in model.named_parameters() if decay[id(p)] and p.ndim == 2}
    assert {"A_logs", "dt_projs_bias"} <= leaves


@pytest.mark.parametrize("form", ["clean", "published"])
def test_layer_decay_lowers_the_rate_towards_the_stem(model, form):
    options = OptimizerOptions(lr=1e-3, warmup_epochs=0, layer_decay=0.5, decay_form=form)
    optimizer = adamw(model, options)
    make_schedule(optimizer, options, epochs=2, steps=10).step_update(0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in model.named_parameters()}
    assert len(by_name) == len(list(model.parameters()))
    assert by_name["classifier.head.weight"] == pytest.approx(1e-3)
    first, last = by_name["layers.0.blocks.0.op.in_proj.weight"], by_name["layers.3.blocks.0.op.in_proj.weight"]
    assert by_name["patch_embed.0.weight"] < first < last < 1e-3
    assert by_name["patch_embed.0.weight"] == by_name["patch_embed.0.bias"]


def test_rates_follow_the_batch_size_as_published(model):
    options = OptimizerOptions(lr=5e-4, min_lr=5e-6, warmup_lr=5e-7, lr_batch=512, warmup_epochs=20)
    optimizer = adamw(model, options, batch_size=1024)
    schedule = make_schedule(optimizer, options, epochs=300, steps=10, batch_size=1024)
    rates = []
    for update in (0, 200, 2999):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-6, 1e-3, 1e-5], rel=1e-3)


def test_what_is_not_trained_is_in_no_group(model):
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model is trained"):
        adamw(model, OptimizerOptions())
    model.get_classifier().requires_grad_(True)
    assert sum(len(group["params"]) for group in adamw(model, OptimizerOptions()).param_groups) == 2


def test_optimizer_takes_its_options(model):
    options = OptimizerOptions(lr=3e-4, betas=(0.8, 0.9), eps=1e-6)
    (group, _) = adamw(model, options).param_groups
    assert (group["lr"], group["betas"], group["eps"]) == (3e-4, (0.8, 0.9), 1e-6)


def test_schedule_warms_up_then_follows_the_cosine(model):
    options = OptimizerOptions(lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, warmup_epochs=2)
    optimizer = adamw(model, options)
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
    optimizer = adamw(model, options)
    schedule = make_schedule(optimizer, options, epochs=1, steps=10)
    rates = []
    for update in range(10):
        schedule.step_update(update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates.index(max(rates)) == 5
    assert max(rates) == pytest.approx(1e-3)


def test_moving_average_starts_fast_and_can_be_off(model):
    assert make_ema(model, OptimizerOptions(ema_decay=0.0)) is None
    ema = make_ema(model, OptimizerOptions(ema_decay=0.9999))
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


@pytest.mark.parametrize("norm_layer", ["ln", "bn"])  # BatchNorm has buffers, one of them of integers
def test_the_average_is_timm_s(norm_layer):
    model = create_model("vmamba_test", norm_layer=norm_layer)
    ours = make_ema(model, OptimizerOptions(ema_decay=0.99))
    theirs = ModelEmaV3(model, decay=0.99, use_warmup=True)
    for step in range(1, 4):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.add_(1)
        ours.update(model, step=step)
        theirs.update(model, step=step)
    states = ours.module.state_dict(), theirs.module.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], value) for name, value in model.state_dict().items())
