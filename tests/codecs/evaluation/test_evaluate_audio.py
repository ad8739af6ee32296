"""`evaluate` on sounds: a ladder of codebooks, bits a second, padding that counts for nothing; and what a run
leaves.
"""

import csv
import math
import wave
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import soundfile
import torch
from torch import Tensor, nn

from varitok import UserError
from varitok.codecs.evaluation.cli import main
from varitok.codecs.evaluation.evaluate import evaluate
from varitok.codecs.evaluation.table import read_csv
from varitok.codecs.layout import token_layout
from varitok.codecs.training.run import build_run
from varitok.data.batch import Batch, Sample, collate

from ...composing import composed
from ..examples import HOP, RATE, TINY_SOUND, sound_codec

BOOKS = 3


class Louder(nn.Module):
    """Gives q codebooks back as the sound at 1 / (1 + BOOKS - q) of its level; remembers it, as no code could hold
    it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layout, self.sample_rate = token_layout([HOP]), RATE
        self.bottleneck = SimpleNamespace(codebook_sizes=(8, 8, 4))

    def bits(self, tokens: int, codebooks: int | None = None) -> float:
        return tokens * sum(math.log2(size) for size in (8, 8, 4)[:codebooks])

    def encode(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        assert lengths is not None
        self.signal = signal
        steps = torch.arange(-(-signal.shape[2] // HOP)).remainder(4)
        # What isn't valid has an entry of its own, which nothing may count.
        return torch.where(torch.arange(len(steps)) < lengths[:, None, None], steps, 7).expand(-1, BOOKS, -1)

    def decode(self, codes: Tensor, size: Sequence[int] | None = None, lengths: Tensor | None = None) -> Tensor:
        assert lengths is not None and tuple(size or ()) == self.signal.shape[2:]
        return self.signal / (1 + BOOKS - codes.shape[1])


def _batch(*lengths: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return collate([Sample(0.3 * torch.randn(1, n, generator=generator).clamp(-1, 1)) for n in lengths])


def test_the_ladder_is_of_codebooks_and_the_rate_of_seconds():
    table = evaluate(Louder(), [_batch(4000, 2030), _batch(1000)], metrics=["mel", "stft", "si_sdr"])
    assert table.axis == "codebooks" and table.column("codebooks") == [1, 2, 3]
    tokens = 100 + 51 + 25
    assert table.column("bits") == pytest.approx([3 * tokens / 3, 6 * tokens / 3, 8 * tokens / 3])
    seconds = (4000 + 2030 + 1000) / RATE
    assert table.column("kbps") == pytest.approx([each * tokens / seconds / 1000 for each in (3, 6, 8)])
    assert table.column("bytes")[0] == pytest.approx((math.ceil(300 / 8) + math.ceil(153 / 8) + math.ceil(75 / 8)) / 3)
    assert table.column("sounds") == [3] * 3
    # A factor is a known mel distance, and nothing to SI-SDR.
    assert table.column("stft")[:2] == pytest.approx([2 * math.log10(3), 2 * math.log10(2)], abs=0.02)
    assert table.column("stft")[2] == 0 and min(table.column("si_sdr")) > 50
    assert f"at {RATE} Hz" in table.header["column mel"] and "16-bit" in table.header["rounding"]


def test_codes_beyond_a_sounds_end_are_not_counted():
    table = evaluate(Louder(), [_batch(4000, 40)], metrics=["mel"])
    assert table.column("usage_0") == [4 / 8] * 3 and math.isnan(table.rows[0]["usage_2"])
    assert table.rows[2]["usage_2"] == 1 and table.column("usage") == pytest.approx([0.5, 0.5, 2 / 3])


def test_padding_changes_nothing():
    codec, batch = sound_codec(), _batch(1600, 1000, 1203)
    codec(batch.signal)  # k-means
    codec.eval()
    alone = [
        Batch(batch.signal[i : i + 1, :, :n], batch.lengths[i : i + 1], ()) for i, n in enumerate((1600, 1000, 1203))
    ]
    together, apart = evaluate(codec, [batch]), evaluate(codec, alone)
    for one, other in zip(together.rows, apart.rows, strict=True):
        assert one == pytest.approx(other, rel=1e-4, nan_ok=True)


def test_silence_has_no_ratio_and_does_not_count_in_its_mean():
    batch = _batch(2000, 2000)
    batch.signal[1] = 0
    table = evaluate(Louder(), [batch], metrics=["si_sdr", "mel"])
    assert math.isfinite(table.rows[0]["si_sdr"]) and table.column("sounds") == [2] * 3
    (row, *_) = evaluate(Louder(), [batch._replace(signal=torch.zeros(2, 1, 2000))], metrics=["si_sdr"]).rows
    assert math.isnan(row["si_sdr"])


@pytest.mark.parametrize(("keeps", "metrics"), [([4], None), ([0], None), (None, ["psnr"]), (None, ["rfid"])])
def test_what_sounds_do_not_have_is_told(keeps, metrics):
    with pytest.raises(UserError, match=r"codebooks to keep|metric"):
        evaluate(Louder(), [_batch(1000)], keeps, metrics)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = build_run(composed(*TINY_SOUND, "callbacks.evaluation.every=2"), folder)
    run.trainer.fit(run.module, run.data)
    return folder


def test_a_run_leaves_pictures_sounds_and_a_table(finished):
    names = {path.relative_to(finished / "samples").as_posix() for path in (finished / "samples").rglob("*.*")}
    labels = ["original", "codebooks_1", "codebooks_2", "codebooks_3"]
    for update in ("update_0000001", "update_0000002"):
        assert {f"{update}.png"} | {f"{update}/{i}_{label}.wav" for i in (0, 1) for label in labels} <= names
    with wave.open(str(finished / "samples/update_0000002/1_codebooks_2.wav")) as file:
        assert (file.getframerate(), file.getnframes(), file.getsampwidth()) == (16000, 8000, 2)
    table = read_csv(finished / "evaluation/evaluation.csv")
    assert table.column("codebooks") == [1, 2, 3] and {"mel", "stft", "si_sdr", "kbps"} <= table.rows[0].keys()
    assert (finished / "evaluation/evaluation.png").is_file()
    with (finished / "metrics.csv").open() as file:
        assert {"val/mel@1", "val/si_sdr@3", "val/usage"} <= {row["name"] for row in csv.DictReader(file)}


def test_the_command_evaluates_a_folder_of_sounds(finished, tmp_path, capsys):
    for index in range(3):
        tone = torch.sin(torch.arange(20_000 + 777 * index) * 0.05 * (1 + index))
        soundfile.write(tmp_path / f"{index}.flac", 0.3 * tone.numpy(), 22050)
    main([str(finished), "--data", str(tmp_path), "--keep", "1,3", "--metrics", "mel,si_sdr", "--workers", "0"])
    table = read_csv(finished / "evaluation" / tmp_path.name / "evaluation.csv")
    assert table.column("codebooks") == [1, 3] and "resampled to 16000 Hz" in table.header["protocol"]
    assert "sounds; written to" in capsys.readouterr().out
    with pytest.raises(UserError, match="--robustness is measured on images"):
        main([str(finished), "--robustness", "0.1"])
