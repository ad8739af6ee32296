"""The model card of a bundle."""

from collections.abc import Mapping, Sequence
from typing import Any

from varitok import __version__
from varitok.codecs.lengths import ladder

__all__ = ["card"]

HEAD = """\
# An image tokenizer of up to {tokens} tokens

It turns a {side} x {side} image into a row of at most {tokens} tokens and back. {order}
Exported by varitok {version} in format {format_version}.

- Images: float32 `(batch, {channels}, {side}, {side})`, values in [-1, 1] (`pixels / 127.5 - 1`); what comes back is
  clamped to that range.
- Codes: {code_type} `(batch, {books}, k)`, k from 1 to {tokens}; {ranges}.
- Bottleneck: {quantizer}, {bits:g} bits a token.

| tokens kept | bits an image | bits a pixel |
|---:|---:|---:|
{rows}

`export.json` tells how each file compares with the trained codec and holds every file's SHA-256; `golden.safetensors`
has images, codes and reconstructions to test another implementation with.
"""

ONNX = """
## With ONNX Runtime alone

```python
import numpy as np, onnxruntime as ort
encoder = ort.InferenceSession("onnx/encoder_model.onnx")
decoder = ort.InferenceSession("onnx/decoder_model.onnx")
pixels = np.zeros((1, {channels}, {side}, {side}), np.float32)  # an image / 127.5 - 1, channels first
codes = encoder.run(None, {{"pixel_values": pixels}})[0]
image = decoder.run(None, {{"image_codes": codes[..., :{some}]}})[0]  # the first {some} of {tokens} tokens
```

ONNX Runtime takes codes that are out of range without a word; check them, or use varitok:

## With varitok (numpy and ONNX Runtime; no torch)

```python
import numpy as np, varitok
codec = varitok.load(".")
image = np.zeros(({side}, {side}, {channels}), np.uint8)  # or a Pillow image of any size
codes = codec.encode(image, tokens={some})
pixels = codec.pixels(codec.decode(codes))  # uint8 (1, {side}, {side}, {channels})
```
"""

TORCHSCRIPT = """
## With TorchScript

A TorchScript file is a program; load it only from a source that you trust.

```python
import torch
codec = torch.jit.load("codec.ts")
codes = codec.encode(torch.zeros(1, {channels}, {side}, {side}))
image = codec.decode(codes[..., :{some}])
```
"""

SAFETENSORS = """
## Weights

`model.safetensors` has the weights by name, float32; `config.json` says what they belong to.
"""

ORDER = {
    True: "It was trained to do with fewer: keep the first k, and the image gets\nsimpler, not broken.",
    False: "It was trained with all of them kept: the first k\ndecode too, but poorly.",
}


def card(config: Mapping[str, Any], formats: Sequence[str]) -> str:
    """Write a bundle's README.md.

    Args:
        config: Its config.json.
        formats: What was exported.
    """
    tokens, bits = config["tokens"], config["bits_per_token"]
    pixels = config["image_size"] ** 2
    fills = {
        "side": config["image_size"],
        "books": config["code_rows"],
        "bits": bits,
        "some": max(1, tokens // 2),
        "version": __version__,
        "ranges": _ranges(config["book_sizes"]),
        "rows": "\n".join(f"| {k} | {k * bits:.6g} | {k * bits / pixels:.3g} |" for k in ladder(tokens)),
        "order": ORDER[config["variable_length"]],
        **{name: config[name] for name in ("tokens", "channels", "quantizer", "code_type", "format_version")},
    }
    parts = {"onnx": ONNX, "torchscript": TORCHSCRIPT, "safetensors": SAFETENSORS}
    return (HEAD + "".join(text for name, text in parts.items() if name in formats)).format(**fills)


def _ranges(sizes: Sequence[int]) -> str:
    """Say what codes there are."""
    if not sizes:
        return "continuous latents, any values"
    listed = ", ".join(f"book {book}: 0 to {size - 1}" for book, size in enumerate(sizes))
    return listed + ("; a prefix of the books decodes too, coarser" if len(sizes) > 1 else "")
