"""All families of published codecs that can be imported."""

from varitok import UserError

from .families import autoencoder_kl, cosmos, dac, encodec, mimi, snac, titok, vocos, vqgan
from .family import Family, Layout, Sizes
from .source import Source

__all__ = ["FAMILIES", "Match", "recognize"]

MODULES = (autoencoder_kl, cosmos, dac, encodec, mimi, snac, titok, vocos, vqgan)
FAMILIES: dict[str, Family] = {family.name: family for module in MODULES for family in module.FAMILIES}

Match = tuple[Family, Layout, Source, Sizes]


def recognize(source: Source, name: str | None = None) -> Match:
    """Find the family and the layout of published weights.

    Args:
        source: The weights.
        name: The family; None: guess it from names and shapes.

    Returns:
        Family, layout, the source in the family's names, and its sizes.

    Raises:
        UserError: There is no such family, the weights are of another, of none, or could be of several.
    """
    if name is not None and name not in FAMILIES:
        raise UserError(f"--as {name}: is no family; there are {', '.join(FAMILIES)}")
    found = [match for family in FAMILIES.values() if (match := _match(family, source)) is not None]
    fitting = [match for match in found if match[0].accepts(match[2], match[3])]
    if name is not None:
        chosen = next((match for match in found if match[0].name == name), None)
        if chosen is None:
            known = " or ".join(match[0].name for match in fitting or found)
            raise UserError(f"{source.path}: isn't {name}; it looks like {known or 'no family that is known'}")
        return chosen
    if len(fitting) == 1:
        return fitting[0]
    known = ", ".join(FAMILIES)
    if not found:
        some = ", ".join(sorted(source.shapes)[:3])
        raise UserError(f"{source.path}: is of none of the families {known}; its tensors are {some} ...")
    names = ", ".join(match[0].name for match in fitting or found)
    raise UserError(f"{source.path}: could be any of {names}; say which by --as")


def _match(family: Family, source: Source) -> Match | None:
    layout = family.layout(source)
    if layout is None:
        return None
    renamed = source.renamed(layout.rename)
    if family.prepare is not None:
        renamed = family.prepare(renamed)
    return family, layout, renamed, family.sizes(renamed)
