"""Perturbed latents in training, and the quality under replaced codes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from varitok import UserError
from varitok.codecs.bottlenecks.continuous import Autoencoder
from varitok.codecs.bottlenecks.contract import Bottleneck
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer
from varitok.codecs.bottlenecks.perturbation import Nearest, Noise, Perturbation, neighbors
from varitok.codecs.bottlenecks.vq import EMAVectorQuantizer, VectorQuantizer
from varitok.codecs.build import build
from varitok.codecs.evaluation import cli as command
from varitok.codecs.evaluation.evaluate import evaluate
from varitok.codecs.evaluation.robustness import (
    DERIVATIVES,
    FeatureExtractor,
    Replacement,
    Robustness,
    derivatives,
    robustness,
)
from varitok.codecs.layout import token_layout
from varitok.data.batch import Batch

from ..examples import EXAMPLES, example, tiled_codec

SIDE, BLOCK = 16, 4
PERTURBATIONS: dict[str, Callable[..., Perturbation]] = {"nearest": Nearest, "noise": Noise}


def _codebook(size: int = 64) -> VectorQuantizer:
    """Entries all over the cube of colors."""
    codebook = VectorQuantizer(3, size)
    codebook.codebook.data = torch.rand(size, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return codebook


def _perturbed(
    perturbation: Perturbation, bottleneck: Bottleneck, latents: Tensor, lengths: Tensor, depth: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the bottleneck's output, and the perturbed one."""
    depth = bottleneck.depths(latents) if depth is None else depth
    quantized = bottleneck(latents, lengths, depth)
    return quantized.latents, perturbation(bottleneck, latents, quantized, lengths, depth)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 30))
def test_neighbors_are_out_of_the_nearest_and_never_the_code(size: int, delta: int, n: int) -> None:
    random = torch.Generator().manual_seed(size * n)
    table = torch.randn(size, 3, generator=random) + 50
    codes = torch.randint(0, size, (2, 1, n), generator=random)
    found = neighbors(codes, table, delta, torch.rand(codes.shape, generator=random))
    distances = torch.cdist(table.double(), table.double())
    for code, other in zip(codes.flatten().tolist(), found.flatten().tolist(), strict=True):
        order = [entry for entry in distances[code].argsort().tolist() if entry != code][:delta]
        assert other in order if order else other == code


def test_every_neighbor_is_drawn() -> None:
    codes = torch.zeros(1, 1, 5, dtype=torch.int64)
    table = torch.tensor([[0.0], [3.0], [1.0], [2.0], [9.0], [4.0], [8.0]])
    found = neighbors(codes, table, 4, torch.tensor([[[0.0, 0.25, 0.5, 0.75, 0.9999999]]]))
    assert sorted(found.flatten().tolist()) == [1, 2, 3, 5, 5]


@pytest.mark.parametrize("name", EXAMPLES)
def test_noise_holds_for_every_bottleneck(name: str) -> None:
    """Kept tokens of some samples change, dropped ones don't, and the gradient is as before."""
    bottleneck = example(name)
    torch.manual_seed(1)  # not the example's: latents would be the entries
    latents = torch.randn(4, 6, bottleneck.inputs, requires_grad=True)
    lengths, depth = torch.tensor([6, 3, 1, 6]), bottleneck.depths(latents)
    depth[0] = min(1, len(bottleneck.codebook_sizes))
    whole, put = _perturbed(Noise(sigma=2.0, beta=0.5), bottleneck, latents, lengths, depth)
    assert put.shape == whole.shape and put.isfinite().all()
    assert torch.equal(put[2:], whole[2:]) and torch.equal(put[1, 3:], whole[1, 3:])
    if bottleneck.bits > 0 or not bottleneck.codebook_sizes:
        assert not torch.equal(put[:2], whole[:2])
    weight = torch.randn_like(put)
    (expected,) = torch.autograd.grad((whole * weight).sum(), latents, retain_graph=True)
    (found,) = torch.autograd.grad((put * weight).sum(), latents)
    torch.testing.assert_close(found, expected)


def test_noise_keeps_each_samples_codebooks() -> None:
    bottleneck = example("rvq").train()
    latents = torch.randn(3, 200, bottleneck.dim)
    lengths, depth = torch.full((3,), 200), torch.tensor([1, 2, 8])
    _perturbed(Noise(), bottleneck, latents, lengths)  # k-means
    bottleneck.update()
    _, put = _perturbed(Noise(sigma=1.0, beta=1.0), bottleneck, latents, lengths, depth)
    first = bottleneck.decode(torch.arange(256)[None, None])[0]
    away = [torch.cdist(sample, first, compute_mode="donot_use_mm_for_euclid_dist").amin(1) for sample in put]
    assert away[0].max() < 1e-4, "what the first codebook alone can say"
    assert away[2].mean() > 0.1, "and what it can't"


def test_perturbing_leaves_no_trace_in_moving_averages() -> None:
    bottleneck = EMAVectorQuantizer(3, 8)
    latents, lengths = torch.randn(4, 9, 3), torch.full((4,), 9)
    torch.manual_seed(0)
    bottleneck(latents, lengths, bottleneck.depths(latents))
    before = bottleneck.codebook.gathered.clone()
    quantized = bottleneck.eval()(latents, lengths, bottleneck.depths(latents))
    Noise(beta=1.0)(bottleneck.train(), latents, quantized, lengths, bottleneck.depths(latents))
    assert torch.equal(bottleneck.codebook.gathered, before)


@pytest.mark.parametrize("kind", PERTURBATIONS)
@pytest.mark.parametrize("off", [{"beta": 0.0}, {"alpha_start": 0.0, "alpha_end": 0.0}, {}])
def test_nothing_is_perturbed_at_a_rate_of_zero_or_in_evaluation(kind: str, off: dict[str, float]) -> None:
    perturbation = PERTURBATIONS[kind](**{"beta": 1.0} | off).train(bool(off))
    whole, put = _perturbed(perturbation, _codebook(), torch.randn(4, 9, 3), torch.full((4,), 9))
    assert torch.equal(whole, put)


def test_nearest_takes_entries_that_are_near() -> None:
    codebook, latents = _codebook(), torch.rand(8, 50, 3) * 2 - 1
    lengths = torch.full((8,), 50)
    whole, put = _perturbed(Nearest(delta=4, beta=1.0), codebook, latents, lengths)
    moved = (whole - put).norm(dim=-1)
    assert (moved > 0).all(), "alpha is 1 at first, and a neighbor is never the entry"
    distances = torch.cdist(whole.detach(), codebook.codebook.detach())
    assert (moved <= distances.sort(-1).values[..., 4] + 1e-5).all()
    _, far = _perturbed(Nearest(delta=63, beta=1.0), codebook, latents, lengths)
    assert moved.mean() < 0.7 * (whole - far).norm(dim=-1).mean()


def test_shares_of_samples_and_tokens_are_those_asked_for() -> None:
    perturbation = Nearest(delta=5, beta=0.3, alpha_start=0.25, alpha_end=0.25)
    codebook, latents, lengths = _codebook(), torch.rand(2, 40, 3) * 2 - 1, torch.full((2,), 40)
    torch.manual_seed(0)
    changed = torch.zeros(2)
    for _ in range(400):
        whole, put = _perturbed(perturbation, codebook, latents, lengths)
        changed += (whole != put).any(-1).float().mean(1) / 400
    assert changed.tolist() == pytest.approx([0.6 * 0.25, 0], abs=0.02), "0.3 of two samples are 0.6 of the first"


def test_the_same_seed_gives_the_same_perturbation() -> None:
    codebook, latents, lengths = _codebook(), torch.rand(4, 40, 3), torch.full((4,), 40)
    for kind in PERTURBATIONS.values():
        puts = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            puts.append(_perturbed(kind(beta=1.0, alpha_end=0.5, end=0.0, begin=0.0), codebook, latents, lengths)[1])
        assert torch.equal(puts[0], puts[1]) and not torch.equal(puts[0], puts[2])


def test_alpha_moves_between_two_points_of_the_run() -> None:
    perturbation = Noise(alpha_start=1.0, alpha_end=0.5, begin=0.2, end=0.6)
    found = []
    for progress in (0.0, 0.2, 0.4, 0.6, 1.0):
        perturbation.progress = progress
        found.append(perturbation.alpha)
    assert found == pytest.approx([1, 1, 0.75, 0.5, 0.5])


MODULE = "varitok.codecs.bottlenecks.perturbation"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: build({"_target_": f"{MODULE}.Noise", "beta": 1.1}), "beta=1.1"),
        (lambda: Noise(begin=0.5, end=0.4), "begin=0.5: must be at most codec.perturbation.end=0.4"),
        (lambda: build({"_target_": f"{MODULE}.Noise", "sigma": 0.0}), "sigma=0.0"),
        (lambda: build({"_target_": f"{MODULE}.Nearest", "delta": 0}), "delta=0"),
        (lambda: Nearest().check(FiniteScalarQuantizer([3, 3])), "FiniteScalarQuantizer is not one codebook"),
        (lambda: Nearest().check(example("rvq")), "perturbation=noise"),
        (lambda: robustness(Blocks(_codebook()), _batches(1), [0.0]), "rate of 0.0"),
        (lambda: robustness(Blocks(_codebook()), _batches(1), [0.5, 1.5]), "rate of 1.5"),
        (lambda: robustness(Blocks(_codebook()), _batches(1), []), "rate of nothing"),
        (lambda: robustness(Blocks(_codebook()), _batches(1), keep=17), "keeps from 1 to 16"),
        (lambda: robustness(Blocks(_codebook()), []), "no image"),
        (
            lambda: robustness(Blocks(FiniteScalarQuantizer([5, 5, 5])), _batches(1), ways=["nearest"]),
            "FiniteScalarQuantizer doesn't support 'nearest'; it supports noise, random",
        ),
        (lambda: derivatives(torch.zeros(1, 3, 7, 16)), "16 x 7 pixels"),
    ],
)
def test_a_mistake_is_told(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


class Blocks(nn.Module):
    """A token for the color of each block of 4 x 4 pixels: a neighbor is a color alike."""

    def __init__(self, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.bottleneck = bottleneck
        self.tokens, self.sample_rate = (SIDE // BLOCK) ** 2, None
        self.layout = token_layout((BLOCK, BLOCK), tokens=self.tokens)

    def bits(self, tokens: int, codebooks: int | None = None) -> float:
        return tokens * self.bottleneck.bits

    def latents(self, signal: Tensor) -> Tensor:
        assert not self.bottleneck.training
        return nn.functional.avg_pool2d(signal, BLOCK).flatten(2).transpose(1, 2)

    def encode(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.bottleneck.encode(self.latents(signal))

    def decode(self, codes: Tensor, size: Sequence[int] | None = None, lengths: Tensor | None = None) -> Tensor:
        colors = nn.functional.pad(self.bottleneck.decode(codes), (0, 0, 0, self.tokens - codes.shape[-1]))
        small = colors.transpose(1, 2).unflatten(2, (SIDE // BLOCK, -1))
        return nn.functional.interpolate(small, scale_factor=BLOCK)


def _batches(*sizes: int) -> list[Batch]:
    """Images of smooth colors."""
    random = torch.Generator().manual_seed(0)
    images = torch.rand(sum(sizes), 3, 4, 4, generator=random)
    images = nn.functional.interpolate(images, (SIDE, SIDE), mode="bilinear").mul(255).to(torch.uint8)
    return [Batch(part, torch.full((len(part),), SIDE), ()) for part in images.split(list(sizes))]


def _column(found: Robustness, way: str, name: str) -> list[float]:
    return [float(row[name]) for row in found.rows if row["way"] in ("none", way)]


def test_no_replacement_is_the_plain_evaluation() -> None:
    codec = Blocks(_codebook())
    found = robustness(codec, _batches(5, 3), [1.0])
    (plain,) = evaluate(codec, _batches(8), [codec.tokens], ["psnr"]).rows
    first = found.rows[0]
    assert (first["way"], first["rate"], first["changed"], first["psnr_drop"]) == ("none", 0, 0, 0)
    assert first["psnr"] == pytest.approx(plain["psnr"]) and first["images"] == 8
    assert codec.training and codec.bottleneck.training


def test_quality_falls_with_the_rate_and_less_for_neighbors() -> None:
    found = robustness(Blocks(_codebook()), _batches(64), [0.5, 0.1, 1.0], replacement=Replacement(delta=4, sigma=0.2))
    assert [row["way"] for row in found.rows] == ["none", *["nearest"] * 3, *["noise"] * 3, *["random"] * 3]
    for way in ("nearest", "noise", "random"):
        for name in ("psnr_drop", "derivatives", "changed"):
            column = _column(found, way, name)
            assert column == sorted(column) and column[0] < column[1] < column[3], (way, name)
        assert _column(found, way, "rate") == [0, 0.1, 0.5, 1]
    changed = _column(found, "nearest", "changed")
    assert changed == pytest.approx([0, 0.1, 0.5, 1], abs=0.03) and changed[3] == 1
    for name in ("psnr_drop", "derivatives"):
        assert _column(found, "nearest", name)[3] < 0.7 * _column(found, "random", name)[3], name


def test_farther_neighbors_hurt_more() -> None:
    drops = []
    for delta, sigma in ((1, 0.05), (8, 0.3), (60, 2.0)):
        found = robustness(Blocks(_codebook()), _batches(32), [0.5], replacement=Replacement(delta, sigma))
        drops.append([_column(found, way, "psnr_drop")[1] for way in ("nearest", "noise")])
    for column in zip(*drops, strict=True):
        assert list(column) == sorted(column) and column[0] < column[2]


def test_numbers_hang_on_the_seed_and_not_on_batches() -> None:
    codec = Blocks(_codebook())
    whole, parts = (robustness(codec, _batches(*sizes), [0.3]).rows for sizes in ((8,), (1, 5, 2)))
    for row, other in zip(whole, parts, strict=True):
        assert row == pytest.approx(other)
    (_, seeded, *_) = robustness(codec, _batches(8), [0.3], replacement=Replacement(seed=1)).rows
    assert seeded["psnr"] != whole[1]["psnr"]


def test_any_features_will_do() -> None:
    brightness = FeatureExtractor(lambda images: images.float().mean((1, 2, 3))[:, None], 1, "mean brightness")
    found = robustness(Blocks(_codebook()), _batches(8), [1.0], features={"glow": brightness}, ways=["random"])
    assert found.rows[1]["glow"] > found.rows[0]["glow"] and "derivatives" not in found.rows[0]
    assert found.header["column glow"] == "mean brightness"


def test_fewer_tokens_and_other_bottlenecks() -> None:
    grid = robustness(Blocks(FiniteScalarQuantizer([5, 5, 5])), _batches(4), [0.5], keep=7)
    assert {row["way"] for row in grid.rows} == {"none", "noise", "random"} and grid.rows[0]["k"] == 7
    whole = robustness(Blocks(FiniteScalarQuantizer([5, 5, 5])), _batches(4), [0.5])
    assert whole.rows[0]["psnr"] > grid.rows[0]["psnr"]
    continuous = robustness(Blocks(Autoencoder(3)), _batches(4), [1.0])
    assert [row["way"] for row in continuous.rows] == ["none", "noise"] and continuous.rows[1]["psnr_drop"] > 1


def test_of_tokens_on_a_grid_fewer_codebooks_are_kept() -> None:
    codec = tiled_codec()
    batches = [batch._replace(signal=batch.signal[..., :10]) for batch in _batches(2, 3)]
    whole, half = (robustness(codec, batches, [1.0], keep=keep) for keep in (None, 1))
    assert [row["codebooks"] for row in whole.rows] == [2] * 3 and {row["codebooks"] for row in half.rows} == {1}
    assert [row["way"] for row in half.rows] == ["none", "noise", "random"] and half.rows[0]["images"] == 5
    (plain,) = evaluate(codec, batches, [1], ["psnr"]).rows
    assert half.rows[0]["psnr"] == pytest.approx(plain["psnr"]) and half.rows[2]["changed"] > 0.8
    with pytest.raises(UserError, match="3 codebooks to keep: this codec keeps from 1 to 2"):
        robustness(codec, batches, keep=3)


def test_codebooks_too_large_to_count_and_none_at_all_are_evaluated() -> None:
    (large,) = evaluate(Blocks(FiniteScalarQuantizer([4096, 4096, 4096])), _batches(4), [16], ["psnr"]).rows
    assert large["usage"] == pytest.approx(64 / 2**36) and large["entropy"] == pytest.approx(6)
    (continuous,) = evaluate(Blocks(Autoencoder(3)), _batches(4), [16], ["psnr"]).rows
    assert continuous["bytes"] == 16 * 3 * 4 and "usage" not in continuous


def test_derivatives_see_what_they_are_named_for() -> None:
    flat = torch.full((2, 3, 12, 12), 7, dtype=torch.uint8)
    flat[1] += 10
    means = derivatives(flat)
    assert means.shape == (2, DERIVATIVES.width)
    assert means[:, :3].tolist() == [[7] * 3, [17] * 3] and not means[:, 3:].any()
    ramp = torch.arange(0, 48, 4, dtype=torch.uint8).expand(1, 3, 12, 12)
    found = derivatives(ramp)[0, 3:].view(3, 5, 3)  # scale; deviation, two of rows, two of columns; channel
    assert found[:, 1:3].abs().max() == 0, "no change from row to row"
    assert found[:, 3, 0].tolist() == [4, 8, 16] and found[:, 4].abs().max() == 0


def _worker(rank: int, store: str, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    robustness(Blocks(_codebook()), _batches(3, 2)[rank : rank + 1], [0.4]).write_csv(Path(folder) / f"{rank}.csv")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    mp.spawn(_worker, (str(tmp_path / "store"), str(tmp_path)), nprocs=2)
    robustness(Blocks(_codebook()), _batches(3, 2), [0.4]).write_csv(tmp_path / "one.csv")
    whole = (tmp_path / "one.csv").read_text()
    assert (tmp_path / "0.csv").read_text() == whole == (tmp_path / "1.csv").read_text()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    image = pytest.importorskip("PIL.Image")
    config = pytest.importorskip("omegaconf").OmegaConf.create
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for index, picture in enumerate(_batches(4)[0].signal):
            image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / "images" / split / f"{index}.png")
    data = {
        "_target_": "varitok.data.datasets.images.image_folder",
        "image_size": SIDE,
        "root": str(tmp_path / "images"),
    }
    monkeypatch.setattr(command, "load_run", lambda path: (Blocks(_codebook()), config({"data": data})))
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_the_command_writes_a_row_for_each_way_and_rate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--workers", "0", "--metrics", "psnr"]
    command.main([str(run), *options, "--robustness", "0.1,0.5"])
    lines = (run / "evaluation" / "robustness.csv").read_text().splitlines()
    names, *rows = [line.split(",") for line in lines if not line.startswith("#")]
    assert names[:6] == ["way", "rate", "k", "changed", "psnr", "psnr_drop"] and "derivatives" in names
    assert [row[:2] for row in rows[:4]] == [["none", "0"], ["nearest", "0.1"], ["nearest", "0.5"], ["noise", "0.1"]]
    assert any(line.startswith("# column derivatives: ") and "not comparable" in line for line in lines)
    assert "replaced tokens" in capsys.readouterr().out
    for text in ("0", "much", "0.5,2"):
        with pytest.raises(UserError, match=f"--robustness {text}: give shares"):
            command.main([str(run), *options, "--robustness", text])
