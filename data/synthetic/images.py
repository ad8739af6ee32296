"""Synthetic images: dead leaves, which have the statistics of natural images and need no download."""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..batch import Key, Splits
from .base import SyntheticDataset

__all__ = ["DeadLeaves", "Leaves", "dead_leaves", "draw_leaves", "noise_fields", "paint"]

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Array = TypeVar("Array", Floats, Ints)

FINENESS = 2.5  # each image draws its minimum radius, up to this multiple of `least_radius`
MOST_RADIUS = 0.45  # as a share of the image's side
COVER = 3.0  # area of all leaves, as a share of the image's
FACES = 6  # maximum number of sides of a polygon
FIELDS, FIELD_SIDE = 4, 256  # number and side of the fields of 1/f noise from which textures are cropped
NATURAL_HUES = np.radians([55.0, 75.0, 95.0, 130.0, 235.0, 255.0])  # Oklab: skin, earth, straw, foliage, water, sky


@dataclass(eq=False, repr=False)
class DeadLeaves(SyntheticDataset):
    """A dataset of occluding, textured discs, ellipses and polygons: an endless stand-in for photographs.

    Radii have the density p(r) ~ r^-3, so images are scale-invariant like natural ones (Lee, Mumford and Huang, 2001,
    "Occlusion models for natural images"). Textures and correlated colors follow the variants of Baradad et al.
    (2021, "Learning to see by looking at noise"). The power spectrum falls like that of photographs.

    Args:
        image_size: Side, in pixels.
        least_radius: Radius of the smallest leaves, in pixels.
        length, seed, train: See `SyntheticDataset`.
    """

    image_size: int = 64
    least_radius: float = 2.0

    def __post_init__(self) -> None:
        self._fields = noise_fields(np.random.default_rng(self.seed))

    def __getitem__(self, key: Key) -> Tensor:
        """Generate the image of `(epoch, index)`: uint8 `(3, image_size, image_size)`."""
        canvas = paint(draw_leaves(self.chance(key), self.image_size, self.least_radius), self._fields, self.image_size)
        return torch.from_numpy(np.rint(255 * canvas.clip(0, 1)).astype(np.uint8))


def dead_leaves(
    image_size: Annotated[int, "[8, inf)"] = 64,
    length: int = 10_000,
    val_length: int = 256,
    seed: Annotated[int, "[0, inf)"] = 0,
    least_radius: Annotated[float, "[1, inf)"] = 2.0,
) -> Splits:
    """Build both splits of `DeadLeaves`, of `length` and `val_length` images."""
    protocol = f"made at {image_size} x {image_size} pixels; nothing else"
    form: dict[str, Any] = {"image_size": image_size, "least_radius": least_radius, "length": length, "seed": seed}
    return DeadLeaves.splits("dead leaves, {} synthetic images", protocol, val_length, **form)


class Leaves(NamedTuple):
    """Parameters of n leaves, from back to front; lengths in pixels, angles in radians."""

    center: Floats  # (n, 2), y and x
    radius: Floats  # (n, 2), half axes
    turn: Floats  # (n,), rotation
    faces: Floats  # (n, FACES, 3), unit normal (along, across) and distance of each side; unused by discs and ellipses
    reach: Floats  # (n,), distance of the farthest corner, as a multiple of the half axes
    polygon: npt.NDArray[np.bool_]  # (n,)
    soft: Floats  # (n,), width of the edge
    colors: Floats  # (n, 2, 3), sRGB in [0, 1]; the texture interpolates between both
    gradient: Floats  # (n, 2), change of the texture per pixel along y and x
    wave: Floats  # (n, 3), amplitude, cycles per pixel, phase
    grain: Floats  # (n,), amplitude of the noise
    field: Ints  # (n, 3), index of the noise field, and offset in it, y and x


def draw_leaves(rng: np.random.Generator, side: int, least_radius: float) -> Leaves:
    """Draw the leaves of one image; the first is the background, larger than the image."""
    largest = MOST_RADIUS * side
    least = min(least_radius * FINENESS ** rng.random(), largest / 2)
    mean_area = 2 * np.pi * least**2 * np.log(largest / least)
    n = 1 + max(3, round(COVER * side**2 / mean_area))
    # Inverse CDF of p(r) ~ r^-3 between the two bounds.
    radius = (least**-2 - rng.random(n) * (least**-2 - largest**-2)) ** -0.5
    radius[0] = 2 * side
    center = rng.uniform(-0.1 * side, 1.1 * side, (n, 2))
    center[0] = side / 2
    stretch = np.exp(rng.uniform(-0.6, 0.6, n) * (rng.random(n) < 0.7))  # the others are discs or regular
    light = rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.5, n)  # direction of a common light
    slope = rng.exponential(0.25, n) / radius.clip(max=0.5 * side)
    far = np.linspace(1, 0, n) * rng.exponential(0.8)  # leaves at the back are out of focus
    faces, reach = _faces(rng, n)
    polygon = rng.random(n) < 0.5
    polygon[0] = False
    arrays = {
        "center": center,
        "radius": radius[:, None] * np.stack([stretch, 1 / stretch], 1),
        "turn": rng.uniform(0, np.pi, n),
        "faces": faces,
        "reach": np.where(polygon, reach, 1),
        "soft": 1.2 + far * (radius > 2 * least),
        "colors": _colors(rng, n),
        "gradient": slope[:, None] * np.stack([np.sin(light), np.cos(light)], 1),
        "wave": np.stack(
            [
                rng.uniform(0.1, 0.5, n) * (rng.random(n) < 0.25),
                (rng.uniform(0.5, 3, n) / radius).clip(0.04, 0.25),
                rng.uniform(0, 2 * np.pi, n),
            ],
            1,
        ),
        "grain": rng.exponential(0.12, n),
    }
    field = rng.integers(0, (FIELDS, FIELD_SIDE, FIELD_SIDE), (n, 3), dtype=np.int32)
    return Leaves(polygon=polygon, field=field, **{name: a.astype(np.float32) for name, a in arrays.items()})


def _faces(rng: np.random.Generator, n: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Draw convex polygons around the origin: sides `(n, FACES, 3)`, and a bound on the farthest corner `(n,)`."""
    count = rng.integers(3, FACES + 1, n)
    number = np.arange(FACES) % count[:, None]  # a polygon of fewer sides repeats its first ones
    wobble = 0.15 * (rng.random(n) < 0.5)  # the others are regular
    turns = wobble[:, None] * rng.uniform(-1, 1, (n, FACES))
    angle = 2 * np.pi * number / count[:, None] + np.take_along_axis(turns, number, 1)
    faces = np.stack([np.cos(angle), np.sin(angle), np.full_like(angle, 0.85)], 2)
    return faces, 0.85 / np.cos(np.pi / count + wobble)


def _colors(rng: np.random.Generator, n: int) -> Floats:
    """Draw two related colors per leaf from a common palette: `(n, 2, 3)`, sRGB in [0, 1].

    They are drawn in Oklab (Ottosson, 2020), a perceptually uniform space. Lightness varies most; hue and chroma vary
    little and together, as in photographs.
    """
    anchors = 4
    hue = rng.choice(NATURAL_HUES, anchors) + rng.normal(0, 0.25, anchors)
    chroma = rng.uniform(0.01, 0.13, anchors)
    kind = rng.choice(anchors, n, p=rng.dirichlet(np.full(anchors, 1.5)))
    light = rng.uniform(0.4, 0.75) + rng.uniform(0.12, 0.25) * rng.normal(0, 1, (n, 1))
    light = light + rng.normal(0, 0.12, (n, 1)) * (-1, 1)
    hues = hue[kind, None] + rng.normal(0, 0.15, (n, 2))
    # Chroma must vanish at black and white.
    chromas = (chroma[kind, None] * rng.uniform(0.6, 1.3, (n, 2))) * (1 - (2 * light.clip(0, 1) - 1) ** 2) ** 0.5
    lab = np.stack([light.clip(0.05, 0.98), chromas * np.cos(hues), chromas * np.sin(hues)], 2)
    linear = ((lab @ OKLAB_TO_LMS) ** 3 @ LMS_TO_RGB).clip(0, 1)
    colors: Floats = np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return colors


OKLAB_TO_LMS = np.array([
    [1.0, 1.0, 1.0],
    [0.3963377774, -0.1055613458, -0.0894841775],
    [0.2158037573, -0.0638541728, -1.2914855480],
])  # fmt: skip
LMS_TO_RGB = np.array([
    [4.0767416621, -1.2684380046, -0.0041960863],
    [-3.3077115913, 2.6097574011, -0.7034186147],
    [0.2309699292, -0.3413193965, 1.7076147010],
])  # fmt: skip


def noise_fields(rng: np.random.Generator) -> Floats:
    """Generate periodic fields of 1/f noise with a variance of 1: `(FIELDS, FIELD_SIDE, FIELD_SIDE)`."""
    white = np.fft.rfft2(rng.normal(size=(FIELDS, FIELD_SIDE, FIELD_SIDE)))
    down, right = np.fft.fftfreq(FIELD_SIDE)[:, None], np.fft.rfftfreq(FIELD_SIDE)
    # The lowest frequencies are attenuated: they would tint a leaf rather than texture it.
    pink = np.fft.irfft2(white / np.hypot(np.hypot(down, right), 4 / FIELD_SIDE), s=(FIELD_SIDE, FIELD_SIDE))
    pink -= pink.mean((1, 2), keepdims=True)
    fields: Floats = (pink / pink.std((1, 2), keepdims=True)).astype(np.float32)
    return fields


def paint(leaves: Leaves, fields: Floats, side: int) -> Floats:
    """Render leaves from back to front: `(3, side, side)`.

    The pixels of all leaves are concatenated in one flat array, so that each NumPy function is called once.
    """
    low, high = _boxes(leaves, side)
    height, width = (high - low).T
    sizes = height * width
    ends = sizes.cumsum(dtype=np.int32)

    def each(values: Array) -> Array:
        """Repeat the leaves' values for each of their pixels: `(..., n)` -> `(..., pixels)`."""
        return np.repeat(values, sizes, axis=-1)

    within = np.arange(sizes.sum(), dtype=np.int32) - each(ends - sizes)
    row = within // each(width)
    y, x = row + each(low[:, 0]), within - row * each(width) + each(low[:, 1])
    dy = y.astype(np.float32) - each(leaves.center[:, 0])
    dx = x.astype(np.float32) - each(leaves.center[:, 1])
    cos, sin = each(np.cos(leaves.turn)), each(np.sin(leaves.turn))
    along, across = cos * dx + sin * dy, cos * dy - sin * dx
    alpha = (0.5 - _distance(leaves, sizes, along, across) / each(leaves.soft)).clip(0, 1)

    number, top, left = leaves.field.T
    texel = (y + each(top)) % FIELD_SIDE * FIELD_SIDE + (x + each(left)) % FIELD_SIDE
    grain = each(leaves.grain) * fields.ravel().take(texel + each(number * FIELD_SIDE**2))
    amplitude, cycles, phase = leaves.wave.T
    wave = each(amplitude) * np.sin(each(2 * np.pi * cycles) * along + each(phase))
    tilt = each(leaves.gradient[:, 0]) * dy + each(leaves.gradient[:, 1]) * dx
    first, second = leaves.colors.transpose(1, 2, 0)
    color = each(first) + each(second - first) * (0.5 + tilt + wave + grain).clip(-0.5, 1.5)

    canvas: Floats = np.zeros((3, side, side), np.float32)
    for (y0, x0), (y1, x1), end, size in zip(low.tolist(), high.tolist(), ends.tolist(), sizes.tolist(), strict=True):
        patch = canvas[:, y0:y1, x0:x1]
        over = alpha[end - size : end].reshape(patch.shape[1:])
        patch += over * (color[:, end - size : end].reshape(patch.shape) - patch)
    return canvas


def _boxes(leaves: Leaves, side: int) -> tuple[Ints, Ints]:
    """Return the bounding box of each leaf, first pixel and end (exclusive), y and x: two arrays `(n, 2)`."""
    cos, sin = np.cos(leaves.turn), np.sin(leaves.turn)
    down = np.hypot(leaves.radius[:, 0] * sin, leaves.radius[:, 1] * cos)
    right = np.hypot(leaves.radius[:, 0] * cos, leaves.radius[:, 1] * sin)
    reach = np.stack([down, right], 1) * leaves.reach[:, None] + leaves.soft[:, None]
    low = np.floor(leaves.center - reach).clip(0, side).astype(np.int32)
    high = np.ceil(leaves.center + reach + 1).clip(0, side).astype(np.int32)
    return low, high


def _distance(leaves: Leaves, sizes: Ints, along: Floats, across: Floats) -> Floats:
    """Compute the signed distance of each pixel to its leaf's edge in pixels, negative inside; exact near the edge."""
    scale = 1 / leaves.radius
    scale_u, scale_v = np.repeat(scale.T, sizes, axis=1)
    u, v = along * scale_u, across * scale_v
    level = np.sqrt(u * u + v * v) + 1e-6
    # To first order, the distance to a level set is the function's value over its gradient's norm.
    steepness = np.sqrt((u * scale_u) ** 2 + (v * scale_v) ** 2)
    distance: Floats = level * (level - 1) / (steepness + 1e-6)
    angular = np.repeat(leaves.polygon, sizes)
    u, v, sizes = u[angular], v[angular], sizes[leaves.polygon]
    inside = np.full(len(u), -np.inf, np.float32)
    for face in np.moveaxis(leaves.faces[leaves.polygon], 1, 0):
        steep = np.hypot(*(face[:, :2] * scale[leaves.polygon]).T)  # 1/pixels
        normal_u, normal_v, level_at = np.repeat((face / steep[:, None]).T, sizes, axis=1)
        np.maximum(inside, normal_u * u + normal_v * v - level_at, out=inside)
    distance[angular] = inside
    return distance
