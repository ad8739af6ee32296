"""Small networks of random weights of transformers' own classes, saved as their makers publish them."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

FORM = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES = {"image_size": 16, "patch_size": 8}
# Strides of 10 samples, which see 20.
SOUNDS = {
    **{"conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
}
CLAP_SOUNDS = {
    **{"spec_size": 32, "num_mel_bins": 8, "patch_size": 4, "patch_stride": [4, 4], "patch_embeds_hidden_size": 8},
    **{"window_size": 2, "depths": [1, 1], "num_attention_heads": [2, 2], "hidden_size": 16},
}
STABLE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
WORDS = ("a", "red", "blue", "boat", "dog", "sings")
TEXTS = ("clip", "siglip", "clap")
VISION = ("dinov2", "vit", "clip_vision", "siglip_vision", "clip")
SOUND = ("hubert", "wavlm", "wavlm_large", "wav2vec2", "w2v_bert")


def _made(kind: str) -> Any:
    t = pytest.importorskip("transformers")
    texts = FORM | {"vocab_size": 50, "bos_token_id": 48, "eos_token_id": 49, "pad_token_id": 1}
    makers = {
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**FORM, **IMAGES)),
        "vit": lambda: t.ViTModel(t.ViTConfig(**FORM, **IMAGES)),
        "clip_vision": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**FORM, **IMAGES)),
        "siglip_vision": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**FORM, **IMAGES)),
        "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=texts, vision_config=FORM | IMAGES, projection_dim=10)),
        "siglip": lambda: t.SiglipModel(
            t.SiglipConfig(text_config=texts | {"max_position_embeddings": 8}, vision_config=FORM | IMAGES)
        ),
        "clap": lambda: t.ClapModel(
            t.ClapConfig(
                text_config=texts | {"max_position_embeddings": 20, "vocab_size": 50},
                audio_config=CLAP_SOUNDS,
                projection_dim=10,
            )
        ),
        "hubert": lambda: t.HubertModel(t.HubertConfig(**FORM, **SOUNDS)),
        "wavlm": lambda: t.WavLMModel(t.WavLMConfig(**FORM, **SOUNDS)),
        "wavlm_large": lambda: t.WavLMModel(t.WavLMConfig(**FORM, **SOUNDS, **STABLE)),
        "wav2vec2": lambda: t.Wav2Vec2Model(t.Wav2Vec2Config(**FORM, **SOUNDS, **STABLE)),
        "w2v_bert": lambda: t.Wav2Vec2BertModel(t.Wav2Vec2BertConfig(**FORM)),
    }
    return makers[kind]()


@cache
def _network(kind: str) -> Any:
    torch.manual_seed(0)
    return _made(kind).eval()


def saved(folder: Path, kind: str) -> tuple[Any, Path]:
    """Make a network and save it, with its preprocessor's file; gives it and its folder."""
    network, path = _network(kind), folder / kind
    network.save_pretrained(path)
    if kind in SOUND:
        t = pytest.importorskip("transformers")
        kinds = {"w2v_bert": t.SeamlessM4TFeatureExtractor}
        kinds.get(kind, t.Wav2Vec2FeatureExtractor)().save_pretrained(path)
    elif kind not in ("vit", "clap"):
        about = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3], "resample": 3}
        (path / "preprocessor_config.json").write_text(json.dumps(about))
    if kind in TEXTS:
        save_tokenizer(path)
    return network, path


def save_tokenizer(path: Path) -> None:
    """Save a tokenizer of a few words, which begins a text by 48, ends it by 49, and fills it up by 1."""
    t = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    ids = {"<pad>": 1, "<unk>": 2, "<bos>": 48, "<eos>": 49} | {word: 3 + place for place, word in enumerate(WORDS)}
    made = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<bos>", 48), ("<eos>", 49)]
    made.post_processor = processors.TemplateProcessing(single="<bos> $A <eos>", special_tokens=ends)
    names = {"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    t.PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(path)
