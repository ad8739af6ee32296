"""Processes that differ are refused before they train."""

import pytest
import torch.distributed as dist

from varitok import UserError
from varitok.codecs.training.distributed import agreement


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("sources", r"has sources [0-9a-f]{12}, process 1 \(.*\) other; all nodes must have the same commit"),
        ("torch", r"has torch .*, process 1 \(.*\) other$"),
    ],
)
def test_processes_of_other_sources_or_versions_are_refused(monkeypatch, what, told):
    def gather(found, own):
        found[:] = [own, own | {what: "other"}]

    monkeypatch.setattr(agreement, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(UserError, match=told):
        agreement.Agreement(None).setup(None, None, "fit")
