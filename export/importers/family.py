"""What an importer knows about a family of published codecs.

A family is a table: names of its tensors, in the layouts in which they are published, beside our modules. `transfer.py`
copies tensors between modules of the same kind, so that a family converts none itself.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from varitok.codecs.codec import Codec

from .source import Source

__all__ = ["Family", "Layout", "Names", "Sizes"]

Names = Iterable[tuple[str, str]]


class Layout(NamedTuple):
    """A form in which a family's weights are published.

    Attributes:
        name: The package that reads them.
        mark: Name of a tensor that only this layout has, or names that only it has together.
        renames: Regular expressions, in order, and what `re.sub` replaces them by to get the family's names.
    """

    name: str
    mark: str | tuple[str, ...]
    renames: Mapping[str, str | Callable[[re.Match[str]], str]]

    def has(self, source: Source) -> bool:
        """Return whether a source is in this layout."""
        return all(name in source.shapes for name in ((self.mark,) if isinstance(self.mark, str) else self.mark))

    def rename(self, name: str) -> str:
        """Return the family's name of a tensor."""
        for pattern, replacement in self.renames.items():
            name = re.sub(pattern, replacement, name)
        return name


class Sizes(NamedTuple):
    """Sizes that tensors have.

    Attributes:
        values: Values of the run's configuration, by key.
        claims: What a config.json should say, by its own keys.
    """

    values: dict[str, Any]
    claims: dict[str, Any]


class Family(NamedTuple):
    """A published codec, or several of one architecture at different sizes.

    Attributes:
        name: Its name for `--as`.
        title: What it is, for tables.
        experiment: The experiment whose configuration the run starts from.
        layouts: Forms in which it is published.
        sizes: Function that reads sizes from a source in the family's names.
        names: Function that lists, for a built codec, modules of the source and ours.
        fixed: Values of the configuration that tensors don't show.
        marks: Sizes in which it differs from other families of its architecture: those of `Sizes.values`, or of the
            source's config.json.
        ignored: Regular expressions of tensors that aren't needed.
        prepare: Function that derives the tensors of the table from those that are published (`derive.py`); None if
            they are the same.
    """

    name: str
    title: str
    experiment: str
    layouts: tuple[Layout, ...]
    sizes: Callable[[Source], Sizes]
    names: Callable[[Codec], Names]
    fixed: Mapping[str, Any]
    marks: Mapping[str, Any]
    ignored: tuple[str, ...] = ()
    prepare: Callable[[Source], Source] | None = None

    def layout(self, source: Source) -> Layout | None:
        """Return the layout of a source; None if it is of another family."""
        return next((layout for layout in self.layouts if layout.has(source)), None)

    def accepts(self, source: Source, sizes: Sizes) -> bool:
        """Return whether a source in the family's names has the sizes that mark this family."""
        return all((sizes.values.get(key, source.config.get(key, value))) == value for key, value in self.marks.items())
