"""Robustness of a decoder to wrong tokens, such as a generator's errors (pFID, RobustTok, arXiv 2503.08354).

A share of each image's tokens is replaced, and the reconstructions are compared with the originals by PSNR and by
Fréchet distances: on Inception's features (pFID), and on `DERIVATIVES`, fixed features without weights.
`codecs/bottlenecks/perturbation.py` defines a token's neighbors.
"""

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import rich.box
import torch
from rich.table import Table as RichTable
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError
from varitok.data.batch import Batch, normalize, to_uint8

from ..bottlenecks.contract import Bottleneck
from ..bottlenecks.perturbation import add_noise, codebook_table, neighbors
from ..codec import Codec
from ..distributed import sum_over_ranks, world_size
from ..metrics import frechet, image
from ..precision import exact_float32
from .ladder import Code, Ladder
from .table import wide_console, write_rows

__all__ = [
    "DERIVATIVES", "FeatureExtractor", "Replacement", "Robustness", "available_features", "derivatives",
    "evaluation_mode", "robustness",
]  # fmt: skip

Way = Literal["nearest", "noise", "random"]
SCALES = (1, 2, 4)


class FeatureExtractor(NamedTuple):
    """A feature extractor for a Fréchet distance.

    Attributes:
        features: Function of uint8 images `(b, 3, h, w)` to features `(b, width)`.
        width: Number of features.
        meaning: Definition of the distance, for a table's header.
    """

    features: frechet.Features
    width: int
    meaning: str


def derivatives(images: Tensor) -> Tensor:
    """Compute statistics of images' local derivatives at three scales, features without a network (ours).

    The scales are the image, and its averages over 2 x 2 and 4 x 4 pixels. Each has, per channel, the standard
    deviation of the pixels, and mean and standard deviation of |differences| of neighbors along each axis. Each
    channel's mean is added.

    Args:
        images: `(b, 3, h, w)`, 8-bit values; both sides at least 8 pixels.

    Returns:
        Features `(b, 48)`, in 8-bit levels.

    Raises:
        UserError: A side has fewer than 8 pixels.
    """
    if min(images.shape[-2:]) < 2 * SCALES[-1]:
        size = f"{images.shape[-1]} x {images.shape[-2]}"
        raise UserError(f"derivatives of images of {size} pixels: both sides must be at least {2 * SCALES[-1]}")
    pixels = images.float()
    found = [pixels.mean((2, 3))]
    for scale in SCALES:
        pooled = functional.avg_pool2d(pixels, scale)
        found.append(pooled.std((2, 3), correction=0))
        for axis in (2, 3):
            sizes = pooled.diff(dim=axis).abs()
            found += [sizes.mean((2, 3)), sizes.std((2, 3), correction=0)]
    return torch.cat(found, 1)


DERIVATIVES = FeatureExtractor(
    derivatives,
    3 + 15 * len(SCALES),
    "Fréchet distance of originals and reconstructions on 48 statistics of local derivatives at three scales, 8 bit,"
    " squared grey levels; no network, and not comparable with FID; lower is better",
)


def available_features(device: torch.device) -> dict[str, FeatureExtractor]:
    """Return the feature extractors: `derivatives`, and `pfid` if Inception's weights are on this machine."""
    maps = {"derivatives": DERIVATIVES}
    if frechet.available():
        meaning = f"pFID (arXiv 2503.08354): {frechet.RFID.definition}"
        maps["pfid"] = FeatureExtractor(frechet.inception(device), frechet.WIDTH, meaning)
    return maps


@contextmanager
def evaluation_mode(codec: object) -> Iterator[torch.device]:
    """Set a codec to evaluation mode and exact float32 within the context, which yields its device; restore both."""
    modes = {module: module.training for module in codec.modules()} if isinstance(codec, nn.Module) else {}
    parameter = next(codec.parameters(), None) if isinstance(codec, nn.Module) else None
    try:
        for module in modes:
            module.training = False
        with exact_float32():
            yield parameter.device if parameter is not None else torch.device("cpu")
    finally:
        for module, mode in modes.items():
            module.training = mode


class Replacement(NamedTuple):
    """Random replacement of tokens.

    An image's random draws depend only on the seed and its pixels, not on batches or processes. A higher rate replaces
    a superset of the tokens.

    Attributes:
        delta: Number of nearest codebook entries to draw from ("nearest"; for a single codebook of vectors).
        sigma: Standard deviation of the noise on latents before quantization, relative to their RMS ("noise").
        seed: Seed of all random draws.
    """

    delta: int = 100
    sigma: float = 0.3
    seed: int = 0

    def ways(self, bottleneck: Bottleneck) -> list[Way]:
        """List the ways of replacing tokens that a bottleneck supports."""
        had = {
            "nearest": codebook_table(bottleneck) is not None,
            "noise": True,
            "random": bool(bottleneck.codebook_sizes),
        }
        return [way for way in get_args(Way) if had[way]]

    def propose(
        self, bottleneck: Bottleneck, latents: Tensor, real: Tensor, ways: Sequence[Way]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Encode latents, and draw a replacement of each token.

        Args:
            bottleneck: Bottleneck in evaluation mode.
            latents: Latents of images, `(b, n, d)`.
            real: The images, uint8 `(b, 3, h, w)`.
            ways: Ways of replacing tokens that the bottleneck supports.

        Returns:
            The codes `(b, codebooks, n)`; draws `(b, n)`, uniform in [0, 1), for replacing tokens whose draw is below
            the rate; and each way's replacement codes `(b, codebooks, n)`.
        """
        codes = bottleneck.encode(latents)
        n, d = latents.shape[1:]
        draws = [self._draws(picture, n, d, bottleneck.rows) for picture in real.cpu()]
        order, rank, noise, uniform = (torch.stack(parts).to(latents.device) for parts in zip(*draws, strict=True))
        others: dict[str, Tensor] = {}
        if "nearest" in ways:
            table = codebook_table(bottleneck)
            assert table is not None, "not among the bottleneck's ways"
            others["nearest"] = neighbors(codes, table, self.delta, rank[:, None])
        if "noise" in ways:
            others["noise"] = bottleneck.encode(add_noise(latents, noise, self.sigma))
        if "random" in ways:  # float64 is exact below 2^53 entries
            sizes = torch.tensor(bottleneck.codebook_sizes, dtype=torch.float64, device=codes.device)[:, None]
            others["random"] = (uniform * sizes).long()
        return codes, order, others

    def _draws(self, picture: Tensor, n: int, d: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # A key of 32 bits: torch's CPU generator ignores higher bits of a seed.
        key = zlib.crc32(picture.contiguous().numpy().tobytes(), zlib.crc32(str(self.seed).encode()))
        random = torch.Generator().manual_seed(key)
        order, rank = torch.rand(n, generator=random), torch.rand(n, generator=random)
        uniform = torch.rand(rows, n, generator=random, dtype=torch.float64)
        return order, rank, torch.randn(n, d, generator=random), uniform


class Robustness(NamedTuple):
    """Result of `robustness`.

    Attributes:
        rows: A row without replacement (way "none"), then one for each way and rate.
        header: Definitions of the columns, and provenance.
    """

    rows: list[dict[str, float | str]]
    header: dict[str, str]

    def write_csv(self, path: Path) -> None:
        """Write the rows as CSV, with the header as comment lines."""
        write_rows(path, self.header, self.rows)

    def print(self) -> None:
        """Print the rows."""
        title = "Quality under replaced tokens (PSNR in dB)"
        shown = RichTable(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left")
        for name in self.rows[0]:
            shown.add_column(name, justify="left" if name == "way" else "right")
        for row in self.rows:
            shown.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
        wide_console().print(shown)


@torch.inference_mode()
def robustness(
    codec: Codec,
    batches: Iterable[Batch],
    rates: Sequence[float] = (0.1,),
    *,
    ways: Sequence[Way] | None = None,
    keep: int | None = None,
    features: Mapping[str, FeatureExtractor] | None = None,
    replacement: Replacement = Replacement(),  # noqa: B008 (it can't be changed)
    header: Mapping[str, str] | None = None,
) -> Robustness:
    """Measure the quality of reconstructions from codes in which a share of each image's tokens is replaced.

    Under torch.distributed this is a collective: every process calls it with its own shard of the images and gets the
    result of all.

    Args:
        codec: Codec to evaluate, on its own device, in evaluation mode; its training modes are restored.
        batches: Batches of images `(b, 3, h, w)`, of the size of training if tokens are ordered; empty batches are
            skipped.
        rates: Shares of tokens to replace, in (0, 1], in any order.
        ways: Ways of replacing tokens: "nearest" codebook entries, codes of latents with "noise", "random" codes; None
            for all that the bottleneck supports.
        keep: Number of tokens, or of codebooks of tokens on a grid, to keep; all if None.
        features: Feature extractors for Fréchet distances, by column; `derivatives` alone if None.
        replacement: Parameters of the replacement.
        header: Entries above the rows, before the definitions.

    Raises:
        UserError: A rate or the number to keep is out of range, the bottleneck doesn't support a way, or there is no
            image.
    """
    ladder = Ladder(codec, None if keep is None else [keep])
    wrong = [rate for rate in rates if not 0 < rate <= 1]
    if wrong or not rates:
        raise UserError(f"robustness at a rate of {wrong[0] if wrong else 'nothing'}: give shares in (0, 1]")
    had = replacement.ways(codec.bottleneck)
    lacking = [way for way in ways or () if way not in had]
    if lacking:
        raise UserError(
            f"{type(codec.bottleneck).__name__} doesn't support {lacking[0]!r}; it supports {', '.join(had)}"
        )
    maps = {"derivatives": DERIVATIVES} if features is None else features
    with evaluation_mode(codec) as device:
        sums = _Sums(list(ways or had), sorted(set(rates)), maps, device)
        for batch in batches:
            if len(batch.signal):
                sums.add(codec, normalize(batch.signal.to(device)), ladder, replacement)
    meanings = {f"column {name}": text for name, text in _meanings(sums.ways, replacement, maps).items()}
    return Robustness(sums.rows(ladder), dict(header or {}) | meanings)


class _Sums:
    """Sums over images, which processes add up, and the rows computed from them."""

    def __init__(
        self, ways: list[Way], rates: list[float], maps: Mapping[str, FeatureExtractor], device: torch.device
    ) -> None:
        self.cases: list[tuple[str, float]] = [("none", 0.0), *((way, rate) for way in ways for rate in rates)]
        self.ways = ways
        self.maps = maps
        self.device = device
        self.images = torch.zeros((), dtype=torch.float64)
        self.sums = torch.zeros(len(self.cases), 2, dtype=torch.float64)  # PSNR, share of codes changed
        # One for the originals, then one for each case.
        self.moments = {
            name: [frechet.Moments(mapped.width) for _ in range(1 + len(self.cases))] for name, mapped in maps.items()
        }

    def add(self, codec: Codec, signal: Tensor, ladder: Ladder, replacement: Replacement) -> None:
        """Evaluate a batch of images `(b, 3, h, w)` and accumulate its sums."""
        real = to_uint8(signal)
        self.images += len(real)
        for name, mapped in self.maps.items():
            self.moments[name][0].add(mapped.features(real))
        codes, order, others = replacement.propose(codec.bottleneck, codec.latents(signal), real, self.ways)
        layout, keep, size = codec.layout, ladder.keeps[-1], signal.shape[2:]
        tokens, grid = torch.full_like(codes[:, 0, 0], codes.shape[2], dtype=torch.int64), layout.grid(size)
        for case, (way, rate) in enumerate(self.cases):
            put = torch.where((order < rate)[:, None], others[way], codes) if way in others else codes
            fake = to_uint8(ladder.decode(Code(layout.to_grid(put, len(put), grid), tokens, size), keep))
            if fake.shape != real.shape:
                raise UserError("the codec decodes to images of another size: evaluate at the size of its training")
            changed = (put != codes).narrow(layout.cut_axis, 0, keep).double().mean((1, 2))
            self.sums[case] += torch.stack([image.psnr(fake, real).double(), changed], 1).sum(0).cpu()
            for name, mapped in self.maps.items():
                self.moments[name][1 + case].add(mapped.features(fake))

    def rows(self, ladder: Ladder) -> list[dict[str, float | str]]:
        """Sum over processes and return a row for each case.

        Raises:
            UserError: There is no image.
        """
        if world_size() > 1:
            sums = [self.images, self.sums]
            sums += [t for found in self.moments.values() for m in found for t in (m.count, m.sum, m.outer)]
            shared = sum_over_ranks([values.to(self.device) for values in sums])  # NCCL needs device tensors
            for values, total in zip(sums, shared, strict=True):
                values.copy_(total)
        if not self.images:
            raise UserError("no image to evaluate")
        psnr, changed = (self.sums / self.images).T.tolist()
        rows: list[dict[str, float | str]] = []
        for case, (way, rate) in enumerate(self.cases):
            row: dict[str, float | str] = {"way": way, "rate": rate, ladder.axis: ladder.keeps[-1]}
            row |= {"changed": changed[case], "psnr": psnr[case], "psnr_drop": psnr[0] - psnr[case]}
            row |= {name: frechet.frechet_distance(m[1 + case], m[0]) for name, m in self.moments.items()}
            rows.append(row | {"images": int(self.images)})
        return rows


def _meanings(ways: Sequence[Way], replacement: Replacement, maps: Mapping[str, FeatureExtractor]) -> dict[str, str]:
    """Return the definitions of the columns."""
    said = {
        "nearest": f"one of the {replacement.delta} nearest entries of the codebook, without the token's own",
        "noise": f"the codes of the latents plus Gaussian noise of {replacement.sigma:g} times their RMS",
        "random": "codes drawn uniformly",
    }
    replacements = "; ".join(f"{way}: {said[way]}" for way in ways)
    return {
        "way": f"replacement of tokens (seed {replacement.seed}): {replacements}",
        "rate": "share of the tokens that are replaced, all codebooks of each",
        "changed": "share of the codes that the replacement changed",
        "psnr": image.PSNR.definition,
        "psnr_drop": "dB below the row without replacement",
    } | {name: mapped.meaning for name, mapped in maps.items()}
