"""The results of a measurement as JSON and as Markdown, rewritten whenever a row is added."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Report", "Row"]

Row = dict[str, Any]


class Report:
    """A folder's `results.json` and `table.md`, which several processes write in turn.

    A row is on the disk as soon as it is added. So a process that crashes or is killed loses none.

    Args:
        folder: Their folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.errors = 0  # rows that this process added with an error

    @property
    def results(self) -> dict[str, Any]:
        """Everything added so far: `about`, and `sections` by name, each with `asks`, `status` and `rows`."""
        path = self.folder / "results.json"
        found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"about": {}, "sections": {}}
        return found

    def begin(self, about: Mapping[str, str]) -> None:
        """Start anew, with facts about the measurement."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write({"about": dict(about), "sections": {}})

    def describe(self, **facts: str) -> None:
        """Add facts about the measurement."""
        results = self.results
        results["about"] |= facts
        self._write(results)

    def section(self, name: str, **facts: Any) -> None:
        """Add facts about a section: what it asks, how it ended."""
        results = self.results
        results["sections"].setdefault(name, {"rows": []}).update(facts)
        self._write(results)

    def add(self, section: str, row: Row) -> None:
        """Add a row to a section, and print it."""
        results = self.results
        results["sections"].setdefault(section, {"rows": []})["rows"].append(row)
        self._write(results)
        print(f"[{section}]", ", ".join(f"{key} {_shown(value)}" for key, value in row.items()), flush=True)

    @contextmanager
    def case(self, section: str, name: str, **facts: Any) -> Iterator[Row]:
        """Add a row that the context fills; an error becomes the row's, and the section goes on."""
        row: Row = {"case": name, **facts}
        try:
            yield row
        except Exception as error:  # out of memory, above all
            self.errors += 1
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.add(section, row)

    def _write(self, results: dict[str, Any]) -> None:
        for name, text in (("results.json", json.dumps(results, indent=1)), ("table.md", _markdown(results))):
            partial = self.folder / f".{name}.{os.getpid()}"
            partial.write_text(text + "\n", encoding="utf-8")
            partial.replace(self.folder / name)


def _markdown(results: dict[str, Any]) -> str:
    lines = [f"- {key}: {value}" for key, value in results["about"].items()]
    for name, section in results["sections"].items():
        status = f" ({section['status']}, {section['seconds']:.0f} s)" if "status" in section else ""
        lines += ["", f"## {name}{status}", "", section.get("asks", ""), ""]
        columns = list(dict.fromkeys(key for row in section["rows"] for key in row))
        if columns:
            lines += [_line(columns), "|---" * len(columns) + "|"]
            lines += [_line([_shown(row.get(column, "")) for column in columns]) for row in section["rows"]]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(f"{key} {_shown(each)}" for key, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
