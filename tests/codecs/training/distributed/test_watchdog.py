"""The watchdog's threads; what it does for whole runs is in `test_survival.py`."""

import threading
import time
from types import SimpleNamespace

import pytest

from varitok.codecs.training.distributed import watchdog
from varitok.codecs.training.distributed.watchdog import Watchdog


class SlowStore:
    """A store of two processes, whose answers take a while, as on a crowded machine."""

    def __init__(self):
        self.said = {str(rank): f"alive 1 {rank} host" for rank in range(2)}
        self.asked = threading.Event()

    def set(self, key, value):
        self.said[key] = value

    def get(self, key):
        return self.said[key].encode()

    def multi_get(self, keys):
        self.asked.set()
        time.sleep(0.3)
        return [self.get(key) for key in keys]


@pytest.fixture
def store(monkeypatch):
    found = SlowStore()
    monkeypatch.setattr(watchdog, "world_size", lambda: 2)
    monkeypatch.setattr(watchdog, "PrefixStore", lambda *_: found)
    monkeypatch.setattr(watchdog, "_get_default_store", lambda: SimpleNamespace(clone=lambda: None))
    monkeypatch.setattr(watchdog.dist, "barrier", lambda: None)
    monkeypatch.setattr(watchdog, "BEAT", 0.01)
    return found


def test_no_thread_is_left_in_the_store_when_a_process_ends(store):
    trainer = SimpleNamespace(
        global_rank=0, local_rank=0, world_size=2, strategy=SimpleNamespace(launcher=SimpleNamespace(procs=[]))
    )
    dog = Watchdog()
    dog.setup(trainer, None, "fit")
    assert store.asked.wait(10)
    dog.teardown(trainer, None, "fit")
    # Python kills a daemon thread that returns from C++ at exit, and that ends the process by SIGABRT.
    assert not {"beat", "watch"} & {thread.name for thread in threading.enumerate()}
    assert store.said["0"].startswith("done")
