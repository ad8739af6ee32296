"""Quantization of a decoder's weights to int8: a quarter of the size, and faster if matrix products dominate."""

from pathlib import Path

import numpy as np
import onnx

from varitok import UserError

from ..runtime.bundle import DECODER, DECODER_INT8

__all__ = ["quantize_decoder"]

LEAST_SHARE = 0.5  # least share of weights in matrix products: int8 saves little and is slower with convolutions


def quantize_decoder(folder: Path) -> None:
    """Write a second decoder to a bundle, with the weights of matrix products as int8, one scale per column.

    Inputs of the products are quantized to 8 bits too, scaled by their largest value in each call. Reconstructions
    therefore approximate the exact decoder's, and depend slightly on the other samples of the batch.

    Args:
        folder: Folder of the bundle, which has the exact decoder.

    Raises:
        UserError: Most weights are not in matrix products.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 (this import takes a second)

    exact = onnx.load(folder / DECODER)
    sizes = {weight.name: int(np.prod(weight.dims)) for weight in exact.graph.initializer}
    products = {name for node in exact.graph.node if node.op_type == "MatMul" for name in node.input if name in sizes}
    share = sum(sizes[name] for name in products) / max(1, sum(sizes.values()))
    if share < LEAST_SHARE:
        raise UserError(f"onnx_int8: {share:.0%} of this decoder's weights are in products; int8 is for transformers")
    quantize_dynamic(
        exact,
        folder / DECODER_INT8,
        op_types_to_quantize=["MatMul"],
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,  # to 7 bits: on CPUs without VNNI, sums of 8-bit products silently overflow 16 bits
        extra_options={"MatMulConstBOnly": True},
    )
    made = onnx.load(folder / DECODER_INT8)
    if {entry.key for entry in made.metadata_props} != {entry.key for entry in exact.metadata_props}:
        del made.metadata_props[:]
        made.metadata_props.extend(exact.metadata_props)
        onnx.save(made, folder / DECODER_INT8)
