"""The models against what the authors' code computes: eight golden files and the formula-filled cases."""

import json

import pytest
import torch
from reference_data import SHARED, formula_fill, formula_image, needs_shared, read_json, relative_error
from safetensors import safe_open

from vmamba.models import VMamba, VMambaBackbone, VMambaConfig

GOLDEN = sorted(path.stem for path in (SHARED / "golden").glob("*.safetensors"))
CASES = read_json("reference/formula_golden.json").get("cases", {})
MAMBA2 = "m0_noz"
LOGIT_CASES = [name for name, case in CASES.items() if "logits" in case and name != MAMBA2]


@needs_shared
@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_file_gives_the_published_logits_and_stage_maps(name: str, backend: str) -> None:
    with safe_open(SHARED / "golden" / f"{name}.safetensors", "pt") as file:
        official = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    golden = {k.removeprefix("golden."): tensors.pop(k) for k in list(tensors) if k.startswith("golden.")}
    model = VMamba(VMambaConfig.from_official(**official), backend=backend).eval()
    model.load_state_dict(tensors)

    with torch.inference_mode():
        logits = model(golden["image"])
        maps = model.forward_intermediates(golden["image"], intermediates_only=True)

    assert relative_error(logits, golden["logits"]) <= 1e-5
    for i, stage_map in enumerate(maps):
        assert stage_map.shape == golden[f"stage{i}"].shape
        assert relative_error(stage_map, golden[f"stage{i}"]) <= 1e-5


@needs_shared
@pytest.mark.parametrize("name", LOGIT_CASES)
def test_formula_case_gives_the_published_logits(name: str) -> None:
    case = CASES[name]
    model = VMamba(VMambaConfig.from_official(**case["kwargs"])).eval()
    shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
    assert shapes == (case["state_dict"] or shapes)
    formula_fill(model)

    with torch.inference_mode():
        logits = model(formula_image(*case["input_hw"]))

    # The file keeps seven digits, so the bar is on what those can tell.
    assert relative_error(logits, torch.tensor(case["logits"])) <= 1e-5


@needs_shared
def test_formula_backbone_gives_the_published_maps() -> None:
    case = CASES["backbone_s1_ln2d"]
    model = VMambaBackbone(VMambaConfig.from_official(norm_layer="ln2d", **case["kwargs"])).eval()
    formula_fill(model)

    with torch.inference_mode():
        maps = model(formula_image(*case["input_hw"]))

    assert [list(m.shape) for m in maps] == case["feat_shapes"]
    for stage_map, corner in zip(maps, case["feat_corner"], strict=True):
        assert stage_map[0, 0, 0, :4].tolist() == pytest.approx(corner, rel=1e-4, abs=1e-5)
    assert [float(m.mean()) for m in maps] == pytest.approx(case["feat_mean"], rel=1e-4, abs=1e-6)
    assert [float(m.abs().mean()) for m in maps] == pytest.approx(case["feat_absmean"], rel=1e-5)
