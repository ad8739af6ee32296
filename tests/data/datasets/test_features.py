"""Features of clips by a frozen teacher: the same at each start, standardized, and nothing downloaded."""

import builtins
import json

import pytest
import torch

from varitok import UserError
from varitok.codecs.build import build
from varitok.data.batch import SignalDataset, Splits
from varitok.data.datamodule import validation_loader
from varitok.data.datasets.features import teacher_features
from varitok.data.decoding.errors import BadSample
from varitok.data.synthetic.video import scenes
from varitok.data.teachers.vision import RandomTeacher, VisionTransformer

FORM = {"image_size": 32, "crop_tokens": 4, "downsample": 1, "causal_pad": 0, "length": 6, "val_length": 2}


def clips(**form):
    return scenes(**FORM | form)


def test_features_are_standardised_and_the_same_at_each_start():
    one, other = (teacher_features(clips(), RandomTeacher(12, 8), measured=6) for _ in range(2))
    signal = one.train[0, 3]
    assert signal.shape == (12, 4, 4, 4) and signal.dtype == torch.float32
    assert torch.equal(signal, other.train[0, 3]) and torch.equal(one.val[5, 1], other.val[0, 1])
    assert not torch.equal(signal, one.train[1, 3])
    all_of_them = torch.stack([one.train[0, index] for index in range(6)])
    assert all_of_them.mean((0, 2, 3, 4)).abs().max() < 1e-4
    torch.testing.assert_close(all_of_them.var((0, 2, 3, 4), correction=0), torch.ones(12), rtol=1e-3, atol=1e-3)
    assert "stand-in" in one.about["protocol"] and "scenes" in one.about["dataset"]
    assert len(one.train) == 6 and len(one.val) == 2


def test_what_is_evaluated_is_standardised_by_what_was_trained_on():
    same = teacher_features(clips(), RandomTeacher(12, 8))
    others = teacher_features(clips()._replace(val=clips(seed=5).val), RandomTeacher(12, 8))
    assert torch.equal(same.train.mean, others.train.mean) and torch.equal(same.val.deviation, others.train.deviation)
    assert not torch.equal(same.val[0, 0], others.val[0, 0])


def test_frames_go_through_the_teacher_one_by_one():
    teacher, splits = RandomTeacher(12, 8), clips(crop_tokens=19)
    clip = splits.train[0, 0]
    features = teacher_features(splits, teacher, measured=1).train
    alone = teacher(clip[:, 18:].transpose(0, 1)).values.transpose(0, 1)
    torch.testing.assert_close(features[0, 0][:, 18:], (alone - features.mean) / features.deviation)


def test_workers_give_what_the_main_process_gives():
    features = teacher_features(clips(), RandomTeacher(12, 8), measured=2).train

    (batch,) = validation_loader(features, len(features), 1)
    torch.testing.assert_close(batch.signal, torch.stack([features[0, place] for place in range(len(features))]))
    features.device = "cuda"
    with pytest.raises(UserError, match=r"loader\.workers=0"):
        next(iter(validation_loader(features, 1, 1)))


class _Torn(SignalDataset):
    def __init__(self, bad):
        self.bad, self.own = bad, clips().train

    def __len__(self):
        return 6

    def __getitem__(self, key):
        if key[1] in self.bad:
            raise BadSample("clip", "torn")
        return self.own[key]


def test_unreadable_clips_are_not_measured():
    splits = [Splits(_Torn(bad), _Torn(bad)) for bad in ((0, 2), range(6))]
    features = teacher_features(splits[0], RandomTeacher(12, 8), measured=2).train
    wanted = torch.stack([RandomTeacher(12, 8)(clips().train[0, index].transpose(0, 1)).values for index in (1, 3)])
    torch.testing.assert_close(features.mean.flatten(), wanted.mean((0, 1, 3, 4)), rtol=1e-4, atol=1e-5)
    with pytest.raises(BadSample):
        features[0, 2]
    with pytest.raises(UserError, match="none of the training clips can be read"):
        teacher_features(splits[1], RandomTeacher(12, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomTeacher(12, 6), "must be a power of two"),
        (lambda: teacher_features(clips(image_size=36), RandomTeacher(4, 8)), "36 x 36 pixels aren't multiples"),
        (lambda: teacher_features(clips(), RandomTeacher(4, 8), device="nowhere"), "data.device=nowhere"),
    ],
)
def test_a_mistake_is_told(make, message):
    with pytest.raises(UserError) as told:
        make()
    assert message in str(told.value) and "\n" not in str(told.value)


def test_a_missing_teacher_is_told_in_one_line(tmp_path):
    target = {"_target_": "varitok.data.teachers.vision.VisionTransformer", "folder": str(tmp_path / "theia")}
    with pytest.raises(UserError, match=r"^[^ ]*theia: place config\.json and model\.safetensors"):
        build(target)


def test_a_missing_package_is_told_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.partition(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'varitok\[teachers\]'"):
        VisionTransformer(str(tmp_path))


@pytest.fixture
def transformer(tmp_path):
    """A small ViT of random weights, as `transformers` saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    form = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    network = transformers.ViTModel(transformers.ViTConfig(**form, image_size=16, patch_size=8)).eval()
    network.save_pretrained(tmp_path / "vit")
    return network, tmp_path / "vit"


def test_a_transformers_features_are_its_last_hidden_state(transformer):
    network, folder = transformer
    teacher, frames = VisionTransformer(str(folder)), clips(image_size=32).train[0, 0].transpose(0, 1)
    with torch.no_grad():
        found = teacher(frames).values
        pixels = (frames / 255 - teacher.mean) / teacher.deviation
        hidden = network(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    assert found.shape == (4, 24, 4, 4) and not any(part.requires_grad for part in teacher.parameters())
    torch.testing.assert_close(found[1, :, 2, 3], hidden[1, 1 + 2 * 4 + 3])
    splits = teacher_features(clips(image_size=32), teacher, measured=2)
    assert splits.train[0, 0].shape == (24, 4, 4, 4)


def test_weights_may_lie_below_a_prefix_and_none_may_be_missing(transformer):
    from safetensors.torch import load_file, save_file

    _, folder = transformer
    frames = clips().train[0, 0].transpose(0, 1)
    with torch.no_grad():
        plain = VisionTransformer(str(folder))(frames).values
    state = load_file(folder / "model.safetensors")
    below = {f"backbone.model.{name}": value for name, value in state.items()}
    save_file(below | {"head.weight": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        assert torch.equal(VisionTransformer(str(folder), "backbone.model.")(frames).values, plain)
    with pytest.raises(UserError, match="weights are missing"):
        VisionTransformer(str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of"}))
    with pytest.raises(UserError, match="transformers can't read it"):
        VisionTransformer(str(folder))
