"""Teachers that read captions."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varitok import UserError

from ..feature_map import FeatureMap
from .base import Teacher, load_pretrained

__all__ = ["TextTransformer"]

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")


class TextTransformer(Teacher):
    """The text side of a network of the package `transformers` that holds texts against signals: CLIP, SigLIP, CLAP.

    Args:
        folder: With config.json, the weights and the tokenizer's files: a path, or a name below one of
            `weights.weight_folders`.

    Raises:
        UserError: `load_pretrained` fails, the tokenizer can't be read, or the network has no whole side that reads.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        found = load_pretrained(folder, "a network of texts and signals, such as openai/clip-vit-base-patch16")
        network = found.network
        if not hasattr(network, "get_text_features"):
            raise UserError(f"{found.folder}: a {network.config.model_type} has no side that reads texts, as CLIP has")
        missing = [name for name in found.missing if name.startswith("text_")]
        if missing:
            raise UserError(f"{found.folder}: {len(missing)} weights of its text side are missing, {missing[0]} first")
        self.tokenizer = _tokenizer(found.folder)
        # SigLIP has only seen texts that were filled up to its longest, without a mask.
        self.filled = str(network.config.model_type).startswith("siglip")
        config = network.config.text_config
        begun = getattr(network.text_model.embeddings, "padding_idx", -1) + 1  # RoBERTa counts places from there
        self.most = min(int(self.tokenizer.model_max_length), int(config.max_position_embeddings) - begun)
        for name in ("vision_model", "visual_projection", "audio_model", "audio_projection"):
            if hasattr(network, name):
                setattr(network, name, None)  # the other side, which nothing here needs
        self.network: Any = network.eval().requires_grad_(False)
        self.known = set(inspect.signature(network.text_model.forward).parameters)
        self.name = found.folder.name
        self.channels = self.pooled_channels = self.read(["a"]).values.shape[1]

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> FeatureMap:
        """Refuse to look at signals: raises a UserError."""
        raise UserError(f"{self.name}: reads captions, and sees no signal; let a term of kind Contrast have it")

    @torch.no_grad()
    def read(self, captions: Sequence[str], device: torch.device | None = None) -> FeatureMap:
        """Turn captions into vectors `(b, c)`, on a grid without axes; an empty one's is zero."""
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
        told = torch.tensor([bool(caption) for caption in captions], device=vectors.device)
        vectors = torch.where(told[:, None], vectors, 0.0)
        return FeatureMap(vectors, (), pooled=vectors)


def _tokenizer(folder: Path) -> Any:
    """Read a tokenizer of `transformers`."""
    from transformers import AutoTokenizer  # noqa: PLC0415 (an extra)

    # The library would make one that knows no word, and say nothing.
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise UserError(f"{folder}: place the tokenizer's files there, above all {VOCABULARIES[0]}")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # OSError, ValueError and what tokenizers raises
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"{folder}: its tokenizer can't be read ({first})") from error
