"""Configurations: named variants, the authors' arguments, errors that help."""

import json

import numpy as np
import pytest
from reference_data import needs_shared, read_json

import vmamba
from vmamba.models import VMamba, VMambaConfig, get_config, list_models, variant_name
from vmamba.models.config import published_info
from vmamba.models.published import PUBLISHED

FACTS = read_json("reference/published.json")


def parameters(model: VMamba) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configuration_has_exactly_its_parameters(name: str) -> None:
    model = vmamba.create_model(name)
    assert parameters(model) == PUBLISHED[name].params


@needs_shared
def test_published_table_says_what_the_reference_data_says() -> None:
    assert set(PUBLISHED) == set(FACTS["models"])
    assert len(PUBLISHED) == 42
    for name, facts in FACTS["models"].items():
        ours = PUBLISHED[name]
        assert ours.params == facts["params"]
        assert ours.gflops == facts["gflops_exact_official_counter"]["224"]
        published = facts.get("published") or {}
        assert ours.url == published.get("ckpt")
        assert ours.ema == facts.get("published_is_ema", True)
        assert get_config(name) == VMambaConfig.from_official(**facts["kwargs"])


@needs_shared
def test_named_variants_have_the_parameters_of_the_published_functions() -> None:
    for name, count in FACTS["function_param_counts"].items():
        if name.endswith("_m2"):  # the Mamba-2 models have no counterpart yet
            continue
        assert published_info(name).params == count


def test_paper_names_are_the_three_of_the_paper() -> None:
    for size, other in (("tiny", "tiny_s1l8"), ("small", "small_s2l15"), ("base", "base_s2l15")):
        assert get_config(f"vmamba_{size}") == get_config(f"vmamba_{other}")


def test_own_variants_are_as_small_as_they_say() -> None:
    assert 1e6 < parameters(vmamba.create_model("vmamba_nano")) < 5e6
    assert 1e4 < parameters(vmamba.create_model("vmamba_test")) < 1e5


def test_round_trips_through_json() -> None:
    for name in list_models(published=True):
        config = get_config(name)
        assert VMambaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_one_integer_for_dims_doubles_from_stage_to_stage() -> None:
    assert VMambaConfig(dims=24, depths=(1, 1, 1)).dims == (24, 48, 96)


def test_names_are_found_again_from_the_architecture() -> None:
    assert variant_name(get_config("vmamba_tiny", num_classes=7, drop_path_rate=0.0)) == "vmamba_tiny_s1l8"
    assert variant_name(get_config("vmambav2_tiny_224_ds4")) == "vmambav2_tiny_224_ds4"
    assert variant_name(get_config("vmamba_tiny", depths=(1, 1, 1, 1))) is None


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: get_config("vmamba_tinny"), "did you mean vmamba_tiny"),
        (lambda: get_config("vmamba_tiny", drop_path=0.1), "did you mean 'drop_path_rate'"),
        (lambda: vmamba.create_model("vmamba_tinny"), "did you mean vmamba_tiny"),
        (lambda: vmamba.create_model("vmamba_tiny", num_clases=3), "did you mean 'num_classes'"),
        (lambda: VMambaConfig(depths=(2, 2), dims=(8, 16, 32)), "one width for each stage"),
        (lambda: VMambaConfig(dims=("a", "b"), depths=(1, 1)), "whole numbers"),
        (lambda: VMambaConfig(depths=2), "whole numbers"),
        (lambda: VMambaConfig(routes="diagonal"), "'cross2d', 'unidi', 'bidi', 'cascade2d'"),
        (lambda: VMambaConfig(d_conv=4), "odd"),
        (lambda: VMambaConfig(drop_path_rate=1.0), "probability"),
        (lambda: VMambaConfig(dt_rank=0), "positive integer"),
        (lambda: VMambaConfig(num_classes="10"), "num_classes must be a whole number; got '10'"),
        (lambda: VMambaConfig(d_state=1.5), "d_state must be a whole number; got 1.5"),
        (lambda: VMambaConfig(drop_rate="0.1"), "drop_rate must be a number; got '0.1'"),
        (lambda: VMambaConfig(gated="no"), "gated must be True or False; got 'no'"),
        (lambda: VMambaConfig(dt_rank=2.0), "dt_rank must be a whole number; got 2.0"),
        (lambda: VMambaConfig(dt_min=0), "dt_min must be positive and at most dt_max; got 0 and 0.1"),
        (lambda: VMambaConfig(dt_min=0.2), "dt_min must be positive and at most dt_max; got 0.2 and 0.1"),
        (lambda: VMambaConfig(img_size=(64,)), "img_size must be a side or (height, width), at least 1; got (64,)"),
        (lambda: VMambaConfig(img_size=64.0), "img_size must be a whole number; got 64.0"),
        (lambda: VMambaConfig(img_size=2, pos_embed=True), "at least 4; got 2"),
        (lambda: VMambaConfig(global_pool=""), "the head for 1000 classes cannot take; give num_classes=0"),
        (lambda: get_config("vmamba_test", depths=2), "depths must be whole numbers"),
        (lambda: VMamba(get_config("vmamba_test"), mlp_ratio=0.01), "leaves none for the MLP"),
        (lambda: VMamba(get_config("vmamba_test"), backend="fast"), "backend must be one of 'auto', 'cuda', 'triton'"),
        (lambda: vmamba.create_model("vmamba_test", backend="cpu", sequential_routes=True), "'triton', 'chunked'"),
        (lambda: VMambaConfig(patch_size=2), "at least 4"),
        (lambda: VMambaConfig.from_official(ssm_dstate=1), "did you mean 'ssm_d_state'"),
        (lambda: VMambaConfig.from_official(norm_layer="gn"), "ln, ln2d, bn"),
        (lambda: VMamba(get_config("vmamba_test"), ssm_ratio=0.01), "leaves none"),
        (lambda: vmamba.create_model("vmamba_nano", pretrained=True), "no weights were published"),
    ],
)
def test_errors_say_what_would_be_right(build, words: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        build()
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("forward_type", "fields"),
    [
        ("v05_noz", {"gated": False, "out_norm": "norm", "routes": "cross2d", "force_fp32": False}),
        ("v05_nozact", {"gated": True, "gate_act": False}),
        ("v05_ondwconv3_noz", {"out_norm": "dwconv3", "gated": False}),
        ("v05_oncnorm_noz_oact", {"out_norm": "cnorm", "out_act": True}),
        ("v052dc_noz", {"routes": "cascade2d"}),
        ("v051d_noz", {"routes": "unidi"}),
        ("v052d", {"routes": "bidi", "gated": True}),
        ("v02_no32", {"force_fp32": False, "gated": True}),
        ("v2", {"force_fp32": True}),
        ("v0seq", {"force_fp32": True, "sequential_routes": True, "gated": True}),
    ],
)
def test_forward_type_is_parsed_once_into_fields(forward_type: str, fields: dict) -> None:
    config = VMambaConfig.from_official(forward_type=forward_type)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("forward_type", "words"),
    [
        ("v05_noz_onnone", ["understood 'v05_noz'", "'onnone' comes twice or too late"]),
        ("v05_nos", ["understood 'v05'", "did you mean 'noz'"]),
        ("v06", ["the cores are v0, v0seq", "[_noz]"]),
        ("m0_noz", ["Mamba-2"]),
        ("v05_onnone_onsoftmax", ["'onsoftmax' comes twice or too late"]),
        ("v0_noz", ["takes no suffix"]),
    ],
)
def test_a_wrong_forward_type_is_told_part_by_part(forward_type: str, words: list[str]) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        VMambaConfig.from_official(forward_type=forward_type)
    for word in words:
        assert word in str(error.value)


def test_what_names_no_model_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="named by a string or given as a VMambaConfig; got NoneType"):
        vmamba.create_model(None)


def test_numbers_of_numpy_become_pythons_own() -> None:
    config = VMambaConfig(
        num_classes=np.int64(7), drop_rate=np.float32(0.5), dt_rank=np.int32(2), img_size=np.int64(64)
    )
    assert VMambaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = VMamba(get_config("vmamba_test"))
    model.reset_classifier(np.int64(7))
    assert type(model.num_classes) is type(model.config.num_classes) is int
