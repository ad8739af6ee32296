"""A bundle of sounds as an audio tokenizer of the library transformers, which its processors and models know."""

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
    """What comes out of it.

    Attributes:
        audio_codes: int64 `(b, codebooks, n)`; None of decoding.
        audio_values: `(b, channels, samples)`; None of encoding.
    """

    audio_codes: Tensor | None = None
    audio_values: Tensor | None = None


class VaritokAudioConfig(PretrainedConfig):
    """What a bundle's config.json says, by the names that transformers' audio codecs have.

    Args:
        bundle: The bundle's config.json.
        kwargs: Arguments of transformers' class.
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
    """A codec of sounds.

    Args:
        config: Whose `bundle` says how it is built.

    Raises:
        UserError: It can't be.
    """

    config_class = VaritokAudioConfig
    main_input_name = "input_values"

    def __init__(self, config: VaritokAudioConfig, weights: dict[str, tuple[int, ...]] | None = None) -> None:
        super().__init__(config)
        if weights is None:
            raise UserError("VaritokAudioTokenizer: made by from_bundle or from_pretrained")
        self.codec = frozen_of(config.bundle, weights)

    @classmethod
    def from_bundle(cls, path: str | PathLike[str]) -> "VaritokAudioTokenizer":
        """Make it of a bundle's folder.

        Raises:
            UserError: It is no bundle of sounds, or a file is missing or altered.
        """
        config = read_config(Path(path))
        if config.get("modality") != "audio" or not config.get("codebook_sizes"):
            raise UserError(f"{path}: not a bundle of sounds whose codes come out of codebooks")
        codec = rebuild(path)
        state = codec.state_dict()
        model = cls(VaritokAudioConfig(config), {name: tuple(value.shape) for name, value in state.items()})
        model.codec.load_state_dict(state)
        model.eval()
        return model

    @classmethod
    def from_pretrained(cls, name: str | PathLike[str], *args: Any, **options: Any) -> "VaritokAudioTokenizer":
        """Load what `save_pretrained` wrote, from a folder or the hub.

        It is built before its weights are read: tables that are computed when it is built are no weights.
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
        """Turn sounds into codes.

        Args:
            input_values: `(b, channels, samples)` at the configuration's rate, in [-1, 1].
            padding_mask: `(b, samples)`, 0 after the end of a signal, which is replaced by silence.
            num_quantizers: Number of codebooks to keep; all if None.
        """
        signal = input_values if padding_mask is None else input_values * padding_mask.unsqueeze(-2)
        codes: Tensor = self.codec.encode(signal)
        return AudioOutput(audio_codes=codes[:, :num_quantizers])

    def decode(self, audio_codes: Tensor, padding_mask: Tensor | None = None, **_: Any) -> AudioOutput:
        """Turn codes `(b, codebooks, n)`, all codebooks or the first of them, into sounds of whole tokens.

        Args:
            audio_codes: The codes.
            padding_mask: As `encode` had it; sounds are cut to its length.
        """
        values: Tensor = self.codec.decode(audio_codes)
        return AudioOutput(audio_values=values if padding_mask is None else values[..., : padding_mask.shape[-1]])

    def forward(self, input_values: Tensor, padding_mask: Tensor | None = None, **_: Any) -> AudioOutput:
        """Encode and decode."""
        codes = self.encode(input_values, padding_mask).audio_codes
        assert codes is not None
        values = self.decode(codes).audio_values
        return AudioOutput(codes, None if values is None else values[..., : input_values.shape[-1]])


AutoConfig.register(VaritokAudioConfig.model_type, VaritokAudioConfig)
AutoModel.register(VaritokAudioConfig, VaritokAudioTokenizer)
