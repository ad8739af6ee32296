"""`evaluate` on a codec whose distortion is known, its table, and the command."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from torch import Tensor, nn

from varitok import UserError
from varitok.codecs.evaluation import cli as module
from varitok.codecs.evaluation.cli import main
from varitok.codecs.evaluation.evaluate import evaluate
from varitok.codecs.evaluation.figure import Curve
from varitok.codecs.evaluation.table import Table, read_csv
from varitok.codecs.layout import token_layout
from varitok.codecs.metrics import frechet
from varitok.data.batch import Batch

from ..examples import tiled_codec

N = 5
SIDE = 16


class Offset(nn.Module):
    """Gives k tokens back as the image plus N - k grey levels; remembers the image, as no code could hold it."""

    def __init__(self, below: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.drop = nn.Dropout()
        self.bottleneck = SimpleNamespace(codebook_sizes=(8, 4))
        self.layout, self.sample_rate = token_layout((SIDE, SIDE), tokens=N), None
        self.below = below  # grey levels below rounding
        self.encoded = 0

    def bits(self, tokens: int, codebooks: int | None = None) -> float:
        return tokens * 5.0

    def encode(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        assert not self.training and not self.drop.training and torch.is_inference_mode_enabled()
        self.encoded += 1
        self.signal = signal
        steps = torch.arange(N).expand(len(signal), 2, N)
        return torch.stack([steps[:, 0], steps[:, 1] % 2], 1)

    def decode(self, codes: Tensor, size: Sequence[int] | None = None, lengths: Tensor | None = None) -> Tensor:
        return self.signal + (N - codes.shape[-1] + self.below) / 127.5


def _batches(*sizes: int, bad: tuple[str, ...] = ()) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(20, 200, (b, 3, SIDE, SIDE), generator=generator).to(torch.uint8) for b in sizes]
    return [Batch(image, torch.full((len(image),), SIDE), bad) for image in images]


def _level(offset: float) -> float:
    return 20 * math.log10(255 / offset) if offset else 100.0


def test_psnr_of_a_known_distortion_on_the_ladder() -> None:
    table = evaluate(Offset(), _batches(3, 2))
    assert table.column("k") == [1, 2, 4, 5]
    assert table.column("psnr") == pytest.approx([_level(4), _level(3), _level(1), 100], abs=1e-4)
    assert table.column("bits") == [5, 10, 20, 25] and table.column("bytes") == [1, 2, 3, 4]
    assert table.column("bpp") == pytest.approx([bits / SIDE**2 for bits in (5, 10, 20, 25)])
    assert table.column("images") == [5] * 4


def test_psnr_is_the_mean_of_the_images_decibels() -> None:
    class Half(Offset):
        def decode(self, codes: Tensor, size: Sequence[int] | None = None, lengths: Tensor | None = None) -> Tensor:
            return self.signal + torch.tensor([1.0, 10.0])[:, None, None, None] / 127.5

    (row,) = evaluate(Half(), _batches(2), [N]).rows
    assert row["psnr"] == pytest.approx((_level(1) + _level(10)) / 2, abs=1e-4)


def test_what_is_compared_is_rounded_to_8_bits() -> None:
    assert evaluate(Offset(below=0.4), _batches(2), [N]).rows[0]["psnr"] == 100
    assert evaluate(Offset(below=0.6), _batches(2), [N]).rows[0]["psnr"] == pytest.approx(_level(1), abs=1e-4)


def test_codebook_use_is_that_of_the_first_k_codes() -> None:
    table = evaluate(Offset(), _batches(2, 3), [4, 1, 4])
    assert table.column("k") == [1, 4]  # sorted, once each
    assert table.column("usage_0") == [1 / 8, 4 / 8] and table.column("usage_1") == [1 / 4, 2 / 4]
    assert table.column("entropy_0") == [0, 2] and table.column("entropy") == [0, 1.5]
    assert table.column("perplexity_1") == [1, 2] and table.column("perplexity") == [1, 3]


def test_each_batch_is_encoded_once_and_modes_come_back() -> None:
    codec = Offset()
    codec.drop.eval()
    evaluate(codec, _batches(1, 1))
    assert codec.encoded == 2 and codec.training and not codec.drop.training


def test_bad_files_are_counted_and_empty_batches_passed_over() -> None:
    empty = Batch(torch.empty(0, 0, 0, 0), torch.empty(0, dtype=torch.int64), ("b.png: torn",))
    table = evaluate(Offset(), [*_batches(2, bad=("a.png: torn",)), empty])
    assert table.rows[0]["images"] == 2 and table.header["unreadable files left out"] == "2"
    with pytest.raises(UserError, match=r"no image to evaluate; the first that failed: b\.png: torn"):
        evaluate(Offset(), [empty])


@pytest.mark.parametrize("keeps", [[0], [1, N + 1], [-1], []])
def test_a_number_of_tokens_out_of_range_is_refused(keeps: list[int]) -> None:
    with pytest.raises(UserError, match="keeps from 1 to 5"):
        evaluate(Offset(), _batches(1), keeps)


def test_images_of_another_size_than_the_codecs_are_refused() -> None:
    class Smaller(Offset):
        def decode(self, codes: Tensor, size: Sequence[int] | None = None, lengths: Tensor | None = None) -> Tensor:
            return self.signal[..., :12]

    with pytest.raises(UserError, match="16 x 16 samples, but the codec decodes to 12 x 16"):
        evaluate(Smaller(), _batches(1))


def test_rfid_is_none_for_a_perfect_codec_and_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "WIDTH", 3)
    monkeypatch.setattr(frechet, "inception", lambda device: lambda images: images.double().mean((2, 3)))
    table = evaluate(Offset(), _batches(4, 4), metrics=["rfid"])
    assert table.column("rfid") == pytest.approx([3 * 16, 3 * 9, 3 * 1, 0], abs=1e-6)  # squared shift of 3 means


def test_the_table_comes_back_from_its_file(tmp_path: Path) -> None:
    table = evaluate(
        Offset(), _batches(2), metrics=["psnr", "ssim", "ms_ssim"], header={"dataset": "noise: made\nhere"}
    )
    table.write_csv(tmp_path / "new" / "evaluation.csv")
    back = read_csv(tmp_path / "new" / "evaluation.csv")
    assert back.header == table.header | {"dataset": "noise: made here"}
    assert "mean of the images' values" in back.header["column psnr"]
    assert "on 1 scales" in back.header["column ms_ssim"]
    for row, expected in zip(back.rows, table.rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("text", [None, "", "k,psnr\n1,high\n", "a,b\n1,2\n", "k,psnr\n1\n"])
def test_a_file_that_is_no_table_is_told(text: str | None, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"table\.csv: .*varitok evaluate wrote"):
        read_csv(path)


def test_the_table_is_drawn_and_printed(tmp_path: Path) -> None:
    table = Table([{"k": k, "bytes": 2 * k, "psnr": 20.0 + k, "ssim": k / 9, "usage": 0.5} for k in (1, 2, 8)])
    table.plot(tmp_path / "plot.png", [Curve("JPEG", [300, 400], {"psnr": [20, 25], "ssim": [0.5, 0.8]})])
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=100, record=True, quiet=False, file=(tmp_path / "out").open("w"))
    table.print(console)
    text = console.export_text()
    assert "28.00" in text and "50.0%" in text and "LPIPS" not in text
    assert "(PSNR in dB)" in text


def _worker(rank: int, store: str, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    evaluate(Offset(), _batches(3, 2)[rank : rank + 1]).write_csv(Path(folder) / f"{rank}.csv")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    evaluate(Offset(), _batches(3, 2)).write_csv(tmp_path / "one.csv")
    whole = (tmp_path / "one.csv").read_text()
    assert (tmp_path / "0.csv").read_text() == whole == (tmp_path / "1.csv").read_text()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder with eight photos' worth of noise beside it; the codec is the fake one."""
    image = pytest.importorskip("PIL.Image")
    config = pytest.importorskip("omegaconf").OmegaConf.create
    for split, count in (("train", 1), ("val", 8)):
        (tmp_path / "images" / split).mkdir(parents=True)
        for index, picture in enumerate(_batches(count)[0].signal):
            image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "images" / split / f"{index}.png")
    data = {
        "_target_": "varitok.data.datasets.images.image_folder",
        "image_size": SIDE,
        "root": str(tmp_path / "images"),
    }
    monkeypatch.setattr(module, "load_run", lambda path: (Offset(), config({"data": data})))
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_the_command_writes_and_prints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = str(run.parent / "images")
    main([str(run), "--data", images, "--keep", "1,5", "--device", "cpu", "--workers", "0"])
    table = read_csv(run / "evaluation" / "images" / "evaluation.csv")
    assert table.column("k") == [1, 5] and table.column("images") == [8, 8]
    assert table.column("psnr") == pytest.approx([_level(4), 100], abs=1e-3)
    assert table.header["command"].startswith("varitok evaluate ") and "--keep 1,5" in table.header["command"]
    assert "bicubic" in table.header["protocol"] and "16 x 16" in table.header["protocol"]
    assert (run / "evaluation" / "images" / "evaluation.png").is_file()
    assert "36.09" in capsys.readouterr().out


def test_the_command_measures_all_of_a_test_set(run: Path) -> None:
    options = ["--keep", "5", "--device", "cpu", "--workers", "0"]
    main([str(run), *options])
    own = (run / "evaluation" / "evaluation.csv").read_bytes()
    main([str(run), "--data", str(run.parent / "images" / "val"), *options])
    table = read_csv(run / "evaluation" / "val" / "evaluation.csv")
    assert table.column("images") == [8] and table.header["dataset"].endswith("images/val, 8 images")
    assert (run / "evaluation" / "evaluation.csv").read_bytes() == own


def test_images_on_a_grid_are_measured_at_several_sizes(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, config = module.load_run(run)
    monkeypatch.setattr(module, "load_run", lambda path: (tiled_codec(), config))
    options = ["--keep", "1,2", "--metrics", "psnr", "--device", "cpu", "--workers", "0"]
    main([str(run), *options, "--size", "10,16", "--json"])
    sizes = json.loads(capsys.readouterr().out)["sizes"]
    assert [[row["bits"] for row in sizes[size]["rows"]] for size in ("10", "16")] == [
        pytest.approx([9 * math.log2(19), 18 * math.log2(19)]),  # 3 x 3 tokens, the last row and column filled up
        pytest.approx([16 * math.log2(19), 32 * math.log2(19)]),
    ]
    tables = [read_csv(run / "evaluation" / f"{size}_pixels" / "evaluation.csv") for size in sizes]
    assert ["10 x 10" in tables[0].header["protocol"], "16 x 16" in tables[1].header["protocol"]] == [True, True]
    for text, message in (("many", "--size many: give whole numbers"), ("1", "image_size=1: must be at least 2")):
        with pytest.raises(UserError, match=message):
            main([str(run), *options, "--size", text])


def test_test_sets_of_one_name_have_results_of_their_own(run: Path) -> None:
    sets = run.parent / "one" / "test", run.parent / "other" / "test"
    for data in sets:
        shutil.copytree(run.parent / "images" / "val", data)
    for data in (*sets, sets[0]):
        main([str(run), "--data", str(data), "--keep", "5", "--device", "cpu", "--workers", "0"])
    for data, name in zip(sets, ("test", "test_2"), strict=True):
        assert read_csv(run / "evaluation" / name / "evaluation.csv").header["folder"] == str(data.resolve())
    assert not (run / "evaluation" / "test_3").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "0"], "0 tokens to keep"),
        (["--keep", "9"], "9 tokens to keep"),
        (["--keep", "one"], "--keep one: give whole numbers"),
        (["--metrics", "pnsr"], "metric 'pnsr' is unknown"),
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--device", "warp"], "--device warp"),
        (["--batch-size", "0"], "--batch-size=0: must be at least 1"),
        (["--size", "64"], "--size: this codec's images have no other size; leave the option out"),
    ],
)
def test_a_mistake_is_told_in_one_line(words: list[str], message: str, run: Path) -> None:
    words = words if "--data" in words else [*words, "--data", str(run.parent / "images")]
    with pytest.raises(UserError) as told:
        main([str(run), "--workers", "0", "--device", "cpu", *words])
    assert message in str(told.value) and "\n" not in str(told.value)
