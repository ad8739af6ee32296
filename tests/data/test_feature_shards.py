"""Features that a teacher saw before: written once, cut as the sounds are, and equal to what it would see."""

import numpy as np
import pytest
import soundfile
import torch

from varitok import UserError
from varitok.data.batch import BadSample, Sample, collate
from varitok.data.feature_shards import FeatureShards, SeenTeacher, main, sound_teacher
from varitok.data.featuremaps import Features, resampled
from varitok.data.module import DataModule
from varitok.data.sound_teachers import SoundTransformer
from varitok.data.sounds import SoundDataset, sound_folder
from varitok.data.synthetic import dead_leaves
from varitok.export.command import main as varitok

from .saved import saved

RATE, CROP = 8000, 400
FORM = {"sample_rate": RATE, "crop_tokens": 10, "hop": 40, "gain": (0.0, 0.0), "flip": False}
LENGTHS = {"a/one.wav": 2000, "a/two.wav": 1237, "three.v2.wav": 900, "short.wav": 150}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of sounds, the teacher and the shards of what it saw."""
    root = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    for name, samples in LENGTHS.items():
        (root / "sounds" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / "sounds" / name, 0.2 * random.standard_normal(samples), RATE, subtype="FLOAT")
    _, folder = saved(root, "wavlm")
    words = [str(root / "sounds"), "--teacher", str(folder), "--rate", str(RATE), "--out", str(root / "seen")]
    main([*words, "--layer", "1"])
    return root / "sounds", SoundTransformer(str(folder), RATE, 1), root / "seen"


def dataset(sounds, **form):
    return SoundDataset(sorted(sounds.rglob("*.wav")), RATE, form.pop("samples", CROP), **form)


def test_whole_files_are_what_the_teacher_sees(corpus):
    sounds, teacher, seen = corpus
    whole = dataset(sounds, samples=None, train=False)
    shards = FeatureShards(str(seen), whole)
    for index in range(len(whole)):
        wanted = teacher(whole[0, index][None])
        found = shards[0, index]
        assert found.steps == wanted.steps and found.lead == 0
        torch.testing.assert_close(found.values, wanted.values, atol=2e-3, rtol=2e-3)  # float16


def test_stretches_are_cut_where_the_sounds_are(corpus):
    """Brought onto a stretch's own grid, the cut is that part of the whole, wherever it begins."""
    sounds, teacher, seen = corpus
    data = dataset(sounds, seed=3)
    shards, starts = FeatureShards(str(seen), data), set()
    plain = SoundDataset(data.files, RATE, None, train=False)
    for epoch in range(6):
        for index in range(len(data)):
            signal, found = data[epoch, index], shards[epoch, index]
            begin, count = data.stretch((epoch, index))
            starts.add(begin)
            assert signal.shape[1] == count
            whole = teacher(plain[0, index][None])
            wanted = resampled(whole, Features(torch.zeros(1, 1, count), (1.0,), lead=-begin))
            cut = resampled(found, Features(torch.zeros(1, 1, count), (1.0,)))
            torch.testing.assert_close(cut, wanted, atol=2e-3, rtol=2e-3)
    assert len(starts) > 6


def test_a_batch_of_cuts_is_each_alone(corpus):
    sounds, _, seen = corpus
    data = dataset(sounds, seed=3)
    shards = FeatureShards(str(seen), data)
    samples = [Sample(data[1, index], (), index, {"t": shards[1, index]}) for index in range(4)]
    batch = collate([*samples, Sample(None, ("bad",))])
    like = Features(torch.zeros(4, 1, CROP // 40), (40.0,))
    together = resampled(batch.features["t"], like)
    for index in range(4):
        alone = resampled(shards[1, index], like._replace(values=like.values[:1]))
        torch.testing.assert_close(together[index], alone[0])


def test_batches_bring_the_features_of_their_sounds(corpus):
    sounds, _, seen = corpus
    splits = sound_folder(str(sounds), val_share=0.25, **FORM)
    module = DataModule(splits, batch_size=2, workers=0, updates=3, features={"t": str(seen)})
    for batch in module.train_dataloader():
        assert batch.features["t"].values.shape[:2] == (2, 24)
        assert batch.features["t"].lead.shape == (2,)


def test_what_cannot_be_cut_is_refused_in_one_line(corpus, tmp_path):
    seen = corpus[2]
    leaves = dead_leaves(image_size=16, length=4, val_length=2).train
    with pytest.raises(UserError, match=r"of sound files alone; .*cached=null"):
        FeatureShards(str(seen), leaves)
    more = tmp_path / "more"
    more.mkdir()
    soundfile.write(more / "other.wav", np.zeros(500), RATE)
    with pytest.raises(UserError, match=r"has no features of .*other\.wav; write them anew"):
        FeatureShards(str(seen), dataset(more))
    with pytest.raises(UserError, match="no shards of features in this folder"):
        SeenTeacher(str(more))
    with pytest.raises(UserError, match=r"a reconstruction is for the teacher to see"):
        SeenTeacher(str(seen))(torch.zeros(1, 1, 400))


def test_features_that_are_torn_are_a_bad_sample(corpus):
    sounds, _, seen = corpus
    shards = FeatureShards(str(seen), dataset(sounds))
    shards.members[0] = shards.members[0]._replace(size=60)
    with pytest.raises(BadSample):
        shards[0, 0]


def test_a_teacher_whose_features_are_read_need_not_be_there(corpus):
    seen = sound_teacher("nowhere", RATE, cached=str(corpus[2]))
    assert seen.channels == 24 and seen.name == "wavlm"
    with pytest.raises(UserError, match="nothing is downloaded"):
        sound_teacher("nowhere", RATE)


def test_the_command_tells_a_mistake_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        varitok(["features", str(tmp_path), "--teacher", "nowhere", "--rate", "8000", "--out", str(tmp_path / "out")])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and line.startswith("varitok features: nowhere: place config.json")
