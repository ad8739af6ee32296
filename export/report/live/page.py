"""The live page: one HTML file in which a browser runs a bundle's ONNX graphs on the reader's own images or audio."""

import base64
import gzip
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from PIL import Image

from varitok import UserError

from ...bitstream.container import identity
from ...runtime.bundle import DECODER, ENCODER, Bundle, Opened, to_pixels
from ...runtime.load import load
from ...runtime.memory import MEMORY, Side, plan
from ..page import STYLE, document, embed

__all__ = ["RUNTIME", "cached_runtime", "find_runtime", "write_live"]

RUNTIME = "1.30.0"  # version of onnxruntime-web
SHA512 = (
    "ab4cbe26baedba45d2cec05610c71c55fa97db92d19a8b171c5f8269126683ca"
    "590a5cdc57bb2f35ce2b298de32f4d956fb42644c0ecd528a0a91e025c07ca61"
)
FILES = {"runtime": "ort.wasm.bundle.min.mjs", "wasm": "ort-wasm-simd-threaded.wasm"}  # embedded in the page
MOST_SECONDS = 60  # of audio that the page encodes
OWN = ("live.css", "container.js", "signals.js", "tiling.js", "live.js")


def write_live(path: Path, folder: Path, runtime: Path | None = None) -> None:
    """Write a page that works from a local file, without a network.

    Args:
        path: Path of the HTML file.
        folder: Folder of an image or audio bundle.
        runtime: Archive or unpacked folder of onnxruntime-web; None for the result of `find_runtime`.

    Raises:
        UserError: The bundle isn't supported, onnxruntime-web is missing, or the file can't be written.
    """
    bundle = load(folder)
    about = _about(bundle)
    blocks = _runtime(find_runtime() if runtime is None else runtime)
    blocks |= {name: (folder / file).read_bytes() for name, file in (("encoder", ENCODER), ("decoder", DECODER))}
    if example := _example(bundle):
        about["example"], blocks["example"] = example  # opened at once
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_document(folder.resolve().name, about, blocks), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror})") from error


def _example(bundle: Opened) -> tuple[dict[str, str], bytes] | None:
    """Return the first signal of the bundle's test vectors: a file's name and origin, and the file."""
    path = bundle.folder / "golden.safetensors"
    if not path.is_file() or find_spec("safetensors") is None:
        return None
    from safetensors import safe_open  # noqa: PLC0415 (loading a bundle doesn't need it)

    with safe_open(path, "numpy") as vectors:
        source = (vectors.metadata() or {}).get("codec.examples", "")
        name = "input_values" if bundle.modality == "audio" else "pixel_values"
        signal = vectors.get_slice(name)[:1][0]  # (c, *grid)
    file = io.BytesIO()
    if bundle.modality == "audio":
        import soundfile  # noqa: PLC0415 (images don't need it)

        soundfile.write(file, signal.T, bundle.config["sampling_rate"], "PCM_24", format="WAV")  # (c, t) -> (t, c)
        name = "example.wav"
    else:
        Image.fromarray(to_pixels(signal[None])[0]).save(file, "PNG")
        name = "example.png"
    return {"name": name, "source": source.partition(";")[0]}, file.getvalue()


def find_runtime() -> Path:
    """Return the archive of onnxruntime-web from the user's cache; download it there with npm if it is missing.

    Raises:
        UserError: It is neither cached nor can npm download it.
    """
    path = cached_runtime()
    if path.is_file():
        return path
    ask = f"give --onnxruntime-web FILE, the archive that `npm pack onnxruntime-web@{RUNTIME}` makes elsewhere"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"the live page needs ONNX Runtime for browsers, and there is no npm to get it; {ask}")
    path.parent.mkdir(parents=True, exist_ok=True)
    words = [npm, "pack", f"onnxruntime-web@{RUNTIME}", "--pack-destination", str(path.parent), "--silent"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode or not path.is_file():
        raise UserError(f"the live page needs ONNX Runtime for browsers, and npm could not get it; {ask}")
    return path


def cached_runtime() -> Path:
    """Return the path of onnxruntime-web's archive in the user's cache, whether it exists or not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "varitok" / f"onnxruntime-web-{RUNTIME}.tgz"


def _runtime(path: Path) -> dict[str, bytes]:
    """Read the needed files of onnxruntime-web."""
    try:
        if path.is_dir():
            root = path / "dist" if (path / "dist").is_dir() else path
            return {name: (root / file).read_bytes() for name, file in FILES.items()}
        if hashlib.sha512(path.read_bytes()).hexdigest() != SHA512:
            raise UserError(f"{path}: not onnxruntime-web {RUNTIME} as it was published (SHA-512); download it again")
        with tarfile.open(path) as archive:
            members = {name: archive.extractfile(f"package/dist/{file}") for name, file in FILES.items()}
            return {name: member.read() for name, member in members.items() if member}
    except (OSError, KeyError, tarfile.TarError) as error:
        raise UserError(f"{path}: not onnxruntime-web, its archive or its folder ({error})") from error


def _about(bundle: Opened) -> dict[str, Any]:
    """Return the facts about a bundle that the scripts need."""
    image = bundle.modality == "image"
    if not isinstance(bundle, Bundle) or not (image or bundle.modality == "audio") or not bundle.codebook_sizes:
        raise UserError(f"{bundle.folder}: the live page supports only image and audio bundles with codebooks")
    if bundle.seed is not None:
        raise UserError(f"{bundle.folder}: the live page supports no decoder that samples; use varitok decode")
    if image and not bundle.tokens and max(bundle.codebook_strides) > 1:
        raise UserError(f"{bundle.folder}: the live page supports no codes that several tokens of a grid share")
    if image and bundle.channels != 3:
        raise UserError(f"{bundle.folder}: the live page supports only RGB images, not {bundle.channels} channels")
    if any(size > 1 << 52 for size in bundle.codebook_sizes):
        raise UserError(f"{bundle.folder}: the live page supports at most 2^52 entries per codebook")
    about: dict[str, Any] = {
        "modality": bundle.modality,
        "identity": identity(bundle.folder).hex(),
        "codebook_sizes": list(bundle.codebook_sizes),
        "codebook_strides": list(bundle.codebook_strides),
        "channels": bundle.channels,
        "tokens": bundle.tokens,
    }
    if image and bundle.tokens:
        return about | {"noun": "an image", "image_size": int(bundle.config["image_size"]), "facts": []}
    if image:  # in the tiles of `varitok encode`
        tile = {side: plan(bundle, side, (), MEMORY).tile for side in get_args(Side)}
        return about | {"noun": "an image", "grid": {"hop": bundle.hops, "tile": tile}, "facts": []}
    own = {"sampling_rate": bundle.sample_rate, "hop": bundle.hops[0], "facts": [bundle.sample_rate]}
    return about | own | {"noun": "an audio file", "most_seconds": MOST_SECONDS}


def _document(name: str, about: dict[str, Any], blocks: dict[str, bytes]) -> str:
    packed = {key: base64.b64encode(gzip.compress(data, 6, mtime=0)).decode() for key, data in blocks.items()}
    data = "".join(f'<script type="text/plain" id="{key}">{text}</script>\n' for key, text in packed.items())
    picture, unit = about["modality"] == "image", "tokens" if about["tokens"] else "codebooks"
    before, after = (
        f'<canvas id="{key}" role="img" aria-label="{label}"></canvas>'
        if picture
        else f'<audio id="{key}" controls aria-label="{label}"></audio>'
        for key, label in (("before", "The original"), ("after", "The reconstruction"))
    )
    accept = f"{'image' if picture else 'audio'}/*,.vtk"
    body = f"""<label class="drop" id="drop">Drop {about["noun"]} or a .vtk file here, or choose one
<input type="file" id="file" accept="{accept}"></label>
<p class="told" id="told" role="status">Starting ONNX Runtime …</p>
<section id="results" hidden aria-label="Result">
<div class="kept">
<label for="kept">Kept {unit}, of <span id="most"></span> <output id="size" for="kept"></output></label>
<input type="range" id="kept" min="1" max="1" value="1"></div>
<div class="pair">
<figure id="original"><figcaption>Original</figcaption>{before}</figure>
<figure><figcaption>Reconstruction</figcaption>{after}</figure>
</div>
<button type="button" id="save">Save the codes (.vtk)</button>
<button type="button" id="save-signal">Save the reconstruction ({"PNG" if picture else "WAV"})</button>
</section>"""
    files = [STYLE, *(Path(__file__).with_name(file) for file in OWN)]
    need = "This page needs JavaScript; it loads no script from elsewhere."
    sources = "img-src data: blob:; media-src blob:; style-src 'unsafe-inline'; connect-src blob: data:"
    note = "Encoder and decoder run in this page; no data leaves it. "
    return document(f"{name}, live", need, body, embed("about", about) + data, files, sources, note, wasm=True)
