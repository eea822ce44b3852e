"""cross_scan and cross_merge: index-encoded maps, so that equality is exact."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vmamba.ops import cross_merge, cross_scan
from vmamba.ops.routes import ROUTES, Route, get_routes, route_index, scan_route, unscan_route

SIZES = [(1, 1), (1, 5), (5, 1), (2, 3), (4, 4), (7, 3)]


def index_map(height: int, width: int, batch: int = 2, channels: int = 3) -> torch.Tensor:
    """A channels-first map in which every element has a value of its own."""
    return torch.arange(batch * channels * height * width, dtype=torch.float64).view(batch, channels, height, width)


def test_cross2d_reads_rows_and_columns_forwards_and_backwards():
    x = torch.tensor([[0.0, 1, 2], [3, 4, 5]]).view(1, 1, 2, 3)
    scanned = cross_scan(x).view(4, 6).tolist()
    assert scanned == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]


def test_unidi_and_bidi_read_rows_only():
    x = torch.tensor([[0.0, 1, 2], [3, 4, 5]]).view(1, 1, 2, 3)
    forward, backward = [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]
    assert cross_scan(x, "unidi").view(4, 6).tolist() == [forward] * 4
    assert cross_scan(x, "bidi").view(4, 6).tolist() == [forward, forward, backward, backward]


def test_rows_and_columns_turn_each_line_round_in_its_place():
    x = torch.tensor([[0.0, 1, 2], [3, 4, 5]]).view(1, 1, 2, 3)
    assert cross_scan(x, "rows").view(2, 6).tolist() == [[0, 1, 2, 3, 4, 5], [2, 1, 0, 5, 4, 3]]
    assert cross_scan(x, "columns").view(2, 6).tolist() == [[0, 3, 1, 4, 2, 5], [3, 0, 4, 1, 5, 2]]


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_route_index_says_what_cross_scan_reads(routes, height, width):
    x = index_map(height, width)
    for k, route in enumerate(get_routes(routes)):
        assert torch.equal(cross_scan(x, routes)[:, k], x.flatten(2)[..., route_index(route, height, width)])


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_layouts_agree(routes, height, width):
    x = index_map(height, width)
    scanned = cross_scan(x, routes)
    last = cross_scan(x.permute(0, 2, 3, 1), routes, channels_last=True)
    assert torch.equal(last, scanned.transpose(2, 3))
    merged = cross_merge(scanned, routes, height=height, width=width)
    merged_last = cross_merge(last, routes, height=height, width=width, channels_last=True)
    assert torch.equal(merged_last, merged.permute(0, 2, 3, 1))


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_merge_is_the_exact_adjoint_of_scan(routes, height, width):
    # As matrices over the positions, both of zeros and ones: merge = scanᵀ, every entry compared.
    L, K = height * width, len(ROUTES[routes])
    units = torch.eye(L, dtype=torch.float64)
    scan = cross_scan(units.view(L, 1, height, width), routes).view(L, K * L)
    sequences = torch.eye(K * L, dtype=torch.float64).view(K * L, K, 1, L)
    merge = cross_merge(sequences, routes, height=height, width=width).view(K * L, L)
    assert torch.equal(merge, scan.T)


@pytest.mark.parametrize("routes", ROUTES)
def test_gradients_are_the_adjoints(routes):
    x = index_map(4, 3).requires_grad_()
    y = torch.randint(-9, 9, (2, len(ROUTES[routes]), 3, 12), dtype=torch.float64)  # whole numbers add up exactly
    (dx,) = torch.autograd.grad(cross_scan(x, routes), x, y)
    assert torch.equal(dx, cross_merge(y, routes, height=4, width=3))


@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.booleans(), st.booleans())
def test_unscan_is_the_inverse_of_scan(height, width, column_major, reverse, per_line):
    route = Route(column_major, reverse, per_line)
    grid = index_map(height, width).permute(0, 2, 3, 1)
    assert torch.equal(unscan_route(scan_route(grid, route), route, height, width), grid)
    assert sorted(route_index(route, height, width).tolist()) == list(range(height * width))


def test_without_flip_back_adds_reversed_lines_as_read():
    x = torch.tensor([[0.0, 1, 2], [3, 4, 5]]).view(1, 1, 2, 3)
    merged = cross_merge(cross_scan(x, "rows"), "rows", height=2, width=3, flip_back=False)
    assert merged.view(2, 3).tolist() == [[2, 2, 2], [8, 8, 8]]
    merged = cross_merge(cross_scan(x, "columns"), "columns", height=2, width=3, flip_back=False)
    assert merged.view(2, 3).tolist() == [[3, 5, 7], [3, 5, 7]]


def test_non_contiguous_maps():
    x = index_map(5, 4).transpose(2, 3)
    assert torch.equal(cross_scan(x), cross_scan(x.contiguous()))


def test_mistakes_are_explained():
    x = index_map(2, 3)
    with pytest.raises(ValueError, match=r"'cross2d'.*got 'spiral'"):
        cross_scan(x, "spiral")
    with pytest.raises(ValueError, match=r"shape \(B, C, H, W\), got \(2, 3, 6\)"):
        cross_scan(x.flatten(2))
    with pytest.raises(ValueError, match=r"K = 4 and L = 6, got \(2, 3, 2, 3\)"):
        cross_merge(x, height=2, width=3)
    with pytest.raises(ValueError, match="flip_back=False is defined for the routes 'rows' and 'columns'"):
        cross_merge(cross_scan(x), height=2, width=3, flip_back=False)
