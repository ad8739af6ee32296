"""Machine perceptual quality: the accuracy of a classifier on reconstructed images."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from varitok import UserError
from varitok.data.batch import normalize
from varitok.data.decoding.errors import BadSample

from ..adapters.dataset import dataset_of, files_of
from ..runtime.bundle import Bundle, onnx_runtime

__all__ = ["Classifier", "classes_of", "read_classifier", "readable", "train_classifier"]

EPOCHS, BATCH, WIDTH = 25, 32, 32
LEAST = 2  # least number of classes


class Classifier(NamedTuple):
    """An image classifier.

    Attributes:
        answer: Returns the classes, int64 `(b,)`, of uint8 images `(b, 3, h, w)`.
        classes: Names of the classes; empty if unknown.
        about: Description for the table's header.
    """

    answer: Callable[[Tensor], Tensor]
    classes: tuple[str, ...]
    about: str


def classes_of(files: Sequence[Path]) -> list[str]:
    """Return each file's class: its folder's name, or its own first word if all files are in one folder."""
    folders = {file.parent for file in files}
    return [
        file.parent.name if len(folders) > 1 else file.stem.partition("_")[0].rstrip("0123456789") for file in files
    ]


def read_classifier(path: Path) -> Classifier:
    """Load an ONNX classifier from `(b, 3, h, w)` in [-1, 1] to logits `(b, classes)`.

    Raises:
        UserError: ONNX Runtime can't read it.
    """
    try:
        session = onnx_runtime().InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own classes, defined in C++
        raise UserError(f"--classifier {path}: ONNX Runtime can't read it") from error
    name = session.get_inputs()[0].name

    def answer(images: Tensor) -> Tensor:
        try:
            logits = session.run(None, {name: normalize(images).numpy()})[0]
        except Exception as error:
            sizes = " x ".join(map(str, images.shape[2:]))
            raise UserError(f"--classifier {path}: can't classify RGB images of {sizes} pixels") from error
        return torch.from_numpy(np.asarray(logits)).argmax(-1)

    return Classifier(answer, (), f"{path.name}; the right class is that of the original")


def train_classifier(bundle: Bundle, folder: Path) -> Classifier:
    """Train a small convolutional network on a folder of images, with a fixed seed, for about ten seconds.

    Raises:
        UserError: There are no images, or fewer than two classes.
    """
    files = files_of(bundle, [folder], "--classes")
    names = classes_of(files)
    classes = tuple(sorted(set(names)))
    if len(classes) < LEAST:
        raise UserError(f"--classes {folder}: all images are of class {classes[0]!r}; give a folder for each class")
    data, _ = dataset_of(bundle, files, None)
    found = dict(readable(data, len(files), []))
    images, labels = torch.stack([*found.values()]), torch.tensor([classes.index(names[index]) for index in found])
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        network = _fit(images, labels, len(classes))
    finally:
        torch.random.set_rng_state(state)

    @torch.inference_mode()
    def answer(pictures: Tensor) -> Tensor:
        logits: Tensor = network(normalize(pictures))
        return logits.argmax(-1)

    about = f"three convolutions, trained on {len(images)} other images, classes {', '.join(classes)}"
    return Classifier(answer, classes, about)


def readable(data: Dataset[Tensor], count: int, bad: list[str]) -> Iterator[tuple[int, Tensor]]:
    """Yield the index and signal of each sample that can be read; append the errors of others to `bad`."""
    for index in range(count):
        try:
            yield index, data[0, index]
        except BadSample as error:
            bad.append(str(error))


def _fit(images: Tensor, labels: Tensor, classes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after in ((3, WIDTH), (WIDTH, 2 * WIDTH), (2 * WIDTH, 4 * WIDTH)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * WIDTH, classes))
    weights = 1 / torch.bincount(labels, minlength=classes).clamp(min=1)  # small classes weigh as much as large ones
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3, weight_decay=0.05)
    for epoch in range(EPOCHS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - epoch / EPOCHS)
        for chosen in torch.split(torch.randperm(len(images)), BATCH):
            batch = normalize(images[chosen])
            batch = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch, batch.flip(3))
            optimizer.zero_grad()
            functional.cross_entropy(network(batch), labels[chosen], weights).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return network.eval()
