"""Text teachers: encoders of captions."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varitok import UserError

from ..feature_map import FeatureMap
from .base import Teacher, load_pretrained

__all__ = ["TextTransformer", "load_tokenizer"]

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")


class TextTransformer(Teacher):
    """The text encoder of a contrastive model of the package `transformers`: CLIP, SigLIP, CLAP.

    Args:
        folder: Folder of config.json, the weights and the tokenizer's files: a path, or a name below one of
            `weights.weight_folders`.

    Raises:
        UserError: `load_pretrained` fails, the tokenizer can't be read, or the model has no complete text encoder.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        found = load_pretrained(folder, "a contrastive model with a text encoder, such as openai/clip-vit-base-patch16")
        network = found.network
        if not hasattr(network, "get_text_features"):
            raise UserError(f"{found.folder}: a {network.config.model_type} has no text encoder; use CLIP or CLAP")
        missing = [name for name in found.missing if name.startswith("text_")]
        if missing:
            raise UserError(f"{found.folder}: {len(missing)} text encoder weights are missing, {missing[0]} first")
        self.tokenizer = load_tokenizer(found.folder)
        # SigLIP was trained on texts padded to the maximum length, without a mask.
        self.filled = str(network.config.model_type).startswith("siglip")
        config = network.config.text_config
        begun = getattr(network.text_model.embeddings, "padding_idx", -1) + 1  # RoBERTa numbers positions from there
        self.most = min(int(self.tokenizer.model_max_length), int(config.max_position_embeddings) - begun)
        for name in ("vision_model", "visual_projection", "audio_model", "audio_projection"):
            if hasattr(network, name):
                setattr(network, name, None)  # drop the signal encoder, which isn't used
        self.network: Any = network.eval().requires_grad_(False)
        self.known = set(inspect.signature(network.text_model.forward).parameters)
        self.name = found.folder.name
        self.channels = self.pooled_channels = self.read(["a"]).values.shape[1]

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> FeatureMap:
        """Raise a `UserError`: the network encodes captions only; see `read`."""
        raise UserError(f"{self.name}: encodes captions, not signals; use it in a Contrast term only")

    @torch.no_grad()
    def read(self, captions: Sequence[str], device: torch.device | None = None) -> FeatureMap:
        """Encode captions as vectors `(b, c)`, zero for an empty caption, in a feature map without grid axes."""
        texts = self.tokenizer(
            list(captions),
            padding="max_length" if self.filled else True,
            truncation=True,
            max_length=self.most,
            return_tensors="pt",
        )
        wanted = {"input_ids"} if self.filled else {"input_ids", "attention_mask"} & self.known
        given = {name: values.to(device) for name, values in texts.items() if name in wanted}
        vectors: Tensor = self.network.get_text_features(**given).pooler_output.float()
        has_caption = torch.tensor([bool(caption) for caption in captions], device=vectors.device)
        vectors = torch.where(has_caption[:, None], vectors, 0.0)
        return FeatureMap(vectors, (), pooled=vectors)


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer of `transformers`.

    Raises:
        UserError: A file is missing or can't be read.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 (an extra)

    # Without these files, the library would silently build a tokenizer with an empty vocabulary.
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise UserError(f"{folder}: place the tokenizer's files there, usually {VOCABULARIES[0]}")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # OSError, ValueError and errors of tokenizers
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"{folder}: its tokenizer can't be read ({first})") from error
