"""Open an exported bundle with NumPy and ONNX Runtime, without torch or the rest of varitok.

It reads only ONNX graphs and JSON. Both are data: no code of a bundle is executed.
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
"""Bundle class of each modality. Append new ones: a container stores the index of its modality."""


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
        providers: ONNX Runtime's execution providers, by preference; the CPU if None.
        verify: Compare the files with the SHA-256 checksums that the export recorded.
        int8: Use the decoder with 8-bit weights: smaller and faster, but not exact. Streaming remains exact.

    Raises:
        UserError: The folder is not a bundle, a file is missing or altered, the format is unknown, or a provider is
            not available.

    Example:
        >>> bundle = load("image_tokenizer", providers=["CPUExecutionProvider"])
        >>> bundle.modality, bundle.tokens
        ('image', 6)
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
            raise UserError(f"providers: {provider} is not available; this ONNX Runtime has {', '.join(available)}")
    return kind(folder, config, list(providers or ["CPUExecutionProvider"]), int8)
