"""Training of an implicit codec, which is fitted to one clip."""

from torch import Tensor

from varitok.data.batch import Batch

from ..implicit.codec import ImplicitCodec
from ..result import Reconstruction
from .module import CodecTraining

__all__ = ["ClipTraining"]


class ClipTraining(CodecTraining):
    """The training module of an `ImplicitCodec`; each sample is a segment of the clip, selected by its index."""

    codec: ImplicitCodec

    def reconstruct(self, batch: Batch, real: Tensor) -> Reconstruction:
        """Decode the batch's frames from their indices."""
        assert batch.sample_indices is not None
        n_codebooks = self.draw(batch).n_codebooks if self.codec.length.codebooks else None
        return self.codec.frames(batch.sample_indices * real.shape[2], real.shape[2], n_codebooks)
