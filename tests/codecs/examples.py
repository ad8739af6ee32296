"""Small codecs that the tests share."""

from collections.abc import Callable

from varitok.codecs.bottlenecks.contract import Bottleneck
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer
from varitok.codecs.bottlenecks.vq import VectorQuantizer
from varitok.codecs.codec import Codec
from varitok.codecs.lengths import LengthPolicy, MaskToken, Mechanism, Truncate, Uniform
from varitok.codecs.networks.register_vit import RegisterDecoder, RegisterEncoder

WIDTH, TOKENS, SIZE, PATCH = 16, 6, 16, 8

BOTTLENECKS: dict[str, Callable[[], Bottleneck]] = {
    "fsq": lambda: FiniteScalarQuantizer([8, 5, 5]),
    "fsq_even": lambda: FiniteScalarQuantizer([4, 6]),
    "vq": lambda: VectorQuantizer(5, 37),
    "vq_cosine": lambda: VectorQuantizer(5, 37, cosine=True),
}
MECHANISMS: dict[str, Callable[[], Mechanism]] = {"truncate": Truncate, "mask_token": lambda: MaskToken(WIDTH)}
# A run of seconds, as overrides of train.yaml; those who use it add `updates`, `callbacks` and `export`.
TINY_RUN = [
    "experiment=image/demo",
    "data.image_size=16",
    "data.length=12",
    "data.val_length=5",
    "codec.encoder.tokens=4",
    "codec.encoder.width=16",
    "codec.encoder.depth=1",
    "loader.batch_size=3",
    "loader.workers=0",
    "checkpoint_every=2",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
]


def tiny_codec(bottleneck: str = "fsq", mechanism: str = "truncate", shortcut: bool = True) -> Codec:
    """Make a codec of 16 x 16 images, 6 tokens."""
    sizes = {"image_size": SIZE, "patch": PATCH, "tokens": TOKENS, "width": WIDTH, "depth": 1, "heads": 2}
    return Codec(
        RegisterEncoder(**sizes, shortcut=shortcut),
        BOTTLENECKS[bottleneck](),
        RegisterDecoder(**sizes, shortcut=shortcut),
        LengthPolicy(Uniform(), MECHANISMS[mechanism]()),
        unit_latents=shortcut,
    )
