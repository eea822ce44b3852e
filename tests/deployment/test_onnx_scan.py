import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
import torch

from vmamba.deployment import onnx_scan
from vmamba.ops.routes import ROUTES
from vmamba.ops.ss2d.reference import ss2d_scan_reference

CHANNELS, RANK = 8, 3
SIZES = [(1, 1, 1), (2, 5, 7), (1, 9, 17), (3, 16, 8), (1, 2, 33), (2, 8, 1)]


def session(routes, d_state, flip_back):
    """A model that is nothing but the function."""
    kind = (routes, d_state, RANK, flip_back)
    functions = [onnx.parser.parse_function(text) for text in onnx_scan.functions([kind])]
    ranks = {"x": 3, "projected": 3, "dt_weight": 3, "dt_bias": 2, "A": 3, "D": 2}
    inputs = [onnx.helper.make_tensor_value_info(name, 1, [None] * rank) for name, rank in ranks.items()]
    inputs += [onnx.helper.make_tensor_value_info(name, 7, []) for name in ("height", "width")]
    outputs = [onnx.helper.make_tensor_value_info("y", 1, [None] * 3)]
    call = onnx.helper.make_node(onnx_scan.scan_name(*kind), [*ranks, "height", "width"], ["y"], domain="vmamba")
    model = onnx.helper.make_model(
        onnx.helper.make_graph([call], "scan", inputs, outputs),
        functions=functions,
        opset_imports=[onnx.helper.make_opsetid("", onnx_scan.OPSET), onnx.helper.make_opsetid("vmamba", 1)],
        ir_version=10,
    )
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def arguments(routes, d_state, batch, height, width, scale=1.0):
    K = len(ROUTES[routes])
    shapes = {
        "x": (batch, height * width, CHANNELS),
        "projected": (batch, height * width, K * (RANK + 2 * d_state)),
        "dt_weight": (K, CHANNELS, RANK),
        "dt_bias": (K, CHANNELS),
        "A": (K, CHANNELS, d_state),
        "D": (K, CHANNELS),
    }
    tensors = {name: scale * torch.randn(shape) for name, shape in shapes.items()}
    return tensors | {"A": -torch.exp(tensors["A"])}


def run(scan, tensors, height, width):
    feeds = {name: tensor.numpy() for name, tensor in tensors.items()}
    return torch.from_numpy(scan.run(None, feeds | {"height": np.array(height), "width": np.array(width)})[0])


@pytest.mark.parametrize(
    ("routes", "flip_back"), [*[(routes, True) for routes in ROUTES], ("rows", False), ("columns", False)]
)
@pytest.mark.parametrize("d_state", [1, 4])
def test_scan_is_the_reference(routes, flip_back, d_state):
    scan = session(routes, d_state, flip_back)
    for batch, height, width in SIZES:
        tensors = arguments(routes, d_state, batch, height, width)
        told = {"height": height, "width": width, "routes": routes, "flip_back": flip_back}
        same = ss2d_scan_reference(**tensors, **told)
        exact = ss2d_scan_reference(**{name: tensor.double() for name, tensor in tensors.items()}, **told)
        # The tolerance of backends: twice the error of the reference in float32, or rounding.
        actual = run(scan, tensors, height, width)
        error, allowed = (actual.double() - exact).norm(), (same.double() - exact).norm()
        assert error <= max(2 * allowed, 2e-7 * exact.norm()), (batch, height, width)


def test_scan_neither_overflows_nor_loses_small_steps():
    """Large Δ would overflow a form that divides by the decay; Δ far below 1e-7 would vanish in log(1 + e)."""
    scan = session("cross2d", 1, True)
    tensors = arguments("cross2d", 1, 1, 12, 20)
    for shift in (30.0, -25.0):
        moved = tensors | {"dt_bias": tensors["dt_bias"] + shift, "D": torch.zeros_like(tensors["D"])}
        exact = ss2d_scan_reference(**{k: v.double() for k, v in moved.items()}, height=12, width=20)
        actual = run(scan, moved, 12, 20)
        assert torch.isfinite(actual).all()
        assert (actual - exact).norm() <= 2e-6 * exact.norm()


def test_nan_stays_in_its_image():
    scan = session("cross2d", 1, True)
    tensors = arguments("cross2d", 1, 2, 9, 9)
    tensors["x"][0, 40] = float("nan")
    merged = run(scan, tensors, 9, 9)
    assert merged[0].isnan().any()
    assert torch.isfinite(merged[1]).all()
