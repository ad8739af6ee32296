"""Train a tokenizer: compose the configuration, build the run, fit.

python train.py experiment=image/demo
python train.py experiment=image/one_d_piece_64 data=image_folder data.root=PHOTOS
python train.py --config-dir RUN --config-name config        (repeat the run that wrote RUN/config.yaml)
"""

import sys
from collections.abc import Sequence
from pathlib import Path

_checkout = Path(__file__).resolve().parent / ".pkg"
if __name__ == "__main__" and _checkout.is_dir():
    # A checkout needs no install. Its root is removed from the path: `codecs` would shadow the standard library's.
    sys.path[0] = str(_checkout)

from varitok.codecs.training.versions import require_good  # noqa: E402

require_good()  # before Hydra, which may not even load

from omegaconf import DictConfig  # noqa: E402

from varitok.codecs.training.config.compose import run_folder, run_with, save_resolved  # noqa: E402

__all__ = ["main", "train"]


def train(config: DictConfig) -> None:
    """Run a training from its configuration; all its files are written to the run's folder."""
    from varitok.codecs.training.run import build_run  # noqa: PLC0415 (a typo is reported without loading torch)

    folder = run_folder(config)
    run = build_run(config, folder)
    save_resolved(config, folder)  # only now: a start that fails leaves the folder's run as it was
    run.fit()


def main(words: Sequence[str] | None = None) -> None:
    """Run the command line: `train.py`, `varitok train`, `python -m varitok.train`.

    Args:
        words: Command-line arguments; None: those of the process.
    """
    if words is not None:  # Hydra reads `sys.argv` only
        sys.argv[:] = ["varitok train", *words]
    run_with(train)


if __name__ == "__main__":
    main()
