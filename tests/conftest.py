"""What every test runs under: no network, no threads fighting over cores, the same seed."""

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest
import yaml
from hypothesis import settings

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is loaded: each worker has a core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Before OmegaConf makes its own of it: a third of what composing a configuration takes is reading YAML in Python.
yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# The machine's pace is no property of the code, and a failure must come again.
settings.register_profile("varitok", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("varitok")


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Seed every generator that a test may draw from without saying so."""
    random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
    yield


@pytest.fixture(autouse=True)
def unclassified() -> Iterator[None]:
    """Leave the classifier out of evaluations that don't ask for it: each would take a second more."""
    with pytest.MonkeyPatch.context() as patch:
        if metrics := sys.modules.get("varitok.codecs.metrics.classifier"):
            patch.setattr(metrics, "has_efficientnet_lite", lambda: False)
        yield


COMPOSED = "VARITOK_COMPOSED"  # names the folder in which xdist's workers share what they compose (composing.py)


def pytest_configure(config: pytest.Config) -> None:
    """Make the folder, in the one process that starts the workers."""
    if not hasattr(config, "workerinput"):
        os.environ[COMPOSED] = tempfile.mkdtemp()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove it."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(COMPOSED), ignore_errors=True)
