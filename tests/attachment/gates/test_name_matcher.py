"""Names in texts: every spelling that people use is found, and other words are not."""

import string
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spm_hub.attachment.gates.name_matcher import NameMatcher, _one_edit_apart, words_of

COMMON = frozenset("a dog cat house horse the rose nose church beach by of in on photo mouse night van vincent".split())
RANKS = {"van": 2000, "gogh": 24000, "vincent": 7000, "mickey": 11000, "mouse": 5000, "nude": 9000, "person": 500}
NAMES = ("snoopy", "van gogh", "vincent van gogh", "mickey mouse", "a nude person", "church", "dog", "spider-man")


def matcher(names: tuple[str, ...] = NAMES) -> NameMatcher:
    return NameMatcher(names, lambda word: float(RANKS.get(word, 49000)), COMMON.__contains__)


def found(text: str) -> set[str]:
    return {NAMES[index] for index, match in matcher().match(text).items() if match.share == 1}


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a photo of Snoopy!", "snoopy"), ("SNOOPY", "snoopy"), ("two snoopys", "snoopy"), ("snoopy's house", "snoopy"),
        ("snoopy’s house", "snoopy"), ("the snoopys' house", "snoopy"), ("snopy", "snoopy"), ("snooopy", "snoopy"),
        ("snoopi", "snoopy"), ("sonopy", "snoopy"), ("snopy's", "snoopy"), ("s n o o p y", "snoopy"),
        ("sn00py", "snoopy"), ("snööpy", "snoopy"), ("(snoopy:1.3)", "snoopy"), ("snoopy-dog", "snoopy"),
        ("a tree by van gogh", "van gogh"), ("vangogh", "van gogh"), ("van-gogh", "van gogh"), ("van gohg", "van gogh"),
        ("Gogh", "van gogh"), ("two churches", "church"), ("churchs", "church"), ("churhc", "church"),
        ("spiderman", "spider-man"), ("spider man", "spider-man"), ("a nude", "a nude person"),
        ("nudes", "a nude person"),
        ("mickey-mouse", "mickey mouse"), ("mickeymouse", "mickey mouse"), ("dogs", "dog"), ("the dog's ball", "dog"),
    ],
)  # fmt: skip
def test_spellings_of_a_name_are_found(text: str, name: str) -> None:
    assert name in found(text)


@pytest.mark.parametrize(
    "text",
    [
        "", "a photo of a cat", "van van van", "a red van", "vincent price", "a mouse", "a person", "fog", "dig",
        "doge",
        "snoop", "snow on the beach", "a rose by the house", "touch", "van morrison", "!!!", "'s", "s", "8k, 4k",
    ],
)  # fmt: skip
def test_other_words_are_not(text: str) -> None:
    assert found(text) <= ({"snoopy"} if text == "snoop" else set())


def test_a_word_that_people_write_on_purpose_is_no_misspelling() -> None:
    names = ("house",)
    assert matcher(names).match("a horse") == {}
    assert NameMatcher(names, lambda word: 1.0, lambda word: False).match("a horse")[0].share == 1


def test_a_short_name_that_is_misspelt_begins_with_the_right_letter() -> None:
    short = matcher(("nude", "dog"))
    assert all(short.match(f"a {wrong}")[0].share == 1 for wrong in ("nuude", "nued", "nud", "nudr"))
    assert all(short.match(f"a {other}") == {} for other in ("rude", "dude", "doge", "dg", "dig"))


def test_a_part_of_a_name_counts_by_how_telling_it_is() -> None:
    # 11000 / 11000: as rare as the name itself; 5000 / 11000: less than twice as frequent, below the ramp.
    assert matcher().match("mickey")[NAMES.index("mickey mouse")].share == 1
    assert NAMES.index("mickey mouse") not in matcher().match("mouse")
    ranks = {"keith": 8000, "haring": 10000}
    parts = NameMatcher(("keith haring",), lambda word: float(ranks[word]), lambda word: True)
    assert parts.match("keith")[0].share == pytest.approx((0.8 - 0.6) / (0.9 - 0.6))
    assert parts.match("keith")[0].words == "keith"


def test_names_in_scripts_without_spaces_are_found_inside_a_sentence() -> None:
    assert matcher(("史努比",)).match("海滩上的史努比")[0].share == 1
    assert matcher(("史努比",)).match("海滩上的狗") == {}


def restricted_distance(one: str, other: str) -> int:
    """Compute the optimal string alignment distance by its recursion."""
    table = {(i, 0): i for i in range(len(one) + 1)} | {(0, j): j for j in range(len(other) + 1)}
    for i, j in product(range(1, len(one) + 1), range(1, len(other) + 1)):
        cost = one[i - 1] != other[j - 1]
        table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + cost)
        if i > 1 and j > 1 and one[i - 1] == other[j - 2] and one[i - 2] == other[j - 1]:
            table[i, j] = min(table[i, j], table[i - 2, j - 2] + 1)
    return table[len(one), len(other)]


@settings(max_examples=300, deadline=None)
@given(st.text("abc", max_size=6), st.text("abc", max_size=6))
def test_one_edit_is_a_restricted_distance_of_one(one: str, other: str) -> None:
    assert _one_edit_apart(one, other) == (restricted_distance(one, other) == 1)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_single_misspelling_of_a_long_name_is_found(data: st.DataObject) -> None:
    name = data.draw(st.text(string.ascii_lowercase, min_size=6, max_size=10))
    at = data.draw(st.integers(0, len(name) - 2))
    letter = data.draw(st.sampled_from(string.ascii_lowercase))
    kinds = [
        name[:at] + name[at + 1 :], name[:at] + letter + name[at:], name[:at] + letter + name[at + 1 :],
        name[:at] + name[at + 1] + name[at] + name[at + 2 :],
    ]  # fmt: skip
    wrong = data.draw(st.sampled_from(kinds))
    assert matcher((name,)).match(f"a photo of {wrong} on the beach")[0].share == 1


def test_words_are_small_letters_without_accents() -> None:
    assert words_of("Été à l'Île, SN00PY & m1ckey") == ["ete", "a", "l'ile", "snoopy", "mlckey"]


TOGETHER = ("snoopy", "van gogh", "mickey mouse in a red hat", "church")
TEXTS = st.text(alphabet="snopyvagh' ", max_size=24) | st.sampled_from([
    "sn oo py", "s n oo p y", "v an g ogh", "va ngogh", "a ch ur ch", "snoo py by van goh", "mick ey mouse in red hat",
])  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_what_is_found_of_a_name_does_not_depend_on_other_names(text: str) -> None:
    together = matcher(TOGETHER).match(text)
    for index, name in enumerate(TOGETHER):
        assert matcher((name,)).match(text).get(0) == together.get(index), (text, name)
