"""Eight-bit weights for onnxruntime on CPUs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import onnx

Quantization = Literal["none", "int8-weights", "int8-dynamic"]
_BLOCK = 32


def quantize(source: Path, target: Path, kind: Quantization) -> None:
    """Write a copy of an ONNX model whose linear layers have weights of eight bits; the scan stays in float32.

    Args:
        source: A float32 model.
        target: File to write.
        kind: "int8-weights" keeps activations in float32, with a scale for each block of 32 weights. "int8-dynamic"
            also rounds the activations, with a scale found for each tensor when it is there.

    Raises:
        ValueError: There is no such kind.
    """
    if kind == "int8-weights":
        _weights_only(source, target)
    elif kind == "int8-dynamic":
        _dynamic(source, target)
    else:
        raise ValueError(f"quantization must be 'int8-weights' or 'int8-dynamic', not {kind!r}")


def _weights_only(source: Path, target: Path) -> None:
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    quantizer = MatMulNBitsQuantizer(onnx.load(str(source)), bits=8, block_size=_BLOCK, is_symmetric=True)
    quantizer.process()
    onnx.save_model(quantizer.model.model, str(target))


def _dynamic(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Its advice to preprocess concerns calibrated quantisation.
    logging.getLogger().disabled = True
    try:
        quantize_dynamic(
            str(source),
            str(target),
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            # Processors without VNNI add two products in 16 bits: with weights of all eight bits the sums are cut off
            # there, and a file proven on one machine is wrong on another.
            reduce_range=True,
        )
    finally:
        logging.getLogger().disabled = False
