"""The model card of a bundle."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from varitok import __version__
from varitok.codecs.lengths.distributions import ladder

from .onnx import NAMES

__all__ = ["card"]

# What the Hugging Face hub reads of a card.
FRONT = """\
---
library_name: varitok
tags: [varitok, tokenizer, neural-codec, {kind}, onnx]
---

"""

IMAGE = """\
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
"""

SOUND = """\
# A codec of sounds at {rate} Hz, {frames:g} tokens a second

It turns a sound into {frames:g} tokens a second of {books} codes each, and back.
Exported by varitok {version} in format {format_version}.

- Sounds: float32 `(batch, {channels}, samples)` at {rate} Hz, in [-1, 1], of any length; a token stands for {hop}
  samples, and the last one's are filled up with zeros. What comes back has whole tokens, clamped to that range.
- Codes: {code_type} `(batch, {books}, n)`, n = ceil(samples / {hop}); {ranges}.
- Bottleneck: {quantizer}, {bits:g} bits a token.

| books kept | bits a second |
|---:|---:|
{rows}
"""

CLIP = """\
# A codec of {noun}: a token for {hop_t} frames of {hop_h} x {hop_w} {unit}s

It turns a clip of any number of frames of any size into a grid of tokens of {books} codes each, and back.
Exported by varitok {version} in format {format_version}.

- Clips: float32 `(batch, {channels}, frames, height, width)`, {values}. {first}
  The last frame, row and column are repeated until all steps are full; what comes back has whole steps, {limits}:
  cut it to the clip's size.
- Codes: {code_type} `(batch, {books}, t, h, w)`, t = ceil((frames + {lead}) / {hop_t}), h = ceil(height / {hop_h}),
  w = ceil(width / {hop_w}); {ranges}.
- Bottleneck: {quantizer}, {bits:g} bits a token.

| books kept | bits a {unit} of a long clip |
|---:|---:|
{rows}
"""

BLOCKS = """\
# A codec of {noun}: up to {tokens} tokens for {hop_t} frames of {side_w} x {side_h} {unit}s

It turns a clip of any number of frames into blocks of {hop_t} frames, each of at most {tokens} tokens of {books} codes,
and back. {order}
Exported by varitok {version} in format {format_version}.

- Clips: float32 `(batch, {channels}, frames, {side_h}, {side_w})`, {values}. {first}
  The last frame is repeated until all blocks are full; what comes back has whole blocks, {limits}:
  cut it to the clip's size.
- Codes: {code_type} `(batch, {books}, t, k)`, t = ceil((frames + {lead}) / {hop_t}), k from 1 to {tokens};
  {ranges}.{later}
- Bottleneck: {quantizer}, {bits:g} bits a token.

| tokens kept of a block | bits a {unit} of a long clip |
|---:|---:|
{rows}
"""

PIXELS = {
    "noun": "clips",
    "unit": "pixel",
    "values": "values in [-1, 1] (`pixels / 127.5 - 1`)",
    "limits": "clamped to that range",
    "meaning": "pixels / 127.5 - 1",
}
FEATURES = {
    "noun": "feature clips",
    "unit": "position",
    "values": "a transformer's features, each channel less its `feature_mean`, divided by its\n"
    "  `feature_deviation` (both are in `config.json`)",
    "limits": "not clamped",
    "meaning": "standardised features",
}

LED = """The first
  frame alone makes the first step of tokens, each {hop_t} more make another: an image is a clip of one frame."""
EVEN = """Each
  {hop_t} frames make a step of tokens."""

CHECKS = """
`export.json` tells how each file compares with the trained codec and holds every file's SHA-256; `golden.safetensors`
has signals, codes and reconstructions to test another implementation with.
"""

ONNX_IMAGE = """
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

ONNX_SOUND = """
## With ONNX Runtime alone

```python
import numpy as np, onnxruntime as ort
encoder = ort.InferenceSession("onnx/encoder_model.onnx")
decoder = ort.InferenceSession("onnx/decoder_model.onnx")
wave = np.zeros((1, {channels}, {rate}), np.float32)  # a second
codes = encoder.run(None, {{"input_values": wave}})[0]
back = decoder.run(None, {{"audio_codes": codes}})[0]
```

ONNX Runtime takes codes that are out of range without a word; check them, or use varitok:

## With varitok (numpy and ONNX Runtime; no torch)

```python
import numpy as np, varitok
codec = varitok.load(".")
wave = np.zeros(({channels}, {rate}), np.float32)  # a second
codes = codec.encode(wave, {rate}, books={some})
back = codec.decode(codes)  # float32 (1, {channels}, samples)
```
"""

ONNX_CLIP = """
## With ONNX Runtime alone

```python
import numpy as np, onnxruntime as ort
encoder = ort.InferenceSession("onnx/encoder_model.onnx")
decoder = ort.InferenceSession("onnx/decoder_model.onnx")
clip = np.zeros((1, {channels}, 9, {side_h}, {side_w}), np.float32)  # {meaning}, channels first
codes = encoder.run(None, {{"{signal_name}": clip}})[0]
back = decoder.run(None, {{"{codes_name}": codes{prefix}}})[0][:, :, :9, :{side_h}, :{side_w}]
```

ONNX Runtime takes codes that are out of range without a word; check them, or use varitok:

## With varitok (numpy and ONNX Runtime; no torch)

```python
import numpy as np, varitok
codec = varitok.load(".")
clip = {clip_9}
codes = codec.encode(clip, {kept}={some})
{back}
```
"""

STREAM_CLIP = """
## Chunk by chunk

`onnx/*_streaming.onnx` take whole steps and a `state`, zeros at the start, and give `state_out`. {lead} copies of the
first frame go before it, and come back before it. A state of frames of h x w tokens has p + q h + s w + u h w numbers;
`config.json` tells p, q, s, u as `encoder_state_size` and `decoder_state_size`. varitok does all that:

```python
import numpy as np, varitok
codec = varitok.load(".")
encode, decode = codec.encoding(), codec.decoding()
codes = encode({clip_5})  # chunks of any number of frames
back = decode(np.concatenate([codes, encode.flush()], axis=2))
```
"""

STREAM = """
## Chunk by chunk

It waits for {latency:g} ms of sound. `onnx/*_streaming.onnx` take a `state`, zeros at the start, and give `state_out`.

```python
import numpy as np, varitok
codec = varitok.load(".")
encode, decode = codec.encoding({rate}), codec.decoding()
codes = encode(np.zeros(({channels}, 1000), np.float32))  # chunks of any size
back = decode(np.concatenate([codes, encode.flush()], axis=2))
```
"""

TORCHSCRIPT = """
## With TorchScript

A TorchScript file is a program; load it only from a source that you trust.

```python
import torch
codec = torch.jit.load("codec.ts")
codes = codec.encode(torch.zeros(1, {channels}, {shape}))
back = codec.decode(codes{prefix})
```
"""

INT8 = """
## With 8-bit weights

`onnx/decoder_model_int8.onnx` takes and gives what `decoder_model.onnx` does, but for rounding, which `export.json`
tells: `varitok.load(".", int8=True)`.
"""

SAFETENSORS = """
## Weights

`model.safetensors` has the weights by name, float32; `config.json` says what they belong to.
"""

ORDER = {
    True: "It was trained to do with fewer: keep the first k, and what comes back gets\nsimpler, not broken.",
    False: "It was trained with all of them kept: the first k\ndecode too, but poorly.",
}


def card(config: Mapping[str, Any], formats: Sequence[str]) -> str:
    """Write a bundle's README.md.

    Args:
        config: Its config.json.
        formats: What was exported.
    """
    kind = config["modality"]
    bits = config["bits_per_token"]
    own = {"audio": _of_sound, "image": _of_image}.get(kind, _of_clip)
    about, onnx, stream = {
        "audio": (SOUND, ONNX_SOUND, STREAM),
        "image": (IMAGE, ONNX_IMAGE, ""),
    }.get(kind, (BLOCKS if config["tokens"] else CLIP, ONNX_CLIP, STREAM_CLIP))
    fills = {
        "books": config["code_rows"],
        "bits": bits,
        "version": __version__,
        "ranges": _ranges(config["book_sizes"]),
        **own(config),
        **{name: config[name] for name in ("tokens", "channels", "quantizer", "code_type", "format_version")},
    }
    parts = {"onnx": onnx, "onnx_int8": INT8, "torchscript": TORCHSCRIPT, "safetensors": SAFETENSORS}
    if config.get("streaming"):
        parts["onnx"] += stream
    told = [text for name, text in parts.items() if name in formats]
    return "".join([FRONT, about, CHECKS, *told]).format(kind=kind, **fills)


def _of_image(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say what only a card of images has."""
    side, tokens, bits = config["image_size"], config["tokens"], config["bits_per_token"]
    some = max(1, tokens // 2)
    return {
        "side": side,
        "some": some,
        "shape": f"{side}, {side}",
        "prefix": f"[..., :{some}]",
        "rows": "\n".join(f"| {k} | {k * bits:.6g} | {k * bits / side**2:.3g} |" for k in ladder(tokens)),
        "order": ORDER[config["variable_length"]],
    }


def _of_sound(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say what only a card of sounds has."""
    frames = config["frame_rate"]
    price, some = _prices(config)
    return {
        "rate": config["sampling_rate"],
        "frames": frames,
        "hop": config["hop_length"],
        "latency": config.get("streaming", {}).get("latency_ms", 0),
        "some": some,
        "shape": config["sampling_rate"],
        "prefix": f"[:, :{some}]",
        "rows": "\n".join(f"| {book} | {each * frames:.6g} |" for book, each in price.items()),
    }


def _of_clip(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say what only a card of clips has, of pixels or of features."""
    hop, tokens, later = config["hop"], config["tokens"], config.get("later_tokens", 0)
    price, some = _prices(config)
    height, width = config.get("frame_size", (64, 48))
    if tokens:
        price, some = {k: min(k, later) * config["bits_per_token"] for k in ladder(tokens)}, max(1, tokens // 2)
    pixels = hop[0] * height * width if tokens else math.prod(hop)
    fewer = f" Each\n  block but the first has {later} at most: its codes beyond them say nothing, and none is read."
    return {
        **_of_values(config, height, width),
        "later": fewer if later < tokens else "",
        "hop_t": hop[0],
        "hop_h": hop[1],
        "hop_w": hop[2],
        "lead": config["lead"],
        "first": (LED if config["lead"] else EVEN).format(hop_t=hop[0]),
        "side_h": height,
        "side_w": width,
        "order": ORDER[config["variable_length"]],
        "kept": "tokens" if tokens else "books",
        "some": some,
        "shape": f"9, {height}, {width}",
        "prefix": f"[..., :{some}]" if tokens else f"[:, :{some}]",
        "rows": "\n".join(f"| {kept} | {each / pixels:.3g} |" for kept, each in price.items()),
    }


def _of_values(config: Mapping[str, Any], height: int, width: int) -> dict[str, str]:
    """Say what the values of clips are, and how clips of zeros are written in an example."""
    c, names = config["channels"], NAMES[config["modality"]]
    own = {"signal_name": names.signal, "codes_name": names.codes}
    if config["value_range"] is None:
        clips = {f"clip_{t}": f"np.zeros((1, {c}, {t}, {height}, {width}), np.float32)" for t in (5, 9)}
        back = f"back = codec.decode(codes, (9, {height}, {width}))  # float32 (1, {c}, 9, {height}, {width})"
        return FEATURES | own | clips | {"back": back}
    clips = {f"clip_{t}": f"np.zeros(({t}, {height}, {width}, {c}), np.uint8)" for t in (5, 9)}
    size = f"9, {height}, {width}"
    return (
        PIXELS
        | own
        | clips
        | {"back": f"pixels = codec.pixels(codec.decode(codes, ({size})))  # uint8 (1, {size}, {c})"}
    )


def _prices(config: Mapping[str, Any]) -> tuple[dict[int, float], int]:
    """Give the bits of a token by the books that are kept, and a number of books for an example."""
    sizes, rows = config["book_sizes"], config["code_rows"]
    each = [math.log2(size) / stride for size, stride in zip(sizes, config["book_strides"], strict=True)]
    books = ladder(len(sizes)) if sizes else [rows]
    return {book: sum(each[:book]) if sizes else 32 * rows for book in books}, max(1, rows // 2) if sizes else rows


def _ranges(sizes: Sequence[int]) -> str:
    """Say what codes there are."""
    if not sizes:
        return "continuous latents, any values"
    listed = ", ".join(f"book {book}: 0 to {size - 1}" for book, size in enumerate(sizes))
    return listed + ("; a prefix of the books decodes too, coarser" if len(sizes) > 1 else "")
