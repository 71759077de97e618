"""Drawing: distances against independent geometry, cover, bit-for-bit determinism, counters, error paths."""
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_edu import drawing as d

POLYGONS = {
    "square": [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)],
    "cross": [(-0.96, -0.32), (-0.32, -0.32), (-0.32, -0.96), (0.32, -0.96), (0.32, -0.32), (0.96, -0.32),
              (0.96, 0.32), (0.32, 0.32), (0.32, 0.96), (-0.32, 0.96), (-0.32, 0.32), (-0.96, 0.32)],
    "star": [((1.12 if i % 2 == 0 else 0.5) * np.cos(np.pi / 2 + i * np.pi / 5),
              0.09 - (1.12 if i % 2 == 0 else 0.5) * np.sin(np.pi / 2 + i * np.pi / 5)) for i in range(10)],
    "triangle": [(0.0, -0.87), (1.005, 0.87), (-1.005, 0.87)],
}


def inside_polygon(corners, u, v):
    """Even-odd rule: how many edges does a ray to the right cross?"""
    odd = np.zeros(u.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        crosses = (ay > v) != (by > v)
        odd ^= crosses & (u < ax + (v - ay) / np.where(by == ay, 1, by - ay) * (bx - ax))
    return odd


def distance_to_edges(corners, u, v):
    nearest = np.full(u.shape, np.inf)
    for (ax, ay), (bx, by) in zip(corners, corners[1:] + corners[:1]):
        along = np.clip(((u - ax) * (bx - ax) + (v - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2), 0, 1)
        nearest = np.minimum(nearest, np.hypot(u - ax - along * (bx - ax), v - ay - along * (by - ay)))
    return nearest


@pytest.fixture(scope="module")
def points():
    return np.random.default_rng(0).uniform(-1.4, 1.4, (2, 4000))


@pytest.mark.parametrize("shape", POLYGONS)
def test_polygons_agree_with_the_even_odd_rule(shape, points):
    got, clear = d.signed_distance(shape, *points), distance_to_edges(POLYGONS[shape], *points) > 0.005
    assert ((got < 0) == inside_polygon(POLYGONS[shape], *points))[clear].all()


@pytest.mark.parametrize("shape", ["square", "star", "cross"])
def test_polygon_distances_outside_are_exact(shape, points):
    got = d.signed_distance(shape, *points)
    outside = got > 0
    np.testing.assert_allclose(got[outside], distance_to_edges(POLYGONS[shape], *points)[outside], atol=1e-5)


def test_round_shapes_by_hand():
    assert d.signed_distance("circle", 3.0, 4.0) == pytest.approx(5 - 0.92)
    assert d.signed_distance("ring", 0.0, 0.0) == pytest.approx(0.45)
    assert d.signed_distance("ring", 0.7, 0.0) == pytest.approx(-0.25)


@pytest.mark.parametrize("shape", d.SHAPES)
def test_extents_are_tight(shape):
    axis = np.linspace(-1.3, 1.3, 1041)
    inside = d.signed_distance(shape, *np.meshgrid(axis, axis)) <= 0
    for got, used in zip(d.EXTENTS[d.SHAPES.index(shape)], (inside.any(0), inside.any(1))):
        reach = np.abs(axis[used]).max()
        assert got - 0.01 < reach <= got + 0.005


def test_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="hexagon.*circle"):
        d.signed_distance("hexagon", np.zeros(1), np.zeros(1))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**62), st.lists(st.integers(0, 2**62), min_size=1, max_size=20), st.integers(0, 200), st.integers(1, 20))
def test_counters_depend_on_their_address_only(key, indices, stream, count):
    draws = d.counter_uniform(key, np.array(indices), stream, count)
    assert draws.shape == (len(indices), count) and draws.dtype == np.float64 and (draws >= 0).all() and (draws < 1).all()
    np.testing.assert_array_equal(d.counter_uniform(key, np.array(indices[-1:]), stream, count)[0], draws[-1])
    np.testing.assert_array_equal(d.counter_uniform(key, np.array(indices), stream, count + 3)[:, :count], draws)


def test_counters_are_uniform_and_unrelated():
    draws = d.counter_uniform(1, np.arange(50_000), 2, 6)
    assert np.abs(np.histogram(draws, 20, (0, 1))[0] / draws.size - 0.05).max() < 5 * (0.0475 / draws.size) ** 0.5
    others = (d.counter_uniform(2, np.arange(50_000), 2, 6), d.counter_uniform(1, np.arange(50_000), 3, 6), np.roll(draws, 1, 0), np.roll(draws, 1, 1))
    for other in others:
        assert abs(np.corrcoef(draws.ravel(), other.ravel())[0, 1]) < 0.01


def random_layout(n, k=3):
    draws = d.counter_uniform(9, np.arange(n), 1, 6 * k).reshape(n, 6, k)
    return d.Layout(np.full(n, k), (draws[:, 0] * 6).astype(int), (draws[:, 1] * 8).astype(int), np.zeros((n, k), int),
                    (draws[:, 2] * 4).astype(int), draws[:, 3], draws[:, 4], 0.1 + 0.2 * draws[:, 5])


def test_a_picture_does_not_depend_on_its_batch():
    layout, index = random_layout(50), np.arange(50)
    images, maps = d.paint(layout, 3, index, 32, 40, semantic=True)
    assert images.shape == (50, 3, 32, 40) and images.dtype == np.float32 and np.abs(images).max() <= 1
    for some in ([7], [49, 0, 7], list(range(10, 41))):
        again, again_maps = d.paint(d.Layout(*(a[some] for a in layout)), 3, index[some], 32, 40, semantic=True)
        np.testing.assert_array_equal(again, images[some])
        np.testing.assert_array_equal(again_maps, maps[some])


def test_the_first_object_lies_on_top():
    layout = d.Layout(np.array([2]), np.array([[0, 1]]), np.array([[0, 5]]), *(np.zeros((1, 2), int),) * 2,
                      np.full((1, 2), 0.5), np.full((1, 2), 0.5), np.array([[0.2, 0.4]]))
    image, semantic = d.paint(layout, 0, np.array([0]), 32, 32, semantic=True)
    assert semantic[0, 16, 16] == 1 + 0 * 8 + 0 and semantic[0, 16, 24] == 1 + 1 * 8 + 5
    np.testing.assert_allclose(image[0, :, 16, 16], d.COLOUR_RGB[0] * 0.96 * 2 - 1, atol=1e-6)


def test_every_material_keeps_the_hue():
    near = np.linspace(-0.9, 0.9, 9, dtype=np.float32)
    for colour in range(8):
        for material in range(4):
            rgb = d._shade(np.array([material]), np.array([colour]), near[None, None], near[None, :, None], np.full((1, 1, 1), 0.1, np.float32))[0]
            assert rgb.min() >= 0 and rgb.max() <= 1
            order = np.argsort(d.COLOUR_RGB[colour])
            assert (rgb[order[0]] <= rgb[order[1]] + 1e-6).all() and (rgb[order[1]] <= rgb[order[2]] + 1e-6).all()
