"""The published numbers and golden files in the folder `shared` beside the checkout, where it is present."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

SHARED = Path(__file__).resolve().parents[3] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the folder shared/ is not beside this checkout")


def read_json(name: str) -> dict[str, Any]:
    path = SHARED / name
    return json.loads(path.read_text()) if path.is_file() else {}


def formula_fill(model: nn.Module) -> None:
    """Give every weight the value that the rule of formula_golden.json gives it."""
    with torch.no_grad():
        for i, (name, value) in enumerate(sorted(model.state_dict().items())):
            n = value.numel()
            t = torch.sin(torch.arange(n, dtype=torch.float64) * 0.7 + i)
            if name.endswith("num_batches_tracked"):
                continue
            if name.endswith("A_logs"):
                t = 0.5 * t + 0.2
            elif name.endswith("Ds"):
                t = 1 + 0.1 * t
            elif name.endswith("dt_projs_bias"):
                t = -2 + 0.5 * t
            elif name.endswith("running_var"):
                t = 1 + 0.2 * t.abs()
            elif value.ndim == 1 and name.endswith(".weight"):
                t = 1 + 0.1 * t
            elif value.ndim >= 2:
                t = t / math.sqrt(max(1, value[0].numel()))
            else:
                t = 0.1 * t
            value.copy_(t.view(value.shape))


def formula_image(height: int, width: int) -> Tensor:
    n = torch.arange(2 * 3 * height * width, dtype=torch.float64)
    return torch.sin(n * 0.011).view(2, 3, height, width).float()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.double(), expected.double()
    return float((actual - expected).norm() / expected.norm())
