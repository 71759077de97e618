"""The closed language: writer and parser against each other, relations, held-out tables, prompts, error paths."""
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_edu import captions as c
from ldm_edu.drawing import COLOURS, SHAPES

objects = st.builds(c.SceneObject, st.sampled_from(SHAPES), st.sampled_from(COLOURS), st.sampled_from(c.SIZES), st.just("flat"),
                    st.floats(0, 1), st.floats(0, 1))


@settings(deadline=None, max_examples=300)
@given(st.lists(objects, min_size=1, max_size=4), st.lists(st.floats(0, 0.999), min_size=8, max_size=8))
def test_what_is_written_is_read_back(scene, draws):
    text = c.write_caption(scene, draws)
    claim = c.parse_caption(text)
    assert len(claim.objects) == len(scene)
    straight, turned = (all((o.colour, o.shape) == (f.colour, f.shape) and o.size in (None, f.size) for o, f in zip(claim.objects, some))
                        for some in (scene, scene[::-1]))
    if claim.relation is None:
        assert straight
    else:
        assert (straight and c.relation_between(*scene) == claim.relation) or (turned and c.relation_between(*scene[::-1]) == claim.relation)


@pytest.mark.parametrize("text,expected", [
    ("a red circle", [("red", "circle", None)]),
    ("an orange ring", [("orange", "ring", None)]),
    ("red circle", [("red", "circle", None)]),
    ("A picture of a small red star.", [("red", "star", "small")]),
    ("a large yellow cross and a small pink triangle", [("yellow", "cross", "large"), ("pink", "triangle", "small")]),
    ("a red circle, a blue ring and a green cross", [("red", "circle", None), ("blue", "ring", None), ("green", "cross", None)]),
    ("a red circle, a blue ring, and a green cross", [("red", "circle", None), ("blue", "ring", None), ("green", "cross", None)]),
])
def test_sentences(text, expected):
    assert c.parse_caption(text) == (tuple(expected), None)


@pytest.mark.parametrize("relation,words", [(r, w) for r in c.RELATIONS for w in (r, f"is {r}")] + [("left of", "to the left of"), ("right of", "is to the right of")])
def test_relations_are_read(relation, words):
    assert c.parse_caption(f"a small red star {words} a blue ring") == ((("red", "star", "small"), ("blue", "ring", None)), relation)


@pytest.mark.parametrize("text", ["", "a", "a banana", "a red", "a circle", "a huge red circle", "a red circle left of", "left of a red circle",
                                  "a red circle above a blue ring and a pink star", "a red circle above a blue ring above a pink star",
                                  "a red circle a blue ring", "a red circle,", "two red circles"])
def test_other_sentences_are_refused_by_name(text):
    with pytest.raises(ValueError, match="caption: got"):
        c.parse_caption(text)


def test_a_caption_must_be_text():
    with pytest.raises(ValueError, match="got int, expected a string"):
        c.parse_caption(3)


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(1, 2))
def test_relations_mirror(across, down, slack):
    there, back = (c.relation_codes(np.array([s * across]), np.array([s * down]), slack)[0] for s in (1, -1))
    assert (there < 0 and back < 0) or back == there ^ 1


def test_relations_by_hand_and_aspect():
    a, b = c.SceneObject("star", "red", x=0.2, y=0.3), c.SceneObject("ring", "blue", x=0.6, y=0.7)
    assert c.relation_between(a, b) is None
    assert c.relation_between(a, b, aspect=2.0) == "left of" and c.relation_between(a, b, aspect=0.5) == "above"
    assert c.relation_between(b, a, aspect=2.0) == "right of" and c.relation_between(b, a, aspect=0.5) == "below"
    assert c.relation_between(a, a._replace(x=0.25)) is None, "too near to tell"


def test_held_out_words_are_sane():
    colours, shapes = zip(*c.HELD_OUT_PAIRS)
    assert set(colours) <= set(COLOURS) and sorted(shapes) == sorted(SHAPES), "each shape loses one colour"
    assert ("red", "circle") not in c.HELD_OUT_PAIRS and ("blue", "square") not in c.HELD_OUT_PAIRS
    assert all(r in c.RELATIONS and {a, b} <= set(SHAPES) for r, a, b in c.HELD_OUT_RELATIONS)


def test_held_out_by_brute_force():
    mirror = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    bad = {*c.HELD_OUT_RELATIONS, *((mirror[r], b, a) for r, a, b in c.HELD_OUT_RELATIONS)}
    for relation, first, second in itertools.product(c.RELATIONS, SHAPES, SHAPES):
        claim = c.Claim((c.ObjectClaim("red", first), c.ObjectClaim("pink", second)), relation)
        assert c.is_held_out(claim) == ((relation, first, second) in bad)
        assert not c.is_held_out(claim._replace(relation=None))
    for colour, shape in itertools.product(COLOURS, SHAPES):
        assert c.is_held_out(c.Claim((c.ObjectClaim(colour, shape),))) == ((colour, shape) in c.HELD_OUT_PAIRS)


@pytest.mark.parametrize("kind", c.PROMPT_KINDS)
@pytest.mark.parametrize("n", [0, 1, 5, 100])
def test_prompts(kind, n):
    prompts = c.make_prompts(n, seed=3, kind=kind)
    assert len(prompts) == n and prompts == c.make_prompts(n, seed=3, kind=kind)
    claims = [c.parse_caption(p) for p in prompts]
    assert all(c.is_held_out(claim) == kind.startswith("held_out") for claim in claims)
    assert all((claim.relation is not None) == ("relation" in kind) for claim in claims)
    assert n < 5 or prompts != c.make_prompts(n, seed=4, kind=kind)


def test_prompts_are_balanced_and_kinds_checked():
    assert len(set(c.make_prompts(42))) == 42 and len(set(c.make_prompts(6, kind="held_out"))) == 6
    with pytest.raises(ValueError, match="singles.*did you mean 'single'"):
        c.make_prompts(3, kind="singles")
