"""Export of a codec to a bundle: a folder that other programs can load without this code."""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from safetensors.torch import load_file, save
from torch import Tensor

from varitok import UserError
from varitok.codecs.bottlenecks.contract import Bottleneck
from varitok.codecs.codec import Codec
from varitok.codecs.implicit.codec import ImplicitCodec
from varitok.codecs.lengths.distributions import Full
from varitok.codecs.modalities.base import GraphNames
from varitok.codecs.modalities.registry import modality_of
from varitok.codecs.networks.contract import GenerativeDecoder
from varitok.codecs.streaming import ChunkedCodec

from ..runtime.bundle import DECODER, FORMAT_VERSION, Bundle
from ..runtime.images import ImageBundle
from ..runtime.load import load
from ..runtime.streaming import run_stream, stream_form
from .bundle_folder import describe, replace_folder, report
from .examples import example_signals
from .frozen import FrozenCodec, FrozenGenerator, FrozenStream, freeze
from .implicit import export_single_clip
from .int8 import quantize_decoder
from .memory import measure_memory
from .model_card import card
from .onnx import export_onnx
from .parity import SAMPLED_ERROR, SIGNAL_ERROR, Chunked, Coder, Size, check, draw
from .tiles import measure_tiles
from .torchscript import export_torchscript, load_torchscript
from .weights import pack_graphs, round_weights, smallest

__all__ = ["FORMATS", "INT8", "architecture", "export_bundle"]

FORMATS = ("safetensors", "torchscript", "onnx")
INT8 = "onnx_int8"  # optional, beside onnx; for transformers only


def export_bundle(
    codec: Codec,
    folder: str | os.PathLike[str],
    *,
    architecture: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    formats: Sequence[str] = FORMATS,
    streaming: bool = True,
    weights: str = "float32",
) -> dict[str, Any]:
    """Export a codec to a bundle; every file is reloaded and compared with the codec first.

    An existing bundle is replaced only when the new one is complete.

    >>> report = export_bundle(codec, "bundle", formats=["safetensors"])
    >>> report["parity"]["model.safetensors"]["codes_equal"]
    1.0

    Args:
        codec: Codec to export; it isn't changed.
        folder: Folder of the bundle.
        architecture: How the codec was built, as plain data for config.json (see `architecture`).
        image_size: Height and width of the images of training, in pixels, of a codec that takes any; None if unknown.
        formats: Names in `FORMATS`; for a transformer also `INT8`, which adds a decoder with 8-bit weights.
        streaming: Whether to export the streaming graphs too, if the codec can stream.
        weights: A name in `WEIGHTS`: to what the codec's weights are rounded first (`weights.py`).

    Returns:
        The contents of export.json, with `parity`, `files` and `versions`.

    Raises:
        UserError: A format or type of weights is unknown or not for this codec, or the folder can't be written or
            isn't a bundle.
        ParityError: An exported file differs from the codec.
    """
    unknown = [name for name in formats if name not in (*FORMATS, INT8)]
    if unknown or not formats:
        known = ", ".join((*FORMATS, INT8))
        raise UserError(f"formats: {unknown[0] if unknown else 'none'} is not known; known are {known}")
    if INT8 in formats and ("onnx" not in formats or isinstance(codec, ImplicitCodec)):
        raise UserError(f"formats: {INT8} quantizes a codec's onnx, which must be among the formats")
    if isinstance(codec, ImplicitCodec):
        if weights != "float32":
            raise UserError(f"weights: {weights} is not for a codec whose weights are its codes; leave it out")
        return export_single_clip(codec, folder, architecture=architecture, formats=formats)
    codec = round_weights(codec, weights)
    frozen = freeze(codec, streaming)
    if INT8 in formats and isinstance(frozen, FrozenGenerator):
        raise UserError(f"formats: {INT8} is not for a decoder that samples; leave it out")
    with torch.inference_mode():
        kind = torch.int64 if codec.bottleneck.codebook_sizes else torch.float32
        axes = codec.layout.axes.split()[2:]
        least = torch.zeros(1, codec.bottleneck.rows, *(1 for _ in axes), dtype=kind)
        size = tuple(int(side) for side in frozen.decode(least).shape[1:])
    config = _describe(codec, size) | _describe_stream(codec, frozen) | {"weights": weights}
    config |= {"sampler": codec.decoder.describe()} if isinstance(codec.decoder, GenerativeDecoder) else {}
    config |= {"image_size": image_size} if image_size and config["token_layout"] == "b q h w" else {}
    config |= {"architecture": dict(architecture)} if architecture else {}
    with replace_folder(Path(folder)) as partial:
        return _write(codec, frozen, config, codec.layout.trial_sizes(size), partial, formats)


def architecture(config: DictConfig | ListConfig) -> dict[str, Any]:
    """Return how a run's codec was built, as plain data: `_target_` becomes `type`, the name of the class."""

    def plain(node: Any) -> Any:
        if isinstance(node, Mapping):
            named: dict[str, Any] = {"type": str(node["_target_"]).rpartition(".")[2]} if "_target_" in node else {}
            named |= {"partial": True} if node.get("_partial_") else {}
            return named | {str(key): plain(value) for key, value in node.items() if not str(key).startswith("_")}
        return [plain(value) for value in node] if isinstance(node, list) else node

    # Resolve only these groups: config.yaml also has Hydra's own settings, which only Hydra can resolve.
    groups = {name: OmegaConf.select(config, name) for name in ("codec", "bottleneck", "length")}
    return {name: plain(OmegaConf.to_container(group, resolve=True)) for name, group in groups.items() if group}


def _describe(codec: Codec, size: Size) -> dict[str, Any]:
    """Return the entries of config.json about signals, codes and bottleneck."""
    modality = modality_of(codec)
    return {
        "format_version": FORMAT_VERSION,
        "modality": modality.name,
        **modality.describe(codec, size),
        **codec.layout.describe(size),
        "channels": size[0],
        "tokens": codec.layout.tokens,
        "codebook_sizes": list(codec.bottleneck.codebook_sizes),
        "codebook_strides": list(codec.bottleneck.codebook_strides),
        **_layers(codec.bottleneck),
        "code_rows": codec.bottleneck.rows,
        "code_type": "int64" if codec.bottleneck.codebook_sizes else "float32",
        "bits_per_token": codec.bottleneck.bits,
        "quantizer": type(codec.bottleneck).__name__,
        "mechanism": codec.length.mechanism.name,
        "variable_length": not isinstance(codec.length.distribution, Full),
        "input_layout": f"b c {modality.grid}",
        "token_layout": codec.layout.axes,
        "value_range": [-1.0, 1.0] if codec.bounded else None,
        "output": "clamped to value_range" if codec.bounded else "as decoded",
        "dtype": "float32",
    }


def _layers(bottleneck: Bottleneck) -> dict[str, list[int]]:
    """Return the entry `codebook_layers` of config.json; none if no codebooks share entries."""
    layers = bottleneck.codebook_layers
    return {"codebook_layers": list(layers)} if max(layers, default=1) > 1 else {}


def _describe_stream(codec: Codec, frozen: FrozenCodec) -> dict[str, Any]:
    """Return the entry `streaming` of config.json; none if the codec can't stream."""
    if not isinstance(frozen, FrozenStream):
        return {}
    encoder, decoder = (_state_terms(sizes) for sizes in zip(*(frozen.state_sizes(*g) for g in GRIDS), strict=True))
    grows, chunked = codec.layout.free_sides, ChunkedCodec(codec)
    streaming: dict[str, Any] = {
        "encoder_state_size": encoder if grows else encoder[0],
        "decoder_state_size": decoder if grows else decoder[0],
        "chunk_samples": chunked.latency,
        "chunk_tokens": chunked.chunk_tokens,
    }
    rate = codec.sample_rate or codec.frame_rate
    if rate:
        streaming["latency_ms"] = 1000 * chunked.latency / rate
    return {"streaming": streaming}


GRIDS = ((1, 1), (2, 1), (1, 2), (2, 2))  # (rows, columns) of latents at which state sizes are measured


def _state_terms(sizes: Sequence[int]) -> list[int]:
    """Solve size(h, w) = p + q h + s w + u h w for p, q, s, u, given a state's sizes at `GRIDS`."""
    one, taller, wider, both = sizes
    u = both - taller - wider + one
    q, s = taller - one - u, wider - one - u
    return [one - q - s - u, q, s, u]


def _write(
    codec: Codec,
    frozen: FrozenCodec,
    config: dict[str, Any],
    sizes: Sequence[Size],
    folder: Path,
    formats: Sequence[str],
) -> dict[str, Any]:
    """Write all files of a bundle, and compare the exported ones with the codec."""
    metadata = describe(folder, config, frozen.state_dict())
    example = draw(2, sizes[-1], torch.Generator().manual_seed(0))
    names = modality_of(codec).graph
    artifacts: dict[str, Coder] = {}
    if "safetensors" in formats:
        name = "model.safetensors"
        state = {key: value.contiguous() for key, value in frozen.state_dict().items()}
        _save(state if config["weights"] == "float32" else smallest(state), folder / name, metadata)
        artifacts[name] = _reload(frozen, folder / name)
    if "torchscript" in formats:
        export_torchscript(frozen, folder / "codec.ts", metadata)
        artifacts["codec.ts"] = scripted = load_torchscript(folder / "codec.ts")[0]
        if isinstance(frozen, FrozenStream):
            artifacts["codec.ts, streaming"] = Chunked(scripted, ChunkedCodec(codec))
    if "onnx" in formats:
        export_onnx(frozen, folder / Path(DECODER).parent, example, metadata, names)
        if config["weights"] != "float32":
            pack_graphs(folder / Path(DECODER).parent)
        artifacts["onnx"] = runtime = _Runtime(folder)
        if isinstance(frozen, FrozenStream):
            artifacts["onnx, streaming"] = Chunked(runtime, ChunkedCodec(codec))
    allowed = SAMPLED_ERROR if isinstance(frozen, FrozenGenerator) else SIGNAL_ERROR
    parity = check(codec, artifacts, sizes, allowed)
    if INT8 in formats:
        quantize_decoder(folder)
        # Reported without a bound: the rounding error depends on the network.
        parity |= check(codec, {INT8: _Runtime(folder, int8=True)}, sizes, allowed=math.inf)
    signals, source = example_signals(codec, modality_of(codec), config, sizes[-1])
    _write_golden(frozen, signals, folder / "golden.safetensors", metadata | {"codec.examples": source}, names)
    memory, tiles = {}, None
    if "onnx" in formats:
        memory = measure_memory(runtime.bundle)
        if isinstance(runtime.bundle, ImageBundle) and "image_size" in config and not codec.layout.ordered:
            tiles = measure_tiles(runtime.bundle, signals[:1], config["image_size"])
    (folder / "README.md").write_text(card(config, formats, tiles), encoding="utf-8")
    return report(folder, parity, memory, tiles)


class _Runtime:
    """A bundle's ONNX graphs, run by the runtime that users have, on torch tensors."""

    def __init__(self, folder: Path, int8: bool = False) -> None:
        bundle = load(folder, verify=False, int8=int8)
        assert isinstance(bundle, Bundle)
        self.bundle = bundle

    def encode(self, signal: Tensor) -> Tensor:
        return torch.from_numpy(self.bundle.run_encoder(signal.numpy()))

    def decode(self, codes: Tensor) -> Tensor:
        return torch.from_numpy(self.bundle.run_decoder(codes.numpy()))

    def state_sizes(self, *grid: int) -> tuple[int, int]:
        encoder, decoder = (stream_form(self.bundle.config, side).state_size(grid) for side in ("encoder", "decoder"))
        return encoder, decoder

    def encode_chunk(self, signal: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        codes, after = run_stream(self.bundle.streaming_graphs[0], signal.numpy(), state.numpy())
        return torch.from_numpy(codes), torch.from_numpy(after)

    def decode_chunk(self, codes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        signal, after = run_stream(self.bundle.streaming_graphs[1], codes.numpy(), state.numpy())
        return torch.from_numpy(signal), torch.from_numpy(after)


def _reload(frozen: FrozenCodec, path: Path) -> FrozenCodec:
    """Return a copy with all weights from the file; a missing weight would show as NaN."""
    copied = copy.deepcopy(frozen)
    for value in copied.state_dict().values():
        value.fill_(math.nan if value.is_floating_point() else -1)
    copied.load_state_dict(load_file(path))
    return copied


def _write_golden(frozen: FrozenCodec, signal: Tensor, path: Path, metadata: dict[str, str], names: GraphNames) -> None:
    """Write signals, their codes, and the reconstructions from 1, N / 2 and N tokens."""
    with torch.inference_mode():
        codes = frozen.encode(signal)
        axis = frozen.layout.code_axis
        total = codes.shape[axis]
        kept = {k: codes.narrow(axis, 0, k) for k in sorted({1, max(1, total // 2), total})}
        back = {f"{names.back}.{k}": frozen.decode(some).contiguous() for k, some in kept.items()}
    _save({names.signal: signal, names.codes: codes.contiguous(), **back}, path, metadata)


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file with the default file mode; the library's own `save_file` uses 0600."""
    path.write_bytes(save(tensors, metadata))
