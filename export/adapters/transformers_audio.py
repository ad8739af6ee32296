"""Adapter from audio bundles to the audio tokenizers of the library transformers, registered with its Auto classes."""

from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig
from transformers.modeling_utils import PreTrainedAudioTokenizerBase
from transformers.utils import cached_file

from varitok import UserError

from ..exporters.rebuild import WEIGHTS, frozen_of, rebuild, shapes_of
from ..runtime.bundle import read_config

__all__ = ["AudioOutput", "VaritokAudioConfig", "VaritokAudioTokenizer"]

PREFIX = "codec."


class AudioOutput(NamedTuple):
    """Output of `VaritokAudioTokenizer`.

    Attributes:
        audio_codes: int64 `(b, codebooks, n)`; None after `decode`.
        audio_values: `(b, channels, samples)`; None after `encode`.
    """

    audio_codes: Tensor | None = None
    audio_values: Tensor | None = None


class VaritokAudioConfig(PretrainedConfig):
    """A bundle's config.json under the names of transformers' audio codecs.

    Args:
        bundle: Parsed config.json of the bundle.
        kwargs: Arguments of `PretrainedConfig`.
    """

    model_type = "varitok_audio"

    def __init__(self, bundle: dict[str, Any] | None = None, **kwargs: Any) -> None:
        about = bundle or {}
        self.bundle = about
        for name in ("sampling_rate", "hop_length", "frame_rate"):
            setattr(self, name, about.get(name))
        self.audio_channels = about.get("channels")
        sizes = about.get("codebook_sizes") or [None]
        self.num_quantizers, self.codebook_size = len(sizes), sizes[0]
        super().__init__(**{name: value for name, value in kwargs.items() if name not in vars(self)})


class VaritokAudioTokenizer(PreTrainedAudioTokenizerBase):
    """An audio codec for transformers; `from_bundle` and `from_pretrained` build it.

    Args:
        config: Configuration, with the architecture in its `bundle`.
        weights: Shape of each weight.

    Raises:
        UserError: `weights` is missing, or the codec can't be built.
    """

    config_class = VaritokAudioConfig
    main_input_name = "input_values"

    def __init__(self, config: VaritokAudioConfig, weights: dict[str, tuple[int, ...]] | None = None) -> None:
        super().__init__(config)
        if weights is None:
            raise UserError("VaritokAudioTokenizer: build it with from_bundle or from_pretrained")
        self.codec = frozen_of(config.bundle, weights)

    @classmethod
    def from_bundle(cls, path: str | PathLike[str]) -> "VaritokAudioTokenizer":
        """Load a bundle's folder.

        Raises:
            UserError: The folder is not a bundle of a discrete audio codec, or a file is missing or altered.
        """
        config = read_config(Path(path))
        if config.get("modality") != "audio" or not config.get("codebook_sizes"):
            raise UserError(f"{path}: not a bundle of an audio codec with codebooks")
        codec = rebuild(path)
        state = codec.state_dict()
        model = cls(VaritokAudioConfig(config), {name: tuple(value.shape) for name, value in state.items()})
        model.codec.load_state_dict(state)
        model.eval()
        return model

    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], *args: Any, **options: Any) -> "VaritokAudioTokenizer":
        """Load the output of `save_pretrained` from a folder or the hub.

        The codec is built before its weights are loaded, as its non-persistent buffers are computed, not stored.
        """
        config = options.pop("config", None) or VaritokAudioConfig.from_pretrained(name)
        known = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
        path = cached_file(str(name), WEIGHTS, **{key: value for key, value in options.items() if key in known})
        shapes = {key.removeprefix(PREFIX): shape for key, shape in shapes_of(Path(str(path))).items()}
        model = cls(config, shapes)
        model.codec.load_state_dict({key.removeprefix(PREFIX): value for key, value in load_file(str(path)).items()})
        model.eval()
        return model

    def encode(
        self, input_values: Tensor, padding_mask: Tensor | None = None, num_quantizers: int | None = None, **_: Any
    ) -> AudioOutput:
        """Encode waveforms.

        Args:
            input_values: `(b, channels, samples)` at the configuration's sampling rate, in [-1, 1].
            padding_mask: `(b, samples)`, 1 for valid samples and 0 for padding, which is set to zero.
            num_quantizers: Number of codebooks to keep; all if None.
        """
        signal = input_values if padding_mask is None else input_values * padding_mask.unsqueeze(-2)
        codes: Tensor = self.codec.encode(signal)
        return AudioOutput(audio_codes=codes[:, :num_quantizers])

    def decode(self, audio_codes: Tensor, padding_mask: Tensor | None = None, **_: Any) -> AudioOutput:
        """Decode codes to waveforms `(b, channels, n * hop_length)`.

        Args:
            audio_codes: Codes `(b, codebooks, n)`, of all codebooks or the first of them.
            padding_mask: The mask passed to `encode`; waveforms are cut to its length.
        """
        values: Tensor = self.codec.decode(audio_codes)
        return AudioOutput(audio_values=values if padding_mask is None else values[..., : padding_mask.shape[-1]])

    def forward(self, input_values: Tensor, padding_mask: Tensor | None = None, **_: Any) -> AudioOutput:
        """Encode and decode waveforms; return the codes and the reconstruction, cut to the input's length."""
        codes = self.encode(input_values, padding_mask).audio_codes
        assert codes is not None
        values = self.decode(codes).audio_values
        return AudioOutput(codes, None if values is None else values[..., : input_values.shape[-1]])


AutoConfig.register(VaritokAudioConfig.model_type, VaritokAudioConfig)
AutoModel.register(VaritokAudioConfig, VaritokAudioTokenizer)
