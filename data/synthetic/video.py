"""Synthetic clips: moving dead leaves and a moving camera; needs no download."""

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from varitok import UserError

from ..batch import Key, Splits
from .images import FIELD_SIDE, DeadLeaves, Floats, Leaves, draw_leaves, paint

__all__ = ["Motion", "Scenes", "clip_frames", "scenes"]

STILL = 0.15  # share of clips with a static camera
OWN = 0.35  # share of leaves with their own motion


class Motion:
    """The motion of the leaves of a scene: position, rotation and scale as functions of time.

    The camera pans and zooms; near leaves move more than far ones (parallax). Some leaves also move by themselves:
    they translate, oscillate and rotate.

    Args:
        rng: Random generator.
        count: Number of leaves.
        side: Side of the frames, in pixels.
        speed: Maximum speed of the pan, in frame sides per second.
    """

    def __init__(self, rng: np.random.Generator, count: int, side: int, speed: float) -> None:
        still = rng.random() < STILL
        angle = rng.uniform(0, 2 * np.pi)
        pan = (0 if still else side * speed * rng.random()) * np.array([np.sin(angle), np.cos(angle)])
        near = np.linspace(rng.uniform(0.4, 1), 1, count)[:, None]
        goes = (rng.random((count, 1)) < OWN) & (np.arange(count)[:, None] > 0)  # not the background
        self.side = side
        self.velocity = near * pan + goes * rng.normal(0, 0.25 * speed * side, (count, 2))
        self.swing = goes * (rng.random((count, 1)) < 0.3) * rng.normal(0, 0.08 * side, (count, 2))
        self.rate, self.phase = rng.uniform(0.3, 1.5), rng.uniform(0, 2 * np.pi, (count, 1))
        self.spin = goes[:, 0] * rng.normal(0, 0.8, count)
        self.zoom = 0.0 if still else rng.normal(0, 0.15)  # rate in e-folds per second
        self.light = rng.normal(0, 0.05) * (rng.random() < 0.3)  # change of brightness per second

    def at(self, leaves: Leaves, seconds: float) -> Leaves:
        """Return the leaves after `seconds` seconds; at 0 they are unchanged."""
        scale = np.exp(self.zoom * seconds)
        turn = 2 * np.pi * self.rate * seconds
        shift = self.velocity * seconds + self.swing * (np.sin(turn + self.phase) - np.sin(self.phase))
        middle = self.side / 2
        center = middle + scale * (leaves.center + shift - middle)
        field = leaves.field.copy()
        field[:, 1:] -= np.rint(center - leaves.center).astype(np.int32)  # a texture moves with its leaf
        field[:, 1:] %= FIELD_SIDE
        return leaves._replace(
            center=center.astype(np.float32),
            radius=(leaves.radius * scale).astype(np.float32),
            turn=(leaves.turn + self.spin * seconds).astype(np.float32),
            field=field,
        )


@dataclass(eq=False, repr=False)
class Scenes(DeadLeaves):
    """A dataset of moving dead leaves, with pans, zooms, occlusion, rotation and oscillation: a stand-in for clips.

    Args:
        frames: Frames per clip.
        frame_rate: Frames per second.
        speed: Maximum speed of the pan, in frame sides per second.
        image_size, least_radius, length, seed, train: See `DeadLeaves`.
    """

    least_radius: float = 4.0
    frames: int = 17
    frame_rate: float = 8.0
    speed: float = 0.5

    def __getitem__(self, key: Key) -> Tensor:
        """Generate the clip of `(epoch, index)`: uint8 `(3, frames, image_size, image_size)`."""
        leaves, motion = self.draw(key)
        clip = np.empty((3, self.frames, self.image_size, self.image_size), np.uint8)
        for number in range(self.frames):
            clip[:, number] = np.rint(self._frame(leaves, motion, number))
        return torch.from_numpy(clip)

    def draw(self, key: Key) -> tuple[Leaves, Motion]:
        """Draw the leaves of a clip in its first frame, and their motion."""
        rng = self.chance(key)
        leaves = draw_leaves(rng, self.image_size, self.least_radius)
        # The background covers the whole range of the pan, with almost uniform lighting.
        leaves.radius[0] *= 4
        leaves.gradient[0] /= 8
        return leaves, Motion(rng, len(leaves.turn), self.image_size, self.speed)

    def _frame(self, leaves: Leaves, motion: Motion, number: int) -> Floats:
        """Render a frame: `(3, image_size, image_size)` in [0, 255]."""
        seconds = number / self.frame_rate
        canvas = paint(motion.at(leaves, seconds), self._fields, self.image_size)
        bright: Floats = 255 * (canvas + np.float32(motion.light * seconds)).clip(0, 1)
        return bright


def clip_frames(key: str, tokens: int, downsample: int, causal_pad: int) -> int:
    """Return the frames of a clip: latent frames times `downsample`, without the `causal_pad` copies before the first.

    Raises:
        UserError: No frame is left; `key` names the number of latent frames.
    """
    frames = tokens * downsample - causal_pad
    if frames < 1:
        raise UserError(f"data.{key}={tokens}: must be at least {causal_pad // downsample + 1}")
    return frames


def scenes(
    image_size: Annotated[int, "[8, inf)"] = 64,
    crop_tokens: int = 5,
    downsample: int = 4,
    causal_pad: Annotated[int, "[0, inf)"] = 3,
    frame_rate: Annotated[float, "(0, inf)"] = 8.0,
    length: int = 10_000,
    val_length: int = 32,
    seed: Annotated[int, "[0, inf)"] = 0,
    least_radius: Annotated[float, "[1, inf)"] = 4.0,
    speed: float = 0.5,
) -> Splits:
    """Build both splits of `Scenes`, of `length` and `val_length` clips of `crop_tokens` latent frames.

    A clip has crop_tokens * downsample - causal_pad frames; the codec prepends `causal_pad` copies of the first one.

    Raises:
        UserError: No frame is left.
    """
    frames = clip_frames("crop_tokens", crop_tokens, downsample, causal_pad)
    protocol = f"made at {image_size} x {image_size} pixels, {frames} frames at {frame_rate:g} a second"
    form: dict[str, Any] = {"frames": frames, "frame_rate": frame_rate, "speed": speed, "image_size": image_size}
    form |= {"least_radius": least_radius, "length": length, "seed": seed}
    return Scenes.splits("scenes, {} synthetic clips", protocol, val_length, **form)
