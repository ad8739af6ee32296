"""Quality under perturbed codes: what a decoder makes of a generator's mistakes (pFID, RobustTok, arXiv 2503.08354).

A share of each image's tokens is replaced by neighbors, and the reconstructions are compared with the originals: by
the Fréchet distance on any network's features (on Inception's it is pFID), by that on `DERIVATIVES`, a fixed map
without weights, and by the loss in PSNR. `codecs/bottlenecks/perturbation.py` defines neighbors.
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
from .table import wide_console, write_rows

__all__ = [
    "DERIVATIVES", "FeatureExtractor", "Replacement", "Robustness", "available_features", "derivatives",
    "evaluation_mode", "robustness",
]  # fmt: skip

Way = Literal["nearest", "noise", "random"]
SCALES = (1, 2, 4)


class FeatureExtractor(NamedTuple):
    """Features whose Fréchet distance is taken.

    Attributes:
        features: uint8 images `(b, 3, h, w)` to `(b, width)`.
        width: How many.
        meaning: In the words that go above a table.
    """

    features: frechet.Features
    width: int
    meaning: str


def derivatives(images: Tensor) -> Tensor:
    """Describe images by their local derivatives on three scales: a map without weights, and no network's (ours).

    On the image and its averages over 2 x 2 and 4 x 4 pixels: the standard deviation of each channel, and mean and
    standard deviation of the sizes of its differences along either axis; besides, each channel's mean.

    Args:
        images: `(b, 3, h, w)`, 8-bit values; both sides at least 8.

    Returns:
        `(b, 48)`, in grey levels.

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
    """Return the available feature maps: `derivatives`, and `pfid` if Inception's weights are on this machine."""
    maps = {"derivatives": DERIVATIVES}
    if frechet.available():
        meaning = f"pFID (arXiv 2503.08354): {frechet.RFID.definition}"
        maps["pfid"] = FeatureExtractor(frechet.inception(device), frechet.WIDTH, meaning)
    return maps


@contextmanager
def evaluation_mode(codec: object) -> Iterator[torch.device]:
    """Put a codec into evaluation mode for a while and give its device; each of its modules gets its own mode back."""
    modes = {module: module.training for module in codec.modules()} if isinstance(codec, nn.Module) else {}
    parameter = next(codec.parameters(), None) if isinstance(codec, nn.Module) else None
    try:
        for module in modes:
            module.training = False
        yield parameter.device if parameter is not None else torch.device("cpu")
    finally:
        for module, mode in modes.items():
            module.training = mode


class Replacement(NamedTuple):
    """How tokens are replaced.

    The chance of an image depends on the seed and its pixels alone: neither batches nor processes change it, and a
    higher rate replaces what a lower one does, and more.

    Attributes:
        delta: Number of nearest entries to draw from, if the bottleneck is one codebook of vectors ("nearest").
        sigma: Noise on the latents, in their root mean square, before they are quantized again ("noise").
        seed: Seed of all random draws.
    """

    delta: int = 100
    sigma: float = 0.3
    seed: int = 0

    def ways(self, bottleneck: Bottleneck) -> list[Way]:
        """List the ways that a bottleneck has."""
        had = {
            "nearest": codebook_table(bottleneck) is not None,
            "noise": True,
            "random": bool(bottleneck.codebook_sizes),
        }
        return [way for way in get_args(Way) if had[way]]

    def propose(
        self, bottleneck: Bottleneck, latents: Tensor, real: Tensor, ways: Sequence[Way]
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Encode latents `(b, n, d)`, and return what would replace each token.

        Args:
            bottleneck: In evaluation mode.
            latents: Latents of images.
            real: The images, uint8 `(b, 3, h, w)`.
            ways: Ways of replacing, out of those that the bottleneck has.

        Returns:
            The codes `(b, codebooks, n)`; `(b, n)` uniform in [0, 1), below the rate where a token is replaced; and
            codes `(b, codebooks, n)` for each way.
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
        # In 32 bits: of a larger seed torch's generator takes the lower half.
        key = zlib.crc32(picture.contiguous().numpy().tobytes(), zlib.crc32(str(self.seed).encode()))
        random = torch.Generator().manual_seed(key)
        order, rank = torch.rand(n, generator=random), torch.rand(n, generator=random)
        uniform = torch.rand(rows, n, generator=random, dtype=torch.float64)
        return order, rank, torch.randn(n, d, generator=random), uniform


class Robustness(NamedTuple):
    """What `robustness` found.

    Attributes:
        rows: First without replacement (way "none"), then each way at each rate.
        header: What the numbers mean.
    """

    rows: list[dict[str, float | str]]
    header: dict[str, str]

    def write_csv(self, path: Path) -> None:
        """Write the rows, the header as comment lines above them."""
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
    tokens: int | None = None,
    features: Mapping[str, FeatureExtractor] | None = None,
    replacement: Replacement = Replacement(),  # noqa: B008 (it can't be changed)
    header: Mapping[str, str] | None = None,
) -> Robustness:
    """Measure what comes back when a share of each image's tokens is replaced.

    Where torch.distributed is running, every process must call this with its own share of the images, and all get the
    numbers of the whole.

    Args:
        codec: Evaluated on its own device, in evaluation mode; its modes are restored.
        batches: Images `(b, 3, h, w)`, of the size that the codec decodes to; empty batches are passed over.
        rates: Shares of tokens, in (0, 1]; any others are sorted.
        ways: Ways of replacing: "nearest" entries of the table, codes under "noise", "random" codes; if None all those
            that the bottleneck has.
        tokens: Number of tokens to keep; all if None.
        features: Maps whose Fréchet distance is taken, by column; `derivatives` alone if None.
        replacement: How tokens are replaced.
        header: What goes above the rows, before what the numbers mean.

    Raises:
        UserError: A rate or the number of tokens is out of range, the bottleneck doesn't have a way, or there is no
            image.
    """
    kept = codec.tokens if tokens is None else tokens
    wrong = [rate for rate in rates if not 0 < rate <= 1]
    if wrong or not rates:
        raise UserError(f"robustness at a rate of {wrong[0] if wrong else 'nothing'}: give shares in (0, 1]")
    if not 1 <= kept <= codec.tokens:
        raise UserError(f"{kept} tokens to keep: this codec keeps from 1 to {codec.tokens}")
    had = replacement.ways(codec.bottleneck)
    lacking = [way for way in ways or () if way not in had]
    if lacking:
        raise UserError(f"{type(codec.bottleneck).__name__} has no way {lacking[0]!r}; it has {', '.join(had)}")
    maps = {"derivatives": DERIVATIVES} if features is None else features
    with evaluation_mode(codec) as device:
        sums = _Sums(list(ways or had), sorted(set(rates)), maps, device)
        for batch in batches:
            if len(batch.signal):
                sums.add(codec, normalize(batch.signal.to(device)), kept, replacement)
    meanings = {f"column {name}": text for name, text in _meanings(sums.ways, replacement, maps).items()}
    return Robustness(sums.rows(kept), dict(header or {}) | meanings)


class _Sums:
    """Sums over images from which the rows follow; those of several processes add up."""

    def __init__(
        self, ways: list[Way], rates: list[float], maps: Mapping[str, FeatureExtractor], device: torch.device
    ) -> None:
        self.cases: list[tuple[str, float]] = [("none", 0.0), *((way, rate) for way in ways for rate in rates)]
        self.ways = ways
        self.maps = maps
        self.device = device
        self.images = torch.zeros((), dtype=torch.float64)
        self.sums = torch.zeros(len(self.cases), 2, dtype=torch.float64)  # PSNR, share of codes changed
        # Of the originals, then of each case.
        self.moments = {
            name: [frechet.Moments(mapped.width) for _ in range(1 + len(self.cases))] for name, mapped in maps.items()
        }

    def add(self, codec: Codec, signal: Tensor, kept: int, replacement: Replacement) -> None:
        """Take in images."""
        real = to_uint8(signal)
        self.images += len(real)
        for name, mapped in self.maps.items():
            self.moments[name][0].add(mapped.features(real))
        codes, order, others = replacement.propose(codec.bottleneck, codec.latents(signal), real, self.ways)
        given = codes[..., :kept]
        for case, (way, rate) in enumerate(self.cases):
            chosen = (order < rate)[:, None, :kept]
            put = torch.where(chosen, others[way][..., :kept], given) if way in others else given
            fake = to_uint8(codec.decode(put))
            if fake.shape != real.shape:
                raise UserError("the codec gives back images of another size: evaluate at the size of its training")
            changed = (put != given).double().mean((1, 2))
            self.sums[case] += torch.stack([image.psnr(fake, real).double(), changed], 1).sum(0).cpu()
            for name, mapped in self.maps.items():
                self.moments[name][1 + case].add(mapped.features(fake))

    def rows(self, kept: int) -> list[dict[str, float | str]]:
        """Add up over processes; return a row for each case.

        Raises:
            UserError: There is not one image.
        """
        if world_size() > 1:
            sums = [self.images, self.sums]
            sums += [t for found in self.moments.values() for m in found for t in (m.count, m.sum, m.outer)]
            shared = sum_over_ranks([values.to(self.device) for values in sums])  # NCCL wants it on the device
            for values, total in zip(sums, shared, strict=True):
                values.copy_(total)
        if not self.images:
            raise UserError("no image to evaluate")
        psnr, changed = (self.sums / self.images).T.tolist()
        rows: list[dict[str, float | str]] = []
        for case, (way, rate) in enumerate(self.cases):
            row: dict[str, float | str] = {"way": way, "rate": rate, "k": kept, "changed": changed[case]}
            row |= {"psnr": psnr[case], "psnr_drop": psnr[0] - psnr[case]}
            row |= {name: frechet.frechet_distance(m[1 + case], m[0]) for name, m in self.moments.items()}
            rows.append(row | {"images": int(self.images)})
        return rows


def _meanings(ways: Sequence[Way], replacement: Replacement, maps: Mapping[str, FeatureExtractor]) -> dict[str, str]:
    """Return the definitions of the columns."""
    said = {
        "nearest": f"one of the {replacement.delta} nearest entries of the codebook, without the token's own",
        "noise": f"the codes of the latents with Gaussian noise of {replacement.sigma:g} root mean squares",
        "random": "codes drawn evenly",
    }
    told = "; ".join(f"{way}: {said[way]}" for way in ways)
    return {
        "way": f"what tokens are replaced by (seed {replacement.seed}): {told}",
        "rate": "share of the tokens that are replaced, all codebooks of each",
        "changed": "share of the codes that this has changed",
        "psnr": image.PSNR.definition,
        "psnr_drop": "dB lost against the row without replacement",
    } | {name: mapped.meaning for name, mapped in maps.items()}
