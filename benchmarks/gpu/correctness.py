"""Whether it is right: the tests with a device among their parameters, and what they recorded."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from .report import Report

__all__ = ["run_tests"]

ROOT = Path(__file__).resolve().parents[2]


class _Recorder:
    """A plugin of pytest that selects a device's cases, and adds each one's outcome and recorded values to a report."""

    def __init__(self, report: Report, section: str, device: str, tiny: bool) -> None:
        self.report, self.section, self.device, self.tiny = report, section, device, tiny

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Select the device's cases; if tiny, the first of each file."""
        chosen, files = [], set()
        for item in items:
            case = getattr(item, "callspec", None)
            if case is None or case.params.get("device") != self.device or (self.tiny and item.path in files):
                continue
            files.add(item.path)
            chosen.append(item)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a row for the test itself, or for a preparation that failed or was skipped."""
        if report.when != "call" and report.passed:
            return
        row = {
            "case": report.nodeid.rpartition("::")[2].removeprefix("test_"),
            "outcome": report.outcome,
            "seconds": round(report.duration, 2),
            "measured": dict(report.user_properties),
        }
        if report.failed:
            row["error"] = " ".join(report.longreprtext.splitlines()[-1:])[:300]
        self.report.add(self.section, row)


def run_tests(report: Report, section: str, device: str, tiny: bool, tests: Sequence[str]) -> int:
    """Run tests on a device; return pytest's status.

    Args:
        report: What their outcomes are added to.
        section: Name of the section there.
        device: Parameter `device` of the cases to run.
        tiny: Run the first case of each file only.
        tests: Files, or functions in them, as pytest names them.
    """
    words = [*(str(ROOT / test) for test in tests), "-q", "-p", "no:cacheprovider", "-p", "no:warnings"]
    return int(pytest.main(words, plugins=[_Recorder(report, section, device, tiny)]))
