"""The model as a module: sizes, options, precision, compilation, gradient checkpointing."""

import copy

import pytest
import torch
from torch import nn

import vmamba
from vmamba.models import SS2D, VMamba, VMambaBackbone, VMambaConfig, get_config


def tiny(**overrides: object) -> VMamba:
    torch.manual_seed(0)
    return vmamba.create_model("vmamba_test", **overrides)


def image(height: int = 64, width: int = 64, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("downsample", ["conv3x3", "conv2x2", "patch_merging"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (64, 40), (97, 161)])
def test_any_size_from_32_on(height: int, width: int, downsample: str) -> None:
    model = tiny(downsample=downsample).eval()
    with torch.inference_mode():
        maps = model.forward_intermediates(image(height, width), intermediates_only=True)
        logits = model(image(height, width))
    assert logits.shape == (2, 10)
    assert torch.isfinite(logits).all()
    rounding = {"conv3x3": 1, "patch_merging": 1, "conv2x2": 0}[downsample]
    rows, columns = maps[0].shape[2:]
    for smaller in maps[1:]:
        rows, columns = (rows + rounding) // 2, (columns + rounding) // 2
        assert smaller.shape[2:] == (rows, columns)


OPTIONS = [
    {"gated": True},
    {"gated": True, "gate_act": False, "out_act": True},
    {"d_conv": 0},
    {"d_conv": 5, "conv_bias": True},
    {"d_state": 5},
    {"d_state": 20, "dt_rank": 3},
    {"out_norm": "cnorm"},
    {"routes": "cascade2d"},
    {"routes": "bidi", "sequential_routes": True},
    {"force_fp32": True, "sequential_routes": True},
    {"mlp_ratio": 0.0},
    {"ssm_ratio": 0.0},
    {"gated_mlp": True, "mlp_drop_rate": 0.1, "ssm_drop_rate": 0.1, "drop_rate": 0.1},
    {"post_norm": True},
    {"norm_layer": "bn"},
    {"pos_embed": True},
    {"stem": "patch"},
    {"patch_norm": False},
    {"downsample": "none", "dims": (8, 8, 8, 8), "img_size": 32},
    {"ssm_init": "random"},
    {"ssm_init": "zero"},
    {"dt_init": "constant"},
    {"drop_path_rate": 0.2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_option_trains_every_parameter(options: dict) -> None:
    model = tiny(**options).train()
    model(image(32, 48, batch=8)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
    assert not without


def test_sequential_routes_and_forced_float32_give_equal_results() -> None:
    plain = tiny().eval()
    with torch.inference_mode():
        expected = plain(image())
        for options in ({"sequential_routes": True}, {"force_fp32": True}, {"norm_layer": "ln"}):
            other = tiny(**options).eval()
            other.load_state_dict(plain.state_dict())
            torch.testing.assert_close(other(image()), expected, rtol=1e-5, atol=1e-6)


def test_position_embedding_follows_the_size_of_the_image() -> None:
    model = tiny(pos_embed=True, img_size=(64, 96)).eval()
    assert model.pos_embed.shape == (1, 8, 16, 24)
    with torch.inference_mode():
        small, native = model(image(48, 56)), model(image(64, 96))
    assert torch.isfinite(small).all()
    assert torch.isfinite(native).all()


def test_drop_path_rises_to_the_last_block_and_only_acts_in_training() -> None:
    model = tiny(drop_path_rate=0.5)
    rates = [m.rate for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5])
    x = image(batch=4)
    model.eval()
    torch.testing.assert_close(model(x), model(x), rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(x), model(x))


def test_gradient_checkpointing_changes_nothing_but_memory() -> None:
    model = tiny().train()
    gradients = []
    for enabled in (False, True):
        model.set_grad_checkpointing(enabled)
        model.zero_grad()
        model(image()).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_logits_near_float32_and_gradients_finite(dtype: torch.dtype) -> None:
    model = tiny().train()
    expected = model(image())
    with torch.autocast("cpu", dtype=dtype):
        logits = model(image())
    assert torch.linalg.norm(logits.float() - expected) / torch.linalg.norm(expected) < 0.05
    logits.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize(
    ("dtype", "overrides", "residual"),
    [
        (torch.bfloat16, {}, torch.bfloat16),
        (torch.bfloat16, {"residual_in_fp32": True}, torch.float32),
        (torch.float16, {}, torch.float32),
    ],
)
def test_residuals_under_autocast(dtype: torch.dtype, overrides: dict, residual: torch.dtype) -> None:
    model = tiny(**overrides).train()
    dtypes = set()
    for stage in model.stages():
        for block in stage.blocks:
            block.register_forward_hook(lambda module, inputs, output: dtypes.update((inputs[0].dtype, output.dtype)))
    with torch.autocast("cpu", dtype=dtype):
        model(image())
    assert dtypes == {residual}


def test_float64_passes_through_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tiny().double().patch_embed(image().double()).dtype == torch.float64


def test_sixteen_bit_weights_and_float64_weights_run() -> None:
    model = tiny().eval()
    with torch.inference_mode():
        expected = model.double()(image().double())
        assert expected.dtype == torch.float64
        half = model.bfloat16()(image().bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.linalg.norm(half.double() - expected) / torch.linalg.norm(expected) < 0.1


@pytest.mark.parametrize("options", [{}, {"gated": True, "d_state": 4, "routes": "bidi"}], ids=str)
def test_compiles_to_one_graph_with_dynamic_sizes(options: dict) -> None:
    model = tiny(**options).eval()
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    with torch.no_grad():
        for height, width in ((64, 96), (96, 64), (80, 112)):
            torch.testing.assert_close(compiled(image(height, width)), model(image(height, width)))
    assert graphs == 1


def test_exports_with_dynamic_batch_and_size() -> None:
    model = tiny().eval()
    batch, height, width = torch.export.Dim("batch", max=8), torch.export.Dim.AUTO, torch.export.Dim.AUTO
    program = torch.export.export(model, (image(64, 96),), dynamic_shapes=({0: batch, 2: height, 3: width},))
    for x in (image(64, 96), image(128, 64, batch=3)):
        torch.testing.assert_close(program.module()(x), model(x))


def test_runs_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = VMamba(get_config("vmamba_tiny"))
        assert model(torch.empty(1, 3, 224, 224)).shape == (1, 1000)


@pytest.mark.parametrize("x", [torch.zeros(2, 1, 64, 64), torch.zeros(3, 64, 64)])
def test_an_image_of_another_shape_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\)"):
        tiny()(x)


def test_a_mixed_up_ss2d_is_refused() -> None:
    with pytest.raises(ValueError, match="does not go with"):
        SS2D(8, routes="cascade2d", sequential_routes=True)


def test_initial_time_scales_cover_the_range_they_are_given() -> None:
    op = SS2D(64, ssm_ratio=4.0, dt_min=0.01, dt_max=0.2)
    delta = nn.functional.softplus(op.dt_projs_bias)
    assert 0.01 <= delta.min() < 0.012
    assert 0.17 < delta.max() <= 0.2
    torch.testing.assert_close(-torch.exp(SS2D(8, d_state=3).A_logs[0]), torch.tensor([-1.0, -2.0, -3.0]))


def test_weight_decay_spares_time_scales_and_skip_weights() -> None:
    spared = VMamba(VMambaConfig(depths=(1,), dims=(8,), pos_embed=True)).no_weight_decay()
    block = "layers.0.blocks.0.op."
    assert spared == {"pos_embed", block + "A_logs", block + "Ds", block + "dt_projs_bias"}


def test_copies_and_assigned_weights_are_spared_too() -> None:
    model = tiny()
    spared = model.no_weight_decay()
    assert copy.deepcopy(model).no_weight_decay() == spared
    with torch.device("meta"):
        empty = tiny()
    empty.load_state_dict(model.state_dict(), assign=True)
    assert empty.no_weight_decay() == spared
    nn.utils.parametrize.register_parametrization(model.layers[0].blocks[0].op, "A_logs", nn.Identity())
    assert model.no_weight_decay() - spared == {"layers.0.blocks.0.op.parametrizations.A_logs.original"}


HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")  # of the stem: images have no gradients
def test_every_module_that_takes_part_calls_its_hooks(kind: str) -> None:
    model, called = tiny(), set()
    containers = {"layers", "classifier"}
    wanted = {name for name, _ in model.named_modules() if name not in containers and not name.endswith("gate_act")}
    for name, module in model.named_modules():
        getattr(module, kind)(lambda *_, name=name: called.add(name))
    model(image()).sum().backward()
    assert called == wanted


def test_a_hook_changes_what_a_norm_gives() -> None:
    model = tiny().eval()
    block = model.layers[0].blocks[0]
    for norm in (block.norm, block.op.out_norm, block.norm2):
        before, hook = model(image()), norm.register_forward_hook(lambda module, args, y: 0 * y)
        assert not torch.allclose(model(image()), before, rtol=1e-3)
        hook.remove()
        assert torch.equal(model(image()), before)


def test_gradients_of_each_image_with_torch_func() -> None:
    model, images = tiny().eval(), image(32, 40)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict, image: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, images)
    for i, one in enumerate(images):
        model.zero_grad()
        model(one[None]).square().sum().backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(gradients[name][i], p.grad, rtol=1e-4, atol=1e-5)


def test_a_default_dtype_of_float64_is_that_of_every_parameter() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        assert {p.dtype for p in tiny().parameters()} == {torch.float64}
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_default_device_plays_no_part() -> None:
    model, images = tiny().eval(), image(40, 32)
    expected = model(images)
    with torch.device("meta"):
        assert torch.equal(model(images), expected)


@pytest.mark.parametrize("routes", ["cross2d", "cascade2d"])
def test_an_empty_batch_gives_no_logits(routes: str) -> None:
    model = tiny(routes=routes)
    logits = model(image(batch=0))
    logits.sum().backward()
    assert logits.shape == (0, 10)


def test_a_fresh_head_is_in_the_mode_of_the_model_and_a_refused_one_changes_nothing() -> None:
    model = tiny().eval()
    model.reset_classifier(3)
    assert not model.get_classifier().training
    config = model.config
    for classes, pool in ((5, "max"), (5, ""), (2.5, None)):
        with pytest.raises(ValueError, match=r"."):
            model.reset_classifier(classes, pool)
    assert (model.config, model.num_classes, model.global_pool) == (config, 3, "avg")


@pytest.mark.parametrize("indices", [0, 5, -1, 1.5, "a", [], [4], [0.5]])
def test_stages_that_are_not_there_are_refused(indices: object) -> None:
    with pytest.raises(ValueError, match=r"stages -4 to 3 \(or be a count from 1 to 4\); got"):
        tiny().forward_intermediates(image(), indices=indices)


def test_what_is_left_after_pruning_still_runs() -> None:
    model, images = tiny().eval(), image()
    whole = model.forward_intermediates(images, intermediates_only=True)
    assert model.prune_intermediate_layers([1]) == [1]
    last, maps = model.forward_intermediates(images, indices=1)
    assert torch.equal(maps[0], whole[1])
    assert torch.equal(last, whole[1])
    model.reset_classifier(5, "avg")
    logits = model(images)
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_maps_of_a_backbone_through_the_methods_of_a_model() -> None:
    model, images = VMambaBackbone(get_config("vmamba_test"), out_indices=(0, 3)).eval(), image()
    maps = model(images)
    assert torch.equal(model.forward_features(images), maps[1])
    last, raw = model.forward_intermediates(images)
    assert torch.equal(last, maps[1])
    assert [y.shape[1] for y in raw] == [8, 12, 16, 24]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_feature_info_names_the_modules_that_give_the_maps(checkpointing: bool) -> None:
    model, seen = tiny(), []
    model.set_grad_checkpointing(checkpointing)
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(lambda module, args, y: seen.append(y))
    maps = model.forward_intermediates(image(), intermediates_only=True)
    assert all(torch.equal(y.permute(0, 3, 1, 2), m) for y, m in zip(seen, maps, strict=True))
