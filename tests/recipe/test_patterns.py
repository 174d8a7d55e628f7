"""include / exclude patterns."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from msmodelslim_omni.errors import QuantError
from msmodelslim_omni.recipe.patterns import expand_braces, matches, near_patterns

Q = "thinker.model.layers.10.self_attn.q_proj"


@pytest.mark.parametrize(
    ("pattern", "alternatives"),
    [
        ("a.b", ["a.b"]),
        ("a.{b,c}", ["a.b", "a.c"]),
        ("{a,b}.{1,2}", ["a.1", "a.2", "b.1", "b.2"]),
        ("x{a,b{1,2}}y", ["xay", "xb1y", "xay", "xb2y"]),
        ("{a}", ["a"]),
        ("{a,}", ["a", ""]),
        ("{}", [""]),
        ("{a", ["{a"]),
        ("a}", ["a}"]),
        ("", [""]),
    ],
)
def test_braces_expand(pattern: str, alternatives: list[str]) -> None:
    assert list(expand_braces(pattern)) == alternatives


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("*", True),
        (Q, True),
        ("*q_proj", True),
        ("*.self_attn.*", True),
        ("thinker.*.q_proj", True),  # a star also matches dots
        ("*{q,k}_proj", True),
        ("*.layers.{1,2,10}.*", True),
        ("*.layers.1?.*", True),
        ("*.layers.[0-9][0-9].*", True),
        ("*.layers.[!1]*", False),
        ("q_proj", False),  # not the full name
        ("*Q_PROJ", False),  # case matters
        ("*.layers.1.*", False),
        ("thinker.model.layers.10", False),
        ("", False),
    ],
)
def test_pattern_matches(pattern: str, matched: bool) -> None:
    assert matches(Q, [pattern]) is matched


def test_one_matching_pattern_is_enough_and_no_patterns_match_nothing() -> None:
    assert matches(Q, ["nothing", "*q_proj"])
    assert not matches(Q, [])


def test_newline_does_not_end_the_name() -> None:
    assert not matches("a\nb", ["a"])


@pytest.mark.parametrize("pattern", ["{0,1}" * 40, "{" + "a," * 5000 + "}", "{a,b,c,d}" * 7])
def test_too_many_alternatives_are_refused_quickly(pattern: str) -> None:
    start = time.monotonic()
    with pytest.raises(QuantError, match="expands to more than 4096 alternatives") as caught:
        expand_braces(pattern)
    assert time.monotonic() - start < 2
    assert pattern[:20] in caught.value.message
    assert "wildcard" in caught.value.hint


def test_many_alternatives_below_the_limit() -> None:
    assert len(expand_braces("{0,1}" * 11)) == 2048


@given(st.text(alphabet="ab{},*?[]!.", max_size=30))
@settings(max_examples=200, deadline=1000)
def test_fuzz_patterns(pattern: str) -> None:
    try:
        alternatives = expand_braces(pattern)
    except QuantError:
        return
    assert alternatives
    matches("a.b", [pattern])


@given(st.text(alphabet="abc._0", min_size=1, max_size=20))
def test_plain_name_matches_only_itself(name: str) -> None:
    assert matches(name, [name])
    assert not matches(name + "x", [name])


_LINEARS = [
    f"model.layers.{layer}.{name}"
    for layer in range(12)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
]


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("down_proj", "*.down_proj"),  # the wildcard was forgotten
        ("*.dwn_proj", "*.down_proj"),
        ("*mlp.dwn_proj", "*.mlp.down_proj"),
        ("*.layers.99.*", "*.layers.9.*"),
        ("model.layer.3.{mlp,self_attn}.*", "model.layers.3.*"),
    ],
)
def test_near_patterns_match_and_the_most_similar_is_first(pattern: str, near: str) -> None:
    assert not any(matches(name, [pattern]) for name in _LINEARS)
    found = near_patterns(pattern, _LINEARS)
    assert found[0] == near and len(found) <= 3
    assert all(any(matches(name, [suggestion]) for name in _LINEARS) for suggestion in found)


@pytest.mark.parametrize("pattern", ["", "*", "zzzzzzzz", "{", "[!"])
def test_no_near_pattern_is_no_error(pattern: str) -> None:
    assert near_patterns(pattern, _LINEARS) == []
