"""The tables of configs/README.md are those of the YAML files; run as a script, this module writes them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "configs" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
MARKS = "<!-- tables -->\n", "<!-- /tables -->\n"
PARTS = {
    "Images": "experiment/image",
    "Audio": "experiment/audio",
    "Video": "experiment/video",
    "Priors": "experiment/prior",
    "Bottlenecks": "bottleneck",
    "Length policies": "length",
    "Fine-tuning": "finetune",
    "Guides": "guide",
    "Perceptual terms": "perceptual",
}


def describe(path: Path) -> str:
    """Return the comment with which a configuration begins, in one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    lines = lines[1:] if lines[0].startswith("# @package") else lines
    comment = re.match(r"(?:# ?.*\n)*", "\n".join(lines) + "\n")[0]
    return " ".join(line.removeprefix("#").strip() for line in comment.splitlines()).replace("|", "\\|")


def link_papers(text: str) -> str:
    """Link arXiv's numbers."""
    return re.sub(r"\b(\d{4}\.\d{5})\b", r"[\1](https://arxiv.org/abs/\1)", text)


def find_results(name: str) -> str:
    """Link an experiment's results."""
    found = sorted([*RESULTS.glob(f"*/{name}.csv"), *RESULTS.glob(f"{name}/evaluation.csv")])
    return ", ".join(f"[table](../{path.relative_to(ROOT).as_posix()})" for path in found)


def build_tables() -> str:
    """Build a table for each part, a row for each of its files."""
    tables = []
    for title, folder in PARTS.items():
        paths = sorted((ROOT / "configs" / folder).glob("*.yaml"))
        group, _, kind = folder.partition("/")
        if group == "experiment":
            rows = ["| `experiment=` | | measured |", "|---|---|---|"]
            rows += [f"| `{kind}/{p.stem}` | {link_papers(describe(p))} | {find_results(p.stem)} |" for p in paths]
        else:
            rows = [f"| `{group}=` | |", "|---|---|"]
            rows += [f"| `{path.stem}` | {link_papers(describe(path))} |" for path in paths]
        tables.append("\n".join([f"## {title}", "", *rows, ""]))
    return "\n" + "\n".join(tables) + "\n"


def test_the_tables_are_those_of_the_files():
    text = README.read_text(encoding="utf-8")
    assert text.partition(MARKS[0])[2].partition(MARKS[1])[0] == build_tables(), (
        "run python tests/configs/test_readme.py"
    )


def test_every_file_in_the_tables_is_described():
    for folder in PARTS.values():
        for path in (ROOT / "configs" / folder).glob("*.yaml"):
            assert len(describe(path)) > 10, path


if __name__ == "__main__":
    before, mark, rest = README.read_text(encoding="utf-8").partition(MARKS[0])
    README.write_text(before + mark + build_tables() + "".join(rest.partition(MARKS[1])[1:]), encoding="utf-8")
