"""The maps of the scan: exact, in chunks, and refused where there are none."""

import pytest
import torch
from torch import Tensor

import vmamba
from vmamba.analysis import attention_maps
from vmamba.analysis.attention_maps import (
    ScanRecord,
    attention_map,
    diagonal_map,
    exactness,
    normalize,
    query_position,
    record_scan,
    rollout,
    route_maps,
    route_values,
    scan_from_maps,
)
from vmamba.ops.ss2d.reference import ss2d_scan_reference

IMAGE = (64, 96)
MODES = ("attention", "similarity", "decay", "influence")


def lively_model(**changes: object) -> vmamba.VMamba:
    """A model whose scans say something: B and C large beside the skip connection, Δ not small."""
    model = vmamba.create_model("vmamba_test", **changes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("x_proj_weight", "in_proj.weight")):
                parameter.normal_()
            if name.endswith("dt_projs_bias"):
                parameter.normal_(mean=-2.0)
            if name.endswith("Ds"):
                parameter.normal_(std=0.2)
    return model


def record_of(stage: int = 1, block: int = 0, **changes: object) -> ScanRecord:
    return record_scan(lively_model(**changes), torch.randn(3, *IMAGE), stage, block)


@pytest.mark.parametrize("changes", [{}, {"d_state": 3}, {"routes": "bidi"}, {"routes": "unidi", "gated": True}])
@pytest.mark.parametrize("mode", attention_maps.EXACT_MODES)
def test_exact_maps_times_values_are_the_scans_output(changes, mode, relative_error) -> None:
    for stage in range(4):
        record = record_of(stage, **changes)
        routes = scan_from_maps(record, mode, max_elements=2**15)
        assert relative_error(routes.sum(0), record.output) < 1e-5
        skip = (record.D[..., None] * record.u).sum(0)
        assert skip.norm() < 0.5 * record.output.norm()  # or the skip connection would do all of it
        assert exactness(record) < 1e-5


def test_every_route_alone_is_what_the_reference_scan_gives(relative_error) -> None:
    model = lively_model(d_state=2)
    captured = {}

    op = model.layers[1].blocks[0].op
    op.act.register_forward_hook(lambda *args: captured.update(x=args[2]))
    record = record_scan(model, torch.randn(3, *IMAGE), 1, 0)
    x = captured["x"].detach()
    _, H, W, E = x.shape
    projected = (x.reshape(1, H * W, E) @ op.x_proj_weight.flatten(0, 1).T).detach()
    A, D, bias = (t.detach() for t in op._scan_parameters())
    width = projected.shape[2] // 4
    for k in range(4):
        # Silencing C and D of the others leaves one route's share of the merged output.
        only = projected.clone().view(1, H * W, 4, width)
        only[:, :, [i for i in range(4) if i != k], -2:] = 0
        skip = torch.zeros_like(D)
        skip[k] = D[k]
        exact = ss2d_scan_reference(
            x.reshape(1, H * W, E), only.flatten(2), op.dt_projs_weight.detach(), bias, A, skip, height=H, width=W
        )[0].T
        for mode in attention_maps.EXACT_MODES:
            assert relative_error(scan_from_maps(record, mode)[k], exact) < 1e-5


def test_float64_maps_are_exact_to_float64(relative_error) -> None:
    record = record_scan(lively_model(d_state=2).double(), torch.randn(3, *IMAGE).double(), 2, 1)
    assert relative_error(scan_from_maps(record).sum(0), record.output) < 1e-13


@pytest.mark.parametrize("mode", MODES)
def test_chunks_and_single_queries_and_diagonals_agree_with_the_full_map(mode) -> None:
    record = record_of(d_state=2)
    full = attention_map(record, mode=mode)
    scale = full.abs().max()
    torch.testing.assert_close(attention_map(record, mode=mode, max_elements=300) / scale, full / scale)
    rows = torch.tensor([5, 95, 0])
    torch.testing.assert_close(attention_map(record, mode=mode, queries=rows) / scale, full[rows] / scale)
    diagonal = diagonal_map(record, mode=mode)
    assert diagonal.shape == (record.height, record.width) == (8, 12)
    torch.testing.assert_close(diagonal.flatten() / scale, full.diagonal() / scale)
    by_channel = route_maps(record, 2, rows, mode).mean(0)
    torch.testing.assert_close(attention_map(record, 2, mode, queries=rows) / scale, by_channel / scale)


def test_maps_look_only_where_the_route_has_been() -> None:
    record = record_of()
    row, back = attention_map(record, 0), attention_map(record, 2)
    assert torch.equal(row, row.tril())
    assert torch.equal(back, back.triu())
    # Route 1 reads columns: position (0, 1) has seen all of column 0, and nothing of column 2.
    seen = attention_map(record, 1)[1].view(record.height, record.width)
    assert (seen[:, 0] != 0).all()
    assert (seen[:, 2:] == 0).all()
    assert (seen[1:, 1] == 0).all()


def test_normalisations() -> None:
    scores = torch.tensor([[-1.0, 3.0], [0.0, 1.0]])
    assert torch.equal(normalize(scores, "none"), scores)
    assert torch.equal(normalize(scores, "minmax"), torch.tensor([[0.0, 1.0], [0.25, 0.5]]))
    assert torch.equal(normalize(scores, "absolute"), scores.abs() / 3)
    assert torch.equal(normalize(scores, "rows"), torch.tensor([[0.25, 0.75], [0.0, 1.0]]))
    assert torch.equal(normalize(torch.zeros(2, 2), "rows"), torch.zeros(2, 2))
    record = record_of(3)
    first = attention_map(record, normalization="rows", normalize_routes=True)
    torch.testing.assert_close(first.sum(1), torch.ones(len(first)))
    last = attention_map(record, normalization="rows")
    torch.testing.assert_close(last.sum(1), torch.ones(len(last)))
    assert not torch.allclose(first, last)


def test_rollout_is_a_product_of_mixtures() -> None:
    model, image = lively_model(), torch.randn(3, *IMAGE)
    followed, record = rollout(model, image, 2, 1)
    torch.testing.assert_close(followed.sum(1), torch.ones(len(followed)))

    def mixture(block: int) -> Tensor:
        single = attention_map(
            record_scan(model, image, 2, block), mode="influence", normalization="rows", reduction="absolute"
        )
        return 0.5 * single + 0.5 * torch.eye(len(single))

    torch.testing.assert_close(followed, mixture(1) @ mixture(0))
    assert record.height * record.width == len(followed)


def test_a_query_pixel_is_the_position_that_covers_it() -> None:
    record = record_of()  # 8 × 12 positions of 8 × 8 pixels
    assert query_position(record, (0, 0), IMAGE) == 0
    assert query_position(record, (63, 95), IMAGE) == 95
    assert query_position(record, (8, 7), IMAGE) == 12
    with pytest.raises(ValueError, match="rows go from 0 to 63, columns from 0 to 95"):
        query_position(record, (64, 0), IMAGE)


def test_what_does_not_exist_is_told_with_the_range() -> None:
    model, image = lively_model(), torch.randn(3, *IMAGE)
    for stage, block, message in ((4, 0, "stages 0 to 3"), (-1, 0, "stages 0 to 3"), (2, 2, "blocks 0 to 1")):
        with pytest.raises(ValueError, match=message):
            record_scan(model, image, stage, block)
    with pytest.raises(ValueError, match="of a VMamba"):
        record_scan(torch.nn.Linear(1, 1), image, 0, 0)
    for changes in ({"routes": "cascade2d"}, {"backend": "reference"}, {"sequential_routes": True}):
        with pytest.raises(ValueError, match="times; maps need"):
            record_scan(vmamba.create_model("vmamba_test", **changes), image, 0, 0)
    with pytest.raises(ValueError, match="no SS2D"):
        record_scan(vmamba.create_model("vmamba_test", ssm_ratio=0.0), image, 0, 0)
    with pytest.raises(ValueError, match="one image"):
        record_scan(model, torch.randn(2, 3, *IMAGE), 0, 0)
    record = record_scan(model, image, 1, 0)
    with pytest.raises(ValueError, match="routes 0 to 3"):
        attention_map(record, 4)
    with pytest.raises(ValueError, match="0 to 95"):
        attention_map(record, queries=torch.tensor([96]))
    with pytest.raises(ValueError, match="mode must be"):
        attention_map(record, mode="guess")
    with pytest.raises(ValueError, match="normalization must be"):
        attention_map(record, normalization="guess")
    with pytest.raises(ValueError, match="attention and influence do"):
        route_values(record, 0, "decay")


def test_the_model_is_left_as_it_was() -> None:
    model = lively_model().train()
    record_scan(model, torch.randn(3, *IMAGE), 0, 0)
    assert model.training
    assert not model.layers[0].blocks[0].op._forward_hooks
    assert not model.layers[0].blocks[0].op._forward_pre_hooks
