"""Order, batches, and files that can't be read."""

import pytest
import torch
from PIL import Image

from varitok import UserError
from varitok.data.batch import Batch, SignalDataset, Splits
from varitok.data.datamodule import BadSampleCount, DataModule
from varitok.data.datasets.images import image_folder
from varitok.data.decoding.errors import BadSample


class Numbers(SignalDataset):
    """Sample i is the number i; those in `bad` can't be read."""

    def __init__(self, length, bad=()):
        self.length = length
        self.bad = bad

    def __len__(self):
        return self.length

    def __getitem__(self, key):
        if key[1] in self.bad:
            raise BadSample(f"file{key[1]}", "broken")
        return torch.full((3, 2, 2), key[1], dtype=torch.uint8)


def module(train, val=None, **options):
    return DataModule(Splits(train, val or train), **({"batch_size": 4, "workers": 0, "updates": 5} | options))


def numbers(batch):
    return batch.signal[:, 0, 0, 0].tolist()


def test_validation_comes_in_order_and_once():
    batches = list(module(Numbers(10)).val_dataloader())
    assert [numbers(batch) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches[0].lengths.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("overfit", [False, True])
def test_training_gives_as_many_batches_as_the_run_needs(overfit):
    batches = [numbers(batch) for batch in module(Numbers(6), accumulate=3, overfit=overfit).train_dataloader()]
    assert len(batches) == 15 and {len(batch) for batch in batches} == {4}
    assert (len({tuple(batch) for batch in batches}) == 1) is overfit


def test_batches_are_the_same_for_any_number_of_workers(tmp_path):
    for index in range(5):
        Image.effect_noise((30, 20), 50).save(tmp_path / f"{index}.png")
    splits = image_folder(str(tmp_path), image_size=16)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    runs = [list(module(splits.train, workers=workers, updates=3).train_dataloader()) for workers in (0, 2)]
    assert all(torch.equal(a.signal, b.signal) for a, b in zip(*runs, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_bad_sample_is_replaced_in_training_and_left_out_of_validation():
    data = module(Numbers(8, bad=(2, 3)), batch_size=8, updates=1)
    (batch,) = data.train_dataloader()
    assert sorted(numbers(batch)) == [0, 1, 4, 4, 4, 5, 6, 7]
    assert sorted(set(batch.bad)) == ["file2: broken", "file3: broken"]
    (batch,) = data.val_dataloader()
    assert numbers(batch) == [0, 1, 4, 5, 6, 7] and batch.bad == ("file2: broken", "file3: broken")


def test_a_batch_of_nothing_but_bad_samples_is_empty():
    (batch,) = module(Numbers(3, bad=(0, 1, 2))).val_dataloader()
    assert len(batch.signal) == 0 and len(batch.bad) == 3


def test_a_policy_says_what_comes_in_the_place_of_a_bad_sample():
    def batches(**options):
        data = module(Numbers(8, bad=(2, 3, 4, 5)), batch_size=2, updates=4, **options)
        return [(sorted(numbers(batch)), sorted(batch.bad)) for batch in data.train_dataloader()]

    found = batches(bad="skip")
    assert sorted(number for batch, _ in found for number in set(batch)) == [0, 1, 6, 7] or len(found) == 4
    assert all(1 <= len(batch) <= 2 for batch, _ in found) and any(len(batch) == 1 for batch, _ in found)
    assert {name for _, bad in found for name in bad} == {f"file{index}: broken" for index in (2, 3, 4, 5)}
    assert all(len(batch) == 2 for batch, _ in batches(bad="substitute"))
    with pytest.raises(UserError, match=r"^file[2-5]: broken \(loader\.bad=substitute replaces such files\)$"):
        batches(bad="fail")


def test_what_was_counted_is_remembered():
    count, other = BadSampleCount(0.5), BadSampleCount(0.5)
    for _ in range(3):
        count.add(_batch(8, ["a: broken", "b: broken"]))
    other.restore(count.state(), 0, torch.device("cpu"))
    assert other.state() == count.state() and other.total == 6
    other.restore(count.state(), 1, torch.device("cpu"))  # there was no such process
    assert other.total == 6


def _batch(good, bad):
    missed = (False,) * good + (True,) * len(bad)
    return Batch(torch.zeros(good, 3, 2, 2), torch.full((good,), 2), tuple(bad), missed=missed)


def test_bad_files_are_named_once_and_counted(caplog):
    count = BadSampleCount(0.5)
    for _ in range(3):
        count.add(_batch(8, ["a: broken", "b: broken"]))
    assert caplog.text.count("skipped a: broken") == 1
    assert count.summary() == "2 unreadable files were skipped, 6 times"


def test_too_large_a_share_ends_the_run():
    count = BadSampleCount(0.002)  # two of a thousand
    for _ in range(12):
        count.add(_batch(4, []))
    count.add(_batch(2, ["z: broken", "y: broken"]))  # and these may be among the first
    with pytest.raises(UserError, match=r"5\.5% of the last 55 files .*max_bad_share=0\.002; the last: x: broken"):
        count.add(_batch(2, ["x: broken"]))


def test_a_sample_counts_once_however_many_files_were_tried_in_its_place():
    data = module(Numbers(40, bad=range(10, 20)), batch_size=40, updates=1, max_bad_share=0.5)
    (batch,) = data.train_dataloader()
    data.on_before_batch_transfer(batch, 0)
    assert len(batch.signal) == 40 and len(batch.bad) == 10 * 11 // 2  # one to ten for each
    assert data.bad.total == 10 and data.bad.seen == 40


def test_nothing_readable_ends_the_run_at_once():
    data = module(Numbers(20, bad=range(20)), batch_size=2)
    with pytest.raises(UserError, match=r"none of the .* files tried could be read; the first: file"):
        for batch in data.train_dataloader():
            data.on_before_batch_transfer(batch, 0)
