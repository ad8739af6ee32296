"""Runs an exported bundle with numpy and ONNX Runtime; neither torch nor the rest of varitok is needed.

Only ONNX graphs and JSON are read, which are data; nothing in a bundle is executed as code.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from varitok import UserError

from .audio import AudioBundle
from .bundle import DECODER_INT8, REEXPORT_HINT, Opened, onnx_runtime, read_config, verify_files
from .features import FeatureBundle
from .images import ImageBundle
from .implicit import SingleClipBundle
from .video import VideoBundle

__all__ = ["BUNDLES", "load"]

BUNDLES: dict[str, type[Opened]] = {
    kind.modality: kind for kind in (ImageBundle, AudioBundle, VideoBundle, FeatureBundle, SingleClipBundle)
}
"""By name of the modality. New ones go to the end: containers hold the number of those that have codes."""


def load(
    path: str | PathLike[str],
    *,
    providers: Sequence[str] | None = None,
    verify: bool = True,
    int8: bool = False,
) -> Opened:
    """Open an exported bundle.

    Args:
        path: The bundle's folder; or `hf://OWNER/NAME`, `hf://OWNER/NAME@REVISION` on the Hugging Face hub.
        providers: ONNX Runtime's execution providers, best first; the CPU if None.
        verify: Compare the files that will be read with their recorded checksums.
        int8: Decode by a decoder of 8-bit weights, which is smaller, faster and not quite the same; what goes chunk by
            chunk stays exact.

    Raises:
        UserError: It is not a bundle, a file is missing or altered, its format is unknown, or a provider isn't there.
    """
    if str(path).startswith("hf://"):
        from .hub import download  # noqa: PLC0415 (an extra)

        path = download(str(path).removeprefix("hf://"))
    folder = Path(path)
    config = read_config(folder)
    kind = BUNDLES.get(str(config.get("modality")))
    if kind is None:
        raise UserError(
            f"{folder / 'config.json'}: modality {config.get('modality')!r} is not known;"
            f" update varitok or {REEXPORT_HINT}"
        )
    for name in kind.graphs:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing; {REEXPORT_HINT}, with onnx among its formats")
    if int8 and not (folder / DECODER_INT8).is_file():
        raise UserError(
            f"{folder / DECODER_INT8}: missing; {REEXPORT_HINT} --formats safetensors,torchscript,onnx,onnx_int8"
        )
    if verify:
        verify_files(folder, kind.graphs)
    available = onnx_runtime().get_available_providers()
    for provider in providers or ():
        if provider not in available:
            raise UserError(f"providers: {provider} is not there; this ONNX Runtime has {', '.join(available)}")
    return kind(folder, config, list(providers or ["CPUExecutionProvider"]), int8)
