"""Clips made from nothing: dead leaves that move, before a camera that moves too; no download."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from varitok import UserError, require_min

from ..batch import Key, Splits
from .base import SyntheticDataset
from .images import FIELD_SIDE, Floats, Leaves, draw_leaves, noise_fields, paint

__all__ = ["Motion", "Scenes", "scenes"]

STILL = 0.15  # share of the clips whose camera stands still
OWN = 0.35  # share of the leaves that go their own way


class Motion:
    """How the leaves of a scene move: each has a place, a turn and a size at each moment.

    The camera pans and zooms; what lies in front moves more than what lies behind (parallax). Some leaves also go their
    own way, on a line or swinging, and turn.

    Args:
        rng: Source of all chance.
        count: Leaves.
        side: Of the frames, in pixels.
        speed: Of the fastest pan, in sides of the frame a second.
    """

    def __init__(self, rng: np.random.Generator, count: int, side: int, speed: float) -> None:
        still = rng.random() < STILL
        angle = rng.uniform(0, 2 * np.pi)
        pan = (0 if still else side * speed * rng.random()) * np.array([np.sin(angle), np.cos(angle)])
        near = np.linspace(rng.uniform(0.4, 1), 1, count)[:, None]
        goes = (rng.random((count, 1)) < OWN) & (np.arange(count)[:, None] > 0)  # the ground stays
        self.side = side
        self.velocity = near * pan + goes * rng.normal(0, 0.25 * speed * side, (count, 2))
        self.swing = goes * (rng.random((count, 1)) < 0.3) * rng.normal(0, 0.08 * side, (count, 2))
        self.rate, self.phase = rng.uniform(0.3, 1.5), rng.uniform(0, 2 * np.pi, (count, 1))
        self.spin = goes[:, 0] * rng.normal(0, 0.8, count)
        self.zoom = 0.0 if still else rng.normal(0, 0.15)  # in e-folds a second
        self.light = rng.normal(0, 0.05) * (rng.random() < 0.3)  # change of brightness a second

    def at(self, leaves: Leaves, seconds: float) -> Leaves:
        """Give the leaves as they are at a moment; at 0 they are where they were drawn."""
        scale = np.exp(self.zoom * seconds)
        turn = 2 * np.pi * self.rate * seconds
        shift = self.velocity * seconds + self.swing * (np.sin(turn + self.phase) - np.sin(self.phase))
        middle = self.side / 2
        center = middle + scale * (leaves.center + shift - middle)
        field = leaves.field.copy()
        field[:, 1:] -= np.rint(center - leaves.center).astype(np.int32)  # a surface goes with its leaf
        field[:, 1:] %= FIELD_SIDE
        return leaves._replace(
            center=center.astype(np.float32),
            radius=(leaves.radius * scale).astype(np.float32),
            turn=(leaves.turn + self.spin * seconds).astype(np.float32),
            field=field,
        )


class Scenes(SyntheticDataset):
    """Moving dead leaves: an endless stand-in for clips, with pans, zooms, occlusion, turning and swinging things.

    Args:
        frames: Of a clip.
        image_size: Side, in pixels.
        frame_rate: Frames a second.
        length: Clips of an epoch.
        seed: Seed of all chance.
        train: Each epoch has new clips; otherwise all have the same ones, and none of training's.
        least_radius: Of the finest leaves, in pixels.
        speed: Of the fastest pan, in sides of the frame a second.

    Raises:
        UserError: A number is out of range.
    """

    def __init__(
        self,
        frames: int = 17,
        image_size: int = 64,
        frame_rate: float = 8.0,
        length: int = 10_000,
        seed: int = 0,
        train: bool = True,
        least_radius: float = 4.0,
        speed: float = 0.5,
    ) -> None:
        require_min({"data.frames": (frames, 1), "data.image_size": (image_size, 8)})
        require_min({"data.least_radius": (least_radius, 1), "data.speed": (speed, 0)})
        super().__init__(length, seed, train)
        if not frame_rate > 0:
            raise UserError(f"data.frame_rate={frame_rate}: must be above 0")
        self.frames = frames
        self.image_size = image_size
        self.frame_rate = frame_rate
        self.least_radius = least_radius
        self.speed = speed
        self._fields = noise_fields(np.random.default_rng(seed))

    def __getitem__(self, key: Key) -> Tensor:
        """Make the clip of `(epoch, index)`: uint8 `(3, frames, image_size, image_size)`.

        Raises:
            IndexError: There is no such index.
        """
        leaves, motion = self.draw(key)
        clip = np.stack([self._frame(leaves, motion, number) for number in range(self.frames)], axis=1)
        return torch.from_numpy(np.rint(clip).astype(np.uint8))

    def draw(self, key: Key) -> tuple[Leaves, Motion]:
        """Draw the leaves of a clip, as they are in its first frame, and how they move.

        Raises:
            IndexError: There is no such index.
        """
        rng = self.chance(key)
        leaves = draw_leaves(rng, self.image_size, self.least_radius)
        # The ground is below the camera wherever it pans to, and of one light.
        leaves.radius[0] *= 4
        leaves.gradient[0] /= 8
        return leaves, Motion(rng, len(leaves.turn), self.image_size, self.speed)

    def _frame(self, leaves: Leaves, motion: Motion, number: int) -> Floats:
        """Paint a frame, in [0, 255]."""
        seconds = number / self.frame_rate
        canvas = paint(motion.at(leaves, seconds), self._fields, self.image_size)
        bright: Floats = 255 * (canvas + np.float32(motion.light * seconds)).clip(0, 1)
        return bright


def scenes(
    image_size: int = 64,
    crop_tokens: int = 5,
    downsample: int = 4,
    causal_pad: int = 3,
    frame_rate: float = 8.0,
    length: int = 10_000,
    val_length: int = 32,
    seed: int = 0,
    least_radius: float = 4.0,
    speed: float = 0.5,
) -> Splits:
    """Make both splits of `Scenes`, of `length` and `val_length` clips of `crop_tokens` latent frames.

    Args:
        image_size: See `Scenes`.
        crop_tokens: Length of a clip in latent frames.
        downsample: Frames of a latent frame.
        causal_pad: Copies of the first frame that the codec puts before it.
        frame_rate: See `Scenes`.
        length: Training clips of an epoch; each epoch has new ones.
        val_length: Clips to evaluate on, the same at all times.
        seed: Seed of all chance.
        least_radius: See `Scenes`.
        speed: See `Scenes`.

    Raises:
        UserError: A number is out of range.
    """
    frames = crop_tokens * downsample - causal_pad
    protocol = f"made at {image_size} x {image_size} pixels, {frames} frames at {frame_rate:g} a second"
    form: dict[str, Any] = {"frames": frames, "image_size": image_size, "frame_rate": frame_rate}
    form |= {"least_radius": least_radius, "speed": speed}
    return Scenes.splits(length, val_length, "scenes, {} synthetic clips", protocol, seed, **form)
