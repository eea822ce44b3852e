"""Every configuration the authors published: constructor arguments, exact sizes, results, and where the weights are."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download/"


@dataclass(frozen=True)
class PublishedModel:
    """One published configuration.

    Attributes:
        family: the group of constructor arguments it starts from.
        params: exact number of parameters with 1000 classes.
        gflops: 10⁹ multiply-accumulates at 224 × 224, by the authors' counter.
        role: what it stands for in the paper.
        top1: ImageNet-1K accuracy in percent at 224 × 224, where published.
        throughput: images a second on one A100 at batch 128, where published.
        file: the weights' place under the authors' releases, where published.
        ema: whether the published accuracy is that of the averaged weights in the file.
        changes: constructor arguments that differ from the family's.
    """

    family: str
    params: int
    gflops: float
    role: str = ""
    top1: float | None = None
    throughput: int | None = None
    file: str | None = None
    ema: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str | None:
        """Address of the published weights, or None where none were published."""
        return None if self.file is None else _RELEASES + self.file


_FAMILIES: dict[str, dict[str, Any]] = {
    "vanilla": {
        "dims": 96,
        "depths": (2, 2, 9, 2),
        "forward_type": "v0",
        "norm_layer": "ln",
        "downsample_version": "v1",
        "patchembed_version": "v1",
        "mlp_ratio": 0.0,
        "ssm_d_state": 16,
        "ssm_ratio": 2.0,
        "ssm_conv": 3,
        "ssm_conv_bias": True,
        "drop_path_rate": 0.2,
    },
    "ladder": {
        "dims": 96,
        "depths": (2, 2, 5, 2),
        "forward_type": "v05",
        "norm_layer": "ln2d",
        "downsample_version": "v3",
        "patchembed_version": "v2",
        "mlp_ratio": 4.0,
        "ssm_d_state": 16,
        "ssm_ratio": 1.0,
        "ssm_conv": -1,
        "ssm_conv_bias": True,
        "drop_path_rate": 0.2,
    },
    "s2": {
        "dims": 96,
        "depths": (2, 2, 5, 2),
        "forward_type": "v05_noz",
        "norm_layer": "ln2d",
        "downsample_version": "v3",
        "patchembed_version": "v2",
        "mlp_ratio": 4.0,
        "ssm_d_state": 1,
        "ssm_ratio": 2.0,
        "ssm_conv": 3,
        "ssm_conv_bias": False,
        "drop_path_rate": 0.2,
    },
    "s1": {
        "dims": 96,
        "depths": (2, 2, 8, 2),
        "forward_type": "v05_noz",
        "norm_layer": "ln2d",
        "downsample_version": "v3",
        "patchembed_version": "v2",
        "mlp_ratio": 4.0,
        "ssm_d_state": 1,
        "ssm_ratio": 1.0,
        "ssm_conv": 3,
        "ssm_conv_bias": False,
        "drop_path_rate": 0.2,
    },
}

PUBLISHED: Mapping[str, PublishedModel] = MappingProxyType(
    {
        "vmambav0_base_224": PublishedModel(
            "vanilla",
            76254056,
            18.020115,
            role="Vanilla-VMamba-B",
            top1=83.7,
            throughput=268,
            file="%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth",
            changes={"depths": (2, 2, 27, 2), "dims": 128, "drop_path_rate": 0.5},
        ),
        "vmambav0_small_224": PublishedModel(
            "vanilla",
            44417416,
            11.231523,
            role="Vanilla-VMamba-S",
            top1=83.5,
            throughput=359,
            file="%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth",
            changes={"depths": (2, 2, 27, 2), "drop_path_rate": 0.3},
        ),
        "vmambav0_tiny_224": PublishedModel(
            "vanilla",
            22893448,
            5.626895,
            role="ladder: Vanilla-VMamba-T",
            top1=82.2,
            throughput=426,
            file="%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth",
            ema=False,
        ),
        "vmambav2_base_224": PublishedModel(
            "s2",
            88557800,
            15.358944,
            role="VMamba-B[s2l15]",
            top1=83.9,
            throughput=646,
            file="%23v2cls/vssm_base_0229_ckpt_epoch_237.pth",
            changes={"depths": (2, 2, 15, 2), "dims": 128, "drop_path_rate": 0.6},
        ),
        "vmambav2_small_224": PublishedModel(
            "s2",
            50147752,
            8.715775,
            role="VMamba-S[s2l15]",
            top1=83.6,
            throughput=877,
            file="%23v2cls/vssm_small_0229_ckpt_epoch_222.pth",
            changes={"depths": (2, 2, 15, 2), "drop_path_rate": 0.3},
        ),
        "vmambav2_tiny_224": PublishedModel(
            "s2",
            30705832,
            4.857742,
            role="ladder step (f) ssm_ratio 2 = VMamba-T[s2l5]; d_state ablation 1",
            top1=82.5,
            throughput=1340,
            file="%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth",
        ),
        "vmambav2v_base_224": PublishedModel(
            "s1",
            86614504,
            15.22086,
            role="VMamba-B[s1l20]",
            top1=83.8,
            throughput=827,
            file="%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth",
            changes={"depths": (2, 2, 20, 2), "dims": 128, "drop_path_rate": 0.5},
        ),
        "vmambav2v_small_224": PublishedModel(
            "s1",
            49012840,
            8.612211,
            role="VMamba-S[s1l20]",
            top1=83.3,
            throughput=1106,
            file="%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth",
            changes={"depths": (2, 2, 20, 2), "drop_path_rate": 0.3},
        ),
        "vmambav2v_tiny_224": PublishedModel(
            "s1",
            30249064,
            4.90561,
            role="ladder step (g) = VMamba-T[s1l8]",
            top1=82.6,
            throughput=1686,
            file="%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth",
        ),
        "vmambav0_tiny_224_a0": PublishedModel(
            "vanilla", 22893448, 5.626895, role="ladder: Vanilla-VMamba-T", top1=82.17, throughput=426
        ),
        "vmambav0_tiny_224_a01": PublishedModel(
            "vanilla",
            22893448,
            5.626895,
            role="not a paper row: v01 = unfused torch cross-scan + mamba kernel",
            changes={"forward_type": "v01"},
        ),
        "vmambav0_tiny_224_a0seq": PublishedModel(
            "vanilla",
            22893448,
            5.626895,
            role="not in paper: 4 sequential scans, same numerics as a0",
            changes={"forward_type": "v0seq"},
        ),
        "vmambav0_tiny_224_a1": PublishedModel(
            "vanilla",
            22893448,
            5.626895,
            role="ladder step (a) Triton CSM",
            top1=82.17,
            throughput=467,
            changes={"forward_type": "v02"},
        ),
        "vmambav0_tiny_224_a2": PublishedModel(
            "vanilla",
            22893448,
            5.626895,
            role="ladder step (b) fp16-in/fp32-out scan",
            top1=82.17,
            throughput=464,
            changes={"forward_type": "v04"},
        ),
        "vmambav0_tiny_224_a3": PublishedModel(
            "vanilla",
            22893448,
            5.626903,
            role="ladder step (c) linear instead of einsum + BCHW layout",
            top1=82.17,
            throughput=638,
            changes={"forward_type": "v05", "norm_layer": "ln2d"},
        ),
        "vmambav0_tiny_224_a7": PublishedModel(
            "ladder",
            28991656,
            5.63266,
            role="ladder step (d) FFN, no DWConv, [2,2,2,2]",
            top1=81.65,
            throughput=813,
            changes={"depths": (2, 2, 2, 2), "ssm_ratio": 2.0},
        ),
        "vmambav0_tiny_224_a7a": PublishedModel(
            "ladder",
            22926376,
            4.018473,
            role="ladder step (d.1) ssm_ratio 1",
            top1=81.05,
            throughput=1336,
            changes={"depths": (2, 2, 2, 2)},
        ),
        "vmambav0_tiny_224_a8": PublishedModel(
            "ladder", 28256680, 5.178818, role="ladder step (d.2) [2,2,5,2]", top1=82.24, throughput=1137
        ),
        "vmambav2_tiny_224_a9d": PublishedModel(
            "ladder",
            26247592,
            4.860903,
            role="ladder step (e) drop multiplicative branch",
            top1=82.17,
            throughput=1179,
            changes={"forward_type": "v05_noz"},
        ),
        "vmambav2_tiny_224_bidi": PublishedModel(
            "s1",
            30249064,
            4.90561,
            role="scan pattern Bidi-Scan",
            top1=82.49,
            throughput=1687,
            changes={"forward_type": "v052d_noz"},
        ),
        "vmambav2_tiny_224_bidi_ndw": PublishedModel(
            "s1",
            30202408,
            4.891385,
            role="Bidi-Scan, no DWConv",
            top1=81.8,
            throughput=1719,
            changes={"ssm_conv": -1, "forward_type": "v052d_noz"},
        ),
        "vmambav2_tiny_224_cas2d": PublishedModel(
            "s1",
            30249064,
            4.918254,
            role="scan pattern Cascade-Scan",
            top1=82.42,
            throughput=998,
            changes={"forward_type": "v052dc_noz"},
        ),
        "vmambav2_tiny_224_cas2d_ndw": PublishedModel(
            "s1",
            30202408,
            4.904029,
            role="Cascade-Scan, no DWConv",
            top1=81.71,
            throughput=1007,
            changes={"ssm_conv": -1, "forward_type": "v052dc_noz"},
        ),
        "vmambav2_tiny_224_ds16": PublishedModel(
            "s2",
            26283880,
            4.873096,
            role="ladder step (e.1) +DWConv; d_state ablation 16",
            top1=82.31,
            throughput=1164,
            changes={"ssm_d_state": 16, "ssm_ratio": 1.0},
        ),
        "vmambav2_tiny_224_ds2": PublishedModel(
            "s2",
            30802600,
            4.97696,
            role="d_state 2, ssm_ratio 2",
            top1=82.5,
            throughput=1269,
            changes={"ssm_d_state": 2},
        ),
        "vmambav2_tiny_224_ds4": PublishedModel(
            "s2",
            30996136,
            5.215397,
            role="d_state 4, ssm_ratio 2",
            top1=82.51,
            throughput=1147,
            changes={"ssm_d_state": 4},
        ),
        "vmambav2_tiny_224_ds8": PublishedModel(
            "s2",
            28640008,
            5.044246,
            role="d_state 8, ssm_ratio 1.5",
            top1=82.69,
            throughput=1148,
            changes={"ssm_d_state": 8, "ssm_ratio": 1.5},
        ),
        "vmambav2_tiny_224_gelu": PublishedModel(
            "s1",
            30249064,
            4.90561,
            role="activation GELU (SSM)",
            top1=82.53,
            throughput=1680,
            changes={"ssm_act_layer": "gelu"},
        ),
        "vmambav2_tiny_224_init1": PublishedModel(
            "s1",
            30249064,
            4.90561,
            role="init Rand (ssm_init v1)",
            top1=82.58,
            throughput=1682,
            changes={"ssm_init": "v1"},
        ),
        "vmambav2_tiny_224_init2": PublishedModel(
            "s1",
            30249064,
            4.90561,
            role="init Zero (ssm_init v2)",
            top1=82.67,
            throughput=1683,
            changes={"ssm_init": "v2"},
        ),
        "vmambav2_tiny_224_m2s2h": PublishedModel(
            "s1",
            29866888,
            4.951446,
            role="mlp_ratio 2, ssm_ratio 2.5",
            top1=82.86,
            throughput=1075,
            changes={"ssm_ratio": 2.5, "mlp_ratio": 2.0},
        ),
        "vmambav2_tiny_224_m3s1h": PublishedModel(
            "s1",
            28485640,
            4.651142,
            role="mlp_ratio 3, ssm_ratio 1.5",
            top1=82.75,
            throughput=1419,
            changes={"ssm_ratio": 1.5, "mlp_ratio": 3.0},
        ),
        "vmambav2_tiny_224_ndw": PublishedModel(
            "s1",
            30202408,
            4.891385,
            role="Cross-Scan, no DWConv",
            top1=82.25,
            throughput=1717,
            changes={"ssm_conv": -1},
        ),
        "vmambav2_tiny_224_ondw": PublishedModel(
            "s1",
            30285352,
            4.911932,
            role="no published accuracy; out_norm dwconv3; tp.py comment 1613 img/s",
            changes={"forward_type": "v05_ondwconv3_noz"},
        ),
        "vmambav2_tiny_224_onone": PublishedModel(
            "s1",
            30238696,
            4.897707,
            role="no published accuracy; out_norm none; tp.py comment 1683 img/s",
            changes={"forward_type": "v05_onnone_noz"},
        ),
        "vmambav2_tiny_224_onsoftmax": PublishedModel(
            "s1",
            30238696,
            4.897707,
            role="no published accuracy; out_norm softmax; tp.py comment 1644 img/s",
            changes={"forward_type": "v05_onsoftmax_noz"},
        ),
        "vmambav2_tiny_224_posndw": PublishedModel(
            "s1",
            30503464,
            4.891385,
            role="no published accuracy (posembed, no DWConv)",
            changes={"ssm_conv": -1, "posembed": True},
        ),
        "vmambav2_tiny_224_relu": PublishedModel(
            "s1",
            30249064,
            4.90561,
            role="activation ReLU (SSM)",
            top1=82.65,
            throughput=1684,
            changes={"ssm_act_layer": "relu"},
        ),
        "vmambav2_tiny_224_sr1hl5": PublishedModel(
            "s2", 28131976, 4.418351, role="no published accuracy (ssm_ratio 1.5, 5 layers)", changes={"ssm_ratio": 1.5}
        ),
        "vmambav2_tiny_224_sr1l5": PublishedModel(
            "s2",
            25558120,
            3.97896,
            role="ladder step (e.2) d_state 1",
            top1=81.87,
            throughput=1942,
            changes={"ssm_ratio": 1.0},
        ),
        "vmambav2_tiny_224_unidi": PublishedModel(
            "s1",
            30249064,
            4.90561,
            role="scan pattern Unidi-Scan",
            top1=82.26,
            throughput=1682,
            changes={"forward_type": "v051d_noz"},
        ),
        "vmambav2_tiny_224_unidi_ndw": PublishedModel(
            "s1",
            30202408,
            4.891385,
            role="Unidi-Scan, no DWConv",
            top1=80.88,
            throughput=1716,
            changes={"ssm_conv": -1, "forward_type": "v051d_noz"},
        ),
    }
)


def official_arguments(model: PublishedModel) -> dict[str, Any]:
    """Return the arguments with which the authors' constructor builds `model`."""
    return {**_FAMILIES[model.family], **model.changes}
