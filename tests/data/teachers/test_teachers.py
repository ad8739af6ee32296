"""Teachers see what their own library would show them, in signals of any rate and length, and download nothing."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from varitok import UserError
from varitok.data.feature_map import FeatureMap, resample
from varitok.data.teachers.audio import AudioTransformer
from varitok.data.teachers.vision import RandomTeacher, VisionTransformer

from ..saved import SOUND, VISION, saved


def sounds(count, samples, seed=0):
    noise = torch.randn(count, 1, samples, generator=torch.Generator().manual_seed(seed))
    return (0.2 * noise + 0.1).clamp(-1, 1)


def test_teachers_of_images_prepare_as_the_librarys_processor(tmp_path):
    t = pytest.importorskip("transformers")
    _, folder = saved(tmp_path, "dinov2")
    teacher = VisionTransformer(str(folder), size=16)
    image = torch.randint(0, 256, (3, 24, 32), dtype=torch.uint8)
    form = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3]}
    plain = t.BitImageProcessor(**form, do_resize=False, do_center_crop=False)
    wanted = plain(image, return_tensors="pt")["pixel_values"]
    frames = image[None].float() / 127.5 - 1
    torch.testing.assert_close(teacher.pixels(frames), wanted, atol=1e-5, rtol=1e-5)
    smaller = t.ViTImageProcessor(**form, size={"height": 16, "width": 16}, resample=3)
    wanted = smaller(image, return_tensors="pt")["pixel_values"]
    found = teacher.pixels(teacher.resize(frames, (16, 16)))
    # The library rounds to whole pixels, and clips, in between.
    assert (found - wanted).abs().mean() < 0.5 / 255 / 0.2


@pytest.mark.parametrize("kind", VISION)
def test_features_of_images_are_hidden_states_on_their_grid(tmp_path, kind):
    network, folder = saved(tmp_path, kind)
    teacher = VisionTransformer(str(folder), layer=1)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    found = teacher(images)
    side = getattr(network, "vision_model", network)
    options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        output = side(pixel_values=teacher.pixels(images), output_hidden_states=True, **options)
    states = output.hidden_states[1]
    assert found.values.shape == (2, teacher.channels, 2, 3) and found.steps == (8, 8)
    torch.testing.assert_close(found.values[1, :, 1, 2], states[1, -1])
    maps, pooled = teacher.layers(images)
    assert len(maps) == len(teacher.layer_channels) == len(output.hidden_states) and torch.equal(maps[1], found.values)
    assert (pooled is None) == (found.pooled is None)
    if kind == "vit":  # its file has a pooler here
        torch.testing.assert_close(found.pooled, output.pooler_output)
    if kind == "clip":
        torch.testing.assert_close(found.pooled, network.visual_projection(output.pooler_output))
        assert teacher.pooled_channels == 10
    mean = VisionTransformer(str(folder), layer="mean")(images).values
    torch.testing.assert_close(mean[0, :, 0, 0], torch.stack(output.hidden_states).mean(0)[0, -6])


def test_clips_are_seen_frame_by_frame_and_images_of_any_size_where_one_is_given():
    teacher = RandomTeacher(12, 8)
    clips, lengths = torch.rand(2, 3, 5, 16, 24) * 2 - 1, torch.tensor([5, 3])
    found = teacher(clips, lengths)
    assert found.values.shape == (2, 12, 5, 2, 3) and found.steps == (1, 8, 8)
    torch.testing.assert_close(found.values[1, :, 2], teacher(clips[1:, :, 2]).values[0])
    torch.testing.assert_close(found.mean()[1], found.values[1, :, :3].mean((1, 2, 3)))
    assert [layer.shape[1] for layer in teacher.layers(clips[:, :, 0])[0]] == list(teacher.layer_channels)
    teacher.size = 16, 16
    odd = teacher(torch.rand(1, 3, 20, 30))
    assert odd.values.shape == (1, 12, 2, 2) and odd.steps == (10, 15)


@pytest.mark.parametrize("kind", SOUND)
def test_sounds_are_prepared_as_by_the_librarys_extractor(tmp_path, kind):
    t = pytest.importorskip("transformers")
    network, folder = saved(tmp_path, kind)
    teacher = AudioTransformer(str(folder), 16000)
    samples = 6400
    sound = sounds(1, samples)
    with torch.no_grad():
        found = teacher(sound)
    if kind == "w2v_bert":
        around = np.pad(sound[0, 0].numpy(), 120)
        wanted = t.SeamlessM4TFeatureExtractor()(around, sampling_rate=16000, return_tensors="pt")["input_features"]
        prepared = teacher.mel(teacher.prepare(sound[:, 0], torch.tensor([samples]))[0])
        torch.testing.assert_close(prepared, wanted, atol=1e-3, rtol=1e-3)
        output = network(input_features=wanted)
    else:
        extract = t.Wav2Vec2FeatureExtractor(do_normalize=True)
        wanted = extract(sound[0, 0].numpy(), sampling_rate=16000, return_tensors="pt")["input_values"]
        prepared, _ = teacher.prepare(sound[:, 0], torch.tensor([samples]))
        torch.testing.assert_close(prepared[:, 5:-5], wanted, atol=1e-4, rtol=1e-4)
        output = network(input_values=prepared)
    steps = samples // teacher.stride
    assert found.values.shape == (1, 24, steps) and found.steps == (teacher.stride,)
    torch.testing.assert_close(found.values.transpose(1, 2), output.last_hidden_state, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", SOUND)
def test_a_padded_sound_is_heard_as_alone(tmp_path, kind):
    _, folder = saved(tmp_path, kind)
    teacher = AudioTransformer(str(folder), 24000, layer=1)
    lengths = torch.tensor([2400, 1111, 1777, 2400])
    batch = sounds(4, 2400)
    batch[1, :, 1111:] = 3.0  # any padding
    with torch.no_grad():
        found = teacher(batch, lengths)
        for index, length in enumerate(lengths):
            alone = teacher(batch[index : index + 1, :, :length])
            count = alone.values.shape[2]
            assert count == found.lengths[index]
            torch.testing.assert_close(found.values[index, :, :count], alone.values[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["wavlm", "w2v_bert"])
def test_a_gradient_comes_back_to_the_sound(tmp_path, kind):
    _, folder = saved(tmp_path, kind)
    teacher = AudioTransformer(str(folder), 24000)
    sound = sounds(1, 2400).requires_grad_()
    teacher(sound).values.square().sum().backward()
    assert sound.grad.isfinite().all() and sound.grad.abs().sum() > 0
    assert not any(part.requires_grad for part in teacher.parameters())


@settings(max_examples=20)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=3), st.sampled_from([1.0, 2.5, 4.0]), st.sampled_from([1.0, 3.0])
)
def test_resampling_a_padded_batch_is_resampling_each_alone(counts, step, wanted):
    lengths = torch.tensor(counts)
    most = max(counts)
    values = torch.randn(len(counts), 2, most)
    padded = torch.where(torch.arange(most) < lengths[:, None, None], values, torch.nan)
    target = FeatureMap(torch.zeros(len(counts), 1, int(-(-most * step // wanted))), (wanted,))
    found = resample(FeatureMap(padded, (step,), lengths), target)
    assert found.isfinite().all()
    for index, count in enumerate(counts):
        own = int(-(-count * step // wanted))
        alone = resample(
            FeatureMap(values[index : index + 1, :, :count], (step,)), FeatureMap(target.values[:1, :, :own], (wanted,))
        )
        torch.testing.assert_close(found[index, :, :own], alone[0])


def test_resampling_takes_means_and_repeats():
    ramp = FeatureMap(torch.arange(8.0).reshape(1, 1, 8), (1.0,))
    assert resample(ramp, FeatureMap(torch.zeros(1, 1, 4), (2.0,))).tolist() == [[[0.5, 2.5, 4.5, 6.5]]]
    finer = resample(ramp, FeatureMap(torch.zeros(1, 1, 16), (0.5,)))
    assert torch.equal(finer[0, 0, ::2], ramp.values[0, 0]) and torch.equal(finer[0, 0, 1::2], ramp.values[0, 0])
    led = resample(ramp, FeatureMap(torch.zeros(1, 1, 3), (4.0,), offset=3))  # its first step is the first frame alone
    assert led.tolist() == [[[0.0, 2.5, 6.0]]]
    plane = FeatureMap(torch.arange(16.0).reshape(1, 1, 4, 4), (2.0, 2.0))
    half = resample(plane, FeatureMap(torch.zeros(1, 1, 2, 2), (4.0, 4.0)))
    torch.testing.assert_close(half, torch.nn.functional.avg_pool2d(plane.values, 2))


def test_a_teacher_is_looked_for_among_the_weights(tmp_path, monkeypatch):
    _, folder = saved(tmp_path / "someone", "dinov2")
    monkeypatch.setenv("VARITOK_WEIGHTS", str(tmp_path))
    assert VisionTransformer("someone/dinov2").name == folder.name


def _without(name):
    def break_it(folder):
        (folder / name).unlink()

    return break_it


def _torn(folder):
    (folder / "model.safetensors").write_bytes(b"torn")


def _incomplete(folder):
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in state.items() if "layers.1" not in name},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def _other_rate(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "unheard_of"}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            _without("config.json"),
            r"place config\.json, preprocessor_config\.json and model\.safetensors .*WavLM|wavlm",
        ),
        (_without("preprocessor_config.json"), r"place config\.json, preprocessor_config\.json and model\.safetensors"),
        (_without("model.safetensors"), "nothing is downloaded"),
        (_torn, "transformers can't read it"),
        (_other_rate, "transformers can't read it"),
        (_incomplete, "weights are missing"),
    ],
)
def test_a_broken_teacher_is_told_in_one_line(tmp_path, spoil, message):
    _, folder = saved(tmp_path, "wavlm")
    spoil(folder)
    with pytest.raises(UserError, match=message) as told:
        AudioTransformer(str(folder), 16000)
    assert str(folder) in str(told.value) and "\n" not in str(told.value)


def test_a_teacher_of_the_wrong_class_or_layer_is_told_in_one_line(tmp_path):
    folders = {kind: str(saved(tmp_path, kind)[1]) for kind in ("wavlm", "dinov2")}
    with pytest.raises(UserError, match=r"wavlm: not a complete vision transformer, it has no patch_size"):
        VisionTransformer(folders["wavlm"])
    with pytest.raises(UserError, match=r"dinov2: not a complete audio transformer \(a dinov2\)"):
        AudioTransformer(folders["dinov2"], 16000)
    with pytest.raises(UserError, match=r"layer=3: must be last, mean, or from 0 to 2"):
        AudioTransformer(folders["wavlm"], 16000, layer=3)
    with pytest.raises(UserError, match=r"20 x 16 pixels aren't multiples of the teacher's patch, 8"):
        VisionTransformer(folders["dinov2"])(torch.zeros(1, 3, 16, 20))
