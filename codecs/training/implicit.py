"""Fitting a codec of one clip to it."""

from torch import Tensor

from varitok.data.batch import Batch

from ..implicit.codec import ImplicitCodec
from ..result import Reconstruction
from .module import CodecTraining

__all__ = ["ClipTraining"]


class ClipTraining(CodecTraining):
    """Trains an `ImplicitCodec`: each sample is a segment of the clip, selected by its index."""

    codec: ImplicitCodec

    def reconstruct(self, batch: Batch, real: Tensor) -> Reconstruction:
        """Paint the batch's frames."""
        assert batch.sample_indices is not None
        n_codebooks = self.draw(batch).n_codebooks if self.codec.length.codebooks else None
        return self.codec.frames(batch.sample_indices * real.shape[2], real.shape[2], n_codebooks)
