"""Count phrases that readers of this project's text have stumbled over; `make check` runs it and fails on any.

It reads comments and strings of Python, comments of YAML and JavaScript, and all of Markdown and templates.
"""

import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SELF = Path(__file__).relative_to(ROOT).as_posix()
SUFFIXES = (".py", ".md", ".yaml", ".js", ".j2", ".toml", ".yml")
# A phrase, and what to write instead.
BANNED = {
    r"^\s+`?\w+`?: Of (?!which)": "name the quantity: `width: number of channels`, not `width: Of the channels`",
    r'^\s*"""(Give|Tell|Say|Hold) ': "return, compute, build, load, check, report",
    r"\bof which\b": "split the sentence",
    r"\bwhere (there|it|they) (is|are|isn't|aren't|was|were|has|have)\b": "if",
    r"\bso (many|much)\b": "the parameter's name",
    r"\b(is|are|be|was|were) told\b|\btells?\b": "raise, report, return",
    r"\b(lie|lies|lay)\b": "is, are",
    r"\bhangs? on\b": "depends on",
    r"\blikewise\b": "say what is alike",
    r"\bwhere None\b|\b(None|0|1|empty|nothing) where\b": "if",
    r"\bwhat (is|are|was|were)\b": "a noun",
}  # fmt: skip
PATTERNS = {re.compile(pattern): cure for pattern, cure in BANNED.items()}


def read_text(path: Path) -> Iterator[tuple[int, str]]:
    """Return the lines of a file that people read, numbered from 1."""
    if path.suffix != ".py":
        lines = path.read_text(encoding="utf-8").splitlines()
        marks = {".yaml": "#", ".js": "//"}
        for number, line in enumerate(lines, 1):
            mark = marks.get(path.suffix)
            yield number, line if mark is None else line.partition(mark)[2]
        return
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    with path.open(encoding="utf-8") as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type in kinds:
                before = " " * token.start[1]
                for offset, line in enumerate((before + token.string).splitlines()):
                    yield token.start[0] + offset, line


def find_banned(path: Path) -> list[str]:
    """List what a file says that it should say otherwise."""
    return [
        f"{path.relative_to(ROOT).as_posix()}:{number}: {found[0].strip()!r}; write: {cure}"
        for number, line in read_text(path)
        for pattern, cure in PATTERNS.items()
        if (found := pattern.search(line))
    ]


def list_files(words: list[str]) -> list[str]:
    """List the files that Git knows or would add, below the given paths; without Git, all but hidden ones."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *words]
    shown = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if shown.returncode == 0:
        return shown.stdout.split()
    paths = (path.relative_to(ROOT) for word in words or ["."] for path in (ROOT / word).rglob("*"))
    return [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]


def main(words: list[str]) -> None:
    """Read the files below the given paths; print the findings and their number."""
    kept = [name for name in list_files(words) if Path(name).suffix in SUFFIXES and name != SELF]
    found = [line for name in kept if (ROOT / name).is_file() for line in find_banned(ROOT / name)]
    print("\n".join([*found, f"words: {len(found)} to say otherwise"]))
    sys.exit(bool(found))


if __name__ == "__main__":
    main(sys.argv[1:])
