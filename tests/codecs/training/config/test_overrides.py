"""Command lines are arranged for Hydra: overrides first, paths quoted."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from varitok.codecs.training.config.overrides import arrange

SIGNS = "aZ09 äß写=()[]{}'\"&#,;:!~+-@%*?|<>./\\$\t"
NAMES = st.text(SIGNS, min_size=1) | st.text(st.characters(exclude_categories=["C"]), min_size=1)


@given(NAMES.filter(lambda name: "${" not in name and name != "null" and name[0] not in "'\"{"))
def test_any_name_is_read_as_it_is(name):
    (word,) = arrange([f"data.root={name}"])
    assert OverridesParser.create().parse_override(word).value() == name
    assert arrange([word]) == [word], "processes that a launcher starts arrange it again"


@pytest.mark.parametrize(
    "word",
    [
        *(
            "data.root=photos/of_2024",
            "data.root='a b'",
            'data.root="a b"',
            "init_from=null",
            "hydra.run.dir=runs/${name}",
        ),
        *("data.clips={root: x}", "name=2024", "updates=1e3", "~data.root", "+data.root=x", "data.root="),
    ],
)
def test_the_rest_stays_as_it_is(word):
    assert arrange([word]) == [word]


def test_a_sweep_over_folders_stays_one():
    assert arrange(["-m", "data.root=a,b"]) == ["data.root=a,b", "-m"]
    assert arrange(["data.root=a,b"]) == ["data.root='a,b'"]


@given(
    st.lists(st.sampled_from(["seed=1,2", "-m", "--config-dir runs/lr=1", "~data", "--cfg job", "+x=1"]), max_size=6)
)
def test_options_follow_overrides(parts):
    words = [word for part in parts for word in part.split()]
    options = [word for part in parts if part.startswith("-") for word in part.split()]
    assert arrange(words) == [part for part in parts if not part.startswith("-")] + options
