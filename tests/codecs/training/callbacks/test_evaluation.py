"""Evaluations during training take some of the validation signals, the last one takes all."""

import pytest

from varitok.codecs.training.callbacks import evaluation
from varitok.codecs.training.run import build_run

from ....composing import composed
from ...examples import TINY_RUN

WORDS = [*TINY_RUN, "callbacks.samples=null", "export=none", "updates=4", "callbacks.evaluation.every=2"]


@pytest.mark.parametrize(("limit", "numbers"), [(3, [3, 3, 7]), (7, [7, 7]), ("null", [7, 7])])
def test_the_last_evaluation_is_of_all_signals_and_the_best_is_chosen_among_equal_ones(
    tmp_path, monkeypatch, limit, numbers
):
    seen, measure = [], evaluation.evaluate

    def evaluate(codec, batches, *given):
        batches = list(batches)
        seen.append([int(index) for batch in batches for index in batch.sample_indices])
        return measure(codec, batches, *given)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    words = [f"callbacks.evaluation.limit={limit}", "data.val_length=7", "checkpoint.best=val/psnr@4"]
    run = build_run(composed(*WORDS, *words), tmp_path)
    run.trainer.fit(run.module, run.data)
    assert [len(indices) for indices in seen] == numbers and seen[-1] == list(range(7))
    assert seen[0] == ([0, 2, 4] if limit == 3 else list(range(7)))
    best, logged = run.module.evaluation["val/psnr@4"], (tmp_path / "metrics.csv").read_text()
    assert (f"4,val/psnr@4,{best:.9g}" not in logged) == (limit == 3)
