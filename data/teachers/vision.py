"""Vision teachers: of images, and of clips frame by frame."""

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from ..batch import normalize
from ..feature_map import FeatureMap
from .base import Layer, Teacher, check_layer, layer_of, load_pretrained

__all__ = ["FrameTeacher", "RandomTeacher", "VisionTransformer"]

IMAGENET_MEAN, IMAGENET_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of each color, in [0, 1]
RESAMPLING: dict[Any, str] = {2: "bilinear", 3: "bicubic"}  # by Pillow's constants


class FrameTeacher(Teacher):
    """A teacher of images, applied to clips frame by frame.

    Attributes:
        patch: Patch size in pixels, which divides the sides of the images.
        size: Height and width in pixels to which images are resized first; None keeps theirs.
        mode: Interpolation mode of the resizing.
        layer_channels: Number of channels of each of the `layers`.
    """

    patch: int
    size: tuple[int, int] | None = None
    mode: str = "bilinear"
    layer_channels: tuple[int, ...]
    mean: Tensor
    deviation: Tensor

    @abstractmethod
    def encode_frames(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute features `(n, c, h', w')` and pooled `(n, d)` of frames `(n, 3, h, w)` in [-1, 1]."""

    @abstractmethod
    def encode_layers(self, frames: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Compute features `(n, c, h', w')` of each layer, first to last, and pooled `(n, d)`, of frames."""

    def layers(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Compute the features of each layer of images `(b, 3, h, w)`, and the pooled vector.

        Raises:
            UserError: The patch size doesn't divide height and width.
        """
        return self.encode_layers(self._fit(normalize(images)))

    def set_statistics(self, mean: Sequence[float], deviation: Sequence[float]) -> None:
        """Set the mean and the standard deviation of each color of the training pixels, in [0, 1]."""
        self.register_buffer("mean", torch.tensor(list(mean)).reshape(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(list(deviation)).reshape(3, 1, 1))

    def pixels(self, frames: Tensor) -> Tensor:
        """Normalize frames in [-1, 1] with the mean and standard deviation of the training pixels."""
        return ((frames + 1) / 2 - self.mean) / self.deviation

    def resize(self, frames: Tensor, size: tuple[int, int]) -> Tensor:
        """Resize frames `(n, 3, h, w)` to `size`, antialiased."""
        return functional.interpolate(frames, list(size), mode=self.mode, antialias=True)

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> FeatureMap:
        """Compute the features of images or clips; see `Teacher.forward`.

        Raises:
            UserError: The patch size doesn't divide height and width.
        """
        frames = normalize(signal)
        clips = frames.ndim == 5
        if clips:
            frames = frames.transpose(1, 2).flatten(0, 1)  # (b, 3, t, h, w) -> (b t, 3, h, w)
        sides = frames.shape[2:]
        values, pooled = self.encode_frames(self._fit(frames))
        steps = tuple(side / count for side, count in zip(sides, values.shape[2:], strict=True))
        if not clips:
            return FeatureMap(values, steps, pooled=pooled)
        values = values.reshape(len(signal), -1, *values.shape[1:]).transpose(1, 2)  # (b t, c, ...) -> (b, c, t, ...)
        found = FeatureMap(values, (1.0, *steps), lengths)
        if pooled is None:
            return found
        together = FeatureMap(pooled.reshape(len(signal), -1, pooled.shape[1]).transpose(1, 2), (1.0,), lengths)
        return found._replace(pooled=together.mean())

    def _fit(self, frames: Tensor) -> Tensor:
        """Resize frames to `size`, and check that the patch divides them."""
        if self.size is not None and tuple(frames.shape[2:]) != self.size:
            frames = self.resize(frames, self.size)
        rows, columns = frames.shape[2], frames.shape[3]
        if rows % self.patch or columns % self.patch:
            raise UserError(
                f"{columns} x {rows} pixels aren't multiples of the teacher's patch, {self.patch}; give the data"
                " another image_size, or the teacher a size"
            )
        return frames


class RandomTeacher(FrameTeacher):
    """A convolutional network of fixed random weights: a stand-in without pretrained weights, hence without semantics.

    Args:
        channels: Number of feature channels.
        patch: Patch size in pixels, the stride of the feature map; a power of two.

    Raises:
        UserError: `patch` isn't a power of two.
    """

    def __init__(self, channels: int = 64, patch: Annotated[int, "[2, inf)"] = 8) -> None:
        super().__init__()
        halvings = patch.bit_length() - 1
        if patch != 1 << halvings:
            raise UserError(f"data.teacher.patch={patch}: must be a power of two")
        self.name = f"a stand-in of random weights ({channels} channels, patch {patch})"
        self.channels = channels
        self.patch = patch
        generator = torch.Generator().manual_seed(0)
        widths = [3, *(16 << level for level in range(halvings - 1)), channels]
        self.layer_channels = tuple(widths[1:])
        self.weights = nn.ParameterList(
            torch.randn(wide, narrow, 4, 4, generator=generator) * (2 / (16 * narrow)) ** 0.5
            for narrow, wide in pairwise(widths)
        ).requires_grad_(False)

    def encode_frames(self, frames: Tensor) -> tuple[Tensor, None]:
        """Compute the features of frames; see `FrameTeacher.encode_frames`."""
        return self.encode_layers(frames)[0][-1], None

    def encode_layers(self, frames: Tensor) -> tuple[list[Tensor], None]:
        """Compute the features of each convolution; see `FrameTeacher.encode_layers`."""
        x, found = frames, []
        for level, weight in enumerate(self.weights):
            # With zero padding, the border would be the strongest feature.
            x = functional.pad(functional.relu(x) if level else x, (1, 1, 1, 1), mode="replicate")
            x = functional.conv2d(x, weight, stride=2)
            found.append(x)
        return found, None


class VisionTransformer(FrameTeacher):
    """A vision transformer of the package `transformers`: ViT, DeiT, DINOv2, the vision encoders of CLIP and SigLIP.

    Its features are the hidden states of the patches, without class or register tokens. `pooled` is the vector of the
    whole image, in CLIP the one compared with texts. For Theia, put its model.safetensors beside the config.json
    of its backbone (facebook/deit-base-patch16-224), and set prefix "backbone.model.".

    Args:
        folder: Folder of config.json and the weights: a path, or a name below one of `weights.weight_folders`.
        prefix: Prefix of the parameter names, if the file contains more than the transformer.
        layer: Layer whose hidden states are the features.
        size: Side, or height and width, in pixels to which images are resized first; None keeps theirs, which the
            patch must divide.
        mean: Mean of each color in its training data, in [0, 1]; None for preprocessor_config.json's, or ImageNet's.
        deviation: Standard deviation of each color; None as for `mean`.

    Raises:
        UserError: `load_pretrained` fails, or the network isn't a complete vision transformer.
    """

    def __init__(
        self,
        folder: str,
        prefix: str = "",
        layer: Layer = "last",
        size: int | Sequence[int] | None = None,
        mean: Annotated[Sequence[float] | None, "(-inf, inf)"] = None,
        deviation: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        found = load_pretrained(
            folder, "a vision transformer, such as facebook/dinov2-base or google/siglip-base-patch16-224", prefix
        )
        whole = found.network
        network = getattr(whole, "vision_model", whole)  # the vision encoder of CLIP or SigLIP
        # Parameters missing in the file are silently random; only those of a pooler may be missing.
        missing = [name for name in found.missing if "pooler" not in name]
        patch = getattr(network.config, "patch_size", None)
        if missing or not isinstance(patch, int):
            reason = f"{len(missing)} weights are missing, {missing[0]} first" if missing else "it has no patch_size"
            raise UserError(f"{found.folder}: not a complete vision transformer, {reason}; see the teacher's prefix")
        self.network: nn.Module = network.eval().requires_grad_(False)
        self.pools = not found.missing
        self.project = whole.visual_projection.requires_grad_(False) if hasattr(whole, "visual_projection") else None
        self.name = found.folder.name
        self.patch = patch
        self.channels = int(network.config.hidden_size)
        if self.pools:
            self.pooled_channels = self.channels if self.project is None else int(self.project.out_features)
        self.layer = check_layer(layer, network)
        self.layer_channels = (self.channels,) * (int(network.config.num_hidden_layers) + 1)
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            self.size = height, width
        self.mode = RESAMPLING.get(found.processor.get("resample"), "bicubic")
        self.set_statistics(
            mean or found.processor.get("image_mean", IMAGENET_MEAN),
            deviation or found.processor.get("image_std", IMAGENET_DEVIATION),
        )
        # Some accept frames of any size, others only with this argument.
        known = inspect.signature(network.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in known else {}

    def encode_frames(self, frames: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the features of frames; see `FrameTeacher.encode_frames`."""
        output = self._run(frames)
        return self._on_grid(layer_of(output, self.layer), frames), self._pool(output)

    def encode_layers(self, frames: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Compute all hidden states of frames, the first layer's input included; see `FrameTeacher.encode_layers`."""
        output = self._run(frames)
        return [self._on_grid(hidden, frames) for hidden in output.hidden_states], self._pool(output)

    def _run(self, frames: Tensor) -> Any:
        return self.network(pixel_values=self.pixels(frames), output_hidden_states=True, **self.options)

    def _on_grid(self, hidden: Tensor, frames: Tensor) -> Tensor:
        """Place the hidden states of the patches on their grid."""
        rows, columns = frames.shape[2] // self.patch, frames.shape[3] // self.patch
        # (n, rows columns, c) -> (n, c, rows, columns)
        return hidden[:, -rows * columns :].transpose(1, 2).reshape(len(frames), -1, rows, columns).float()

    def _pool(self, output: Any) -> Tensor | None:
        pooled = output.pooler_output if self.pools else None
        if pooled is not None:
            pooled = (pooled if self.project is None else self.project(pooled)).float()
        return pooled
