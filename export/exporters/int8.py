"""A decoder whose weights are whole numbers of 8 bits: a quarter of the size, and faster where products are most."""

from pathlib import Path

import numpy as np
import onnx

from varitok import UserError

from ..runtime.bundle import DECODER, DECODER_INT8

__all__ = ["quantize_decoder"]

LEAST_SHARE = 0.5  # of the weights that must be a product's: of a convolutional decoder int8 makes little, slower


def quantize_decoder(folder: Path) -> None:
    """Write a bundle's decoder once more, the weights of its matrix products as int8, one scale a column.

    What goes into a product is rounded to 8 bits too, by the largest value of each call: signals are close to the exact
    decoder's, not equal, and depend a little on what else is in the batch.

    Args:
        folder: The bundle's, whose exact decoder is there.

    Raises:
        UserError: Most weights are not in products.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415 (it takes a second)

    exact = onnx.load(folder / DECODER)
    sizes = {weight.name: int(np.prod(weight.dims)) for weight in exact.graph.initializer}
    products = {name for node in exact.graph.node if node.op_type == "MatMul" for name in node.input if name in sizes}
    share = sum(sizes[name] for name in products) / max(1, sum(sizes.values()))
    if share < LEAST_SHARE:
        raise UserError(f"onnx_int8: of this decoder's weights {share:.0%} are in products; int8 is for transformers")
    quantize_dynamic(
        exact,
        folder / DECODER_INT8,
        op_types_to_quantize=["MatMul"],
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=True,  # 7 bits: products of 8-bit values overflow 16 bits on CPUs without VNNI, silently
        extra_options={"MatMulConstBOnly": True},
    )
    made = onnx.load(folder / DECODER_INT8)
    if {entry.key for entry in made.metadata_props} != {entry.key for entry in exact.metadata_props}:
        del made.metadata_props[:]
        made.metadata_props.extend(exact.metadata_props)
        onnx.save(made, folder / DECODER_INT8)
