"""Export of a single-clip codec: a graph from frame numbers to frames, and the coded weights, the clip's size."""

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from varitok.codecs.implicit.codec import ImplicitCodec

from ..runtime.bundle import DECODER, FORMAT_VERSION
from ..runtime.implicit import SingleClipBundle
from ..runtime.load import load
from .bundle_folder import describe, replace_folder, report
from .model_card import render
from .onnx import Port, export_graph
from .parity import Parity, ParityError, signal_error
from .torchscript import export_torchscript, load_torchscript

__all__ = ["WEIGHTS", "FrozenSingleClip", "export_single_clip"]

WEIGHTS = "weights.bin"
COMPARED = 12  # number of compared frames, spread over the clip


class FrozenSingleClip(nn.Module):
    """The export form of a single-clip network, with the weights that a file decodes to.

    Args:
        codec: Codec of the clip; it isn't changed.
        data: Bytes of the file, or a prefix of them.
    """

    def __init__(self, codec: ImplicitCodec, data: bytes) -> None:
        super().__init__()
        self.painter = copy.deepcopy(codec.decoder)
        self.painter.load_state_dict(codec.painter(*codec.read(data)))
        self.requires_grad_(False).eval()

    @torch.jit.export
    def decode(self, numbers: Tensor) -> Tensor:
        """Render the frames of given numbers, int64 `(t,)`: `(t, 3, h, w)` in [-1, 1]."""
        painted: Tensor = self.painter(numbers)
        return painted

    def forward(self, numbers: Tensor) -> Tensor:
        """Call `decode`."""
        return self.decode(numbers)


def export_single_clip(
    codec: ImplicitCodec,
    folder: str | os.PathLike[str],
    *,
    architecture: Mapping[str, Any] | None = None,
    formats: Sequence[str],
) -> dict[str, Any]:
    """Export a single-clip codec to a bundle with a decoder only; see `bundle.export_bundle`.

    All graphs have the weights that `weights.bin` decodes to. This file also replaces safetensors.

    Raises:
        UserError: The folder can't be written or isn't a bundle.
        ParityError: `weights.bin` doesn't decode to the codec's weights, or a graph's frames differ from the codec's.
    """
    codec = copy.deepcopy(codec).cpu().float().eval()
    with torch.inference_mode(), replace_folder(Path(folder)) as partial:
        codes = codec.encode(torch.zeros(()).expand(1, 3, *codec.downsample))
        coded = codec.compress(codes)
        (partial / WEIGHTS).write_bytes(coded.data)
        read, ranges = codec.read((partial / WEIGHTS).read_bytes())
        if not (torch.equal(read, codes) and torch.equal(ranges, codec.ranges())):
            raise ParityError(f"{WEIGHTS}: decodes to other weights")
        frames, height, width = codec.downsample
        config = {
            "format_version": FORMAT_VERSION,
            "modality": "clip",
            "frames": frames,
            "height": height,
            "width": width,
            "frame_rate": codec.frame_rate,
            "weights": codec.weights,
            "bits": codec.num_codebooks,
            "ends": coded.ends,
            "value_range": [-1.0, 1.0],
            "dtype": "float32",
        } | ({"architecture": dict(architecture)} if architecture else {})
        numbers = torch.linspace(0, frames - 1, min(frames, COMPARED)).round().long()
        frozen = FrozenSingleClip(codec, coded.data)
        parity = _graphs(frozen, config, partial, formats, numbers, codec.render(codes, numbers))
        about = render(config, formats, file=WEIGHTS, pixels=frames * height * width)
        (partial / "README.md").write_text(about, encoding="utf-8")
        return report(partial, parity)


def _graphs(
    frozen: FrozenSingleClip,
    config: dict[str, Any],
    folder: Path,
    formats: Sequence[str],
    numbers: Tensor,
    expected: Tensor,
) -> dict[str, Parity]:
    """Write and reload the graphs, and compare their frames with `expected`, in batches of 1, 2 and all `numbers`."""
    metadata = describe(folder, config, frozen.state_dict())
    found: dict[str, Parity] = {}

    def compare(name: str, paint: Callable[[Tensor], Tensor]) -> None:
        sizes = [1, 2, len(numbers)]
        errors = [signal_error(expected[:size], paint(numbers[:size]), f"{name}, {size} frames") for size in sizes]
        found[name] = Parity(config["weights"], 1.0, max(errors))

    compare(WEIGHTS, frozen.decode)
    if "torchscript" in formats:
        export_torchscript(frozen, folder / "codec.ts", metadata, ["decode"])
        compare("codec.ts", load_torchscript(folder / "codec.ts")[0].decode)
    if "onnx" in formats:
        path = folder / DECODER
        path.parent.mkdir()
        source: Port = ("frame_numbers", ["num_frames"])
        target: Port = ("reconstruction", ["num_frames", None, None, None])
        export_graph(frozen, [torch.zeros(3).long()], path, [source], [target], metadata | {"codec.role": "decoder"})
        bundle = load(folder, verify=False)
        assert isinstance(bundle, SingleClipBundle)
        compare("onnx", lambda numbers: torch.from_numpy(bundle.run_decoder(numbers.numpy())))
    return found
