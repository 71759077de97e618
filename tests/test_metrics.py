"""Metrics against closed forms, loops written out in numpy, and two independent libraries on the same features."""
import itertools
import math

import numpy as np
import pytest
import torch
import torch_fidelity.metric_fid
import torch_fidelity.metric_isc
import torch_fidelity.metric_kid
import torch_fidelity.metric_prc
import torchmetrics.functional.image as tmf
from torch.testing import assert_close
from torchmetrics.functional.image.lpips import _LPIPS
from torchmetrics.image.fid import FrechetInceptionDistance, _compute_fid
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from ldm_edu import metrics
from ldm_edu.metrics import (
    COMPARABLE,
    FeatureStatistics,
    bootstrap,
    check_comparable,
    density_coverage,
    fid,
    fid_against_n,
    fid_interval,
    frechet_distance,
    inception_score,
    kid,
    kid_subsets,
    load_statistics,
    lpips,
    matrix_root,
    memorisation,
    nearest,
    neighbour_radii,
    precision_recall,
    psnr,
    save_statistics,
    ssim,
)

FACTS = {"extractor": "a", "extractor_hash": "1", "preprocessing": "none", "source": "32x32"}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draw(n, d, seed=0, scale=1.0, shift=0.0):
    """n correlated points of d dimensions, float32."""
    mix = torch.randn(d, d, generator=seeded(99))
    return scale * torch.randn(n, d, generator=seeded(seed)) @ mix / d**0.5 + shift


def covariance(d, seed, rank=None):
    """A random positive (semi)definite matrix, float64."""
    x = torch.randn(d, rank or 2 * d, generator=seeded(seed)).double()
    return x @ x.T / x.shape[1]


# ------------------------------------------------------------------------------------------ Frechet distance
@pytest.mark.parametrize("d", [1, 2, 7, 64])
def test_frechet_distance_of_commuting_gaussians(d):
    """Covariances with common eigenvectors: |difference of means|^2 + sum (sqrt a_i - sqrt b_i)^2."""
    basis = torch.linalg.qr(torch.randn(d, d, generator=seeded(d)).double()).Q
    a, b = torch.rand(2, d, generator=seeded(1)).double() * 4
    mean_a, mean_b = torch.randn(2, d, generator=seeded(2)).double()
    exact = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    got = frechet_distance(mean_a, basis * a @ basis.T, mean_b, basis * b @ basis.T)
    assert got == pytest.approx(exact.item(), rel=1e-10)


def test_frechet_distance_of_plane_gaussians_that_do_not_commute():
    """In two dimensions trace sqrt(AB) = sqrt(trace AB + 2 sqrt(det A det B))."""
    for seed in range(20):
        a, b = covariance(2, seed), covariance(2, 100 + seed)
        root = ((a @ b).trace() + 2 * (torch.det(a) * torch.det(b)).sqrt()).sqrt()
        exact = a.trace() + b.trace() - 2 * root
        assert frechet_distance(torch.zeros(2), a, torch.zeros(2), b) == pytest.approx(exact.item(), rel=1e-9)


@pytest.mark.parametrize("n", [400, 20, 5])
def test_fid_against_torchmetrics_and_torch_fidelity(n):
    """Also with fewer samples than the 16 dimensions, where covariances are singular."""
    x, y = draw(n, 16, 1), draw(n, 16, 2, 1.3, 0.4)
    got = fid(FeatureStatistics(x), FeatureStatistics(y))
    to_stats = torch_fidelity.metric_fid.fid_features_to_statistics
    theirs = torch_fidelity.metric_fid.fid_statistics_to_metric(to_stats(x.double()), to_stats(y.double()), False)
    assert got == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    moments = [v for f in (x.double(), y.double()) for v in (f.mean(0), f.T.cov())]
    assert got == pytest.approx(_compute_fid(*moments).item(), rel=1e-3)


def test_fid_against_torchmetrics_own_accumulation():
    """torchmetrics' whole class with the identity for a network, fed in batches."""
    class Flatten(torch.nn.Module):
        num_features = 12

        def forward(self, x):
            return x.float().flatten(1)

    x, y = (torch.randint(0, 256, (300, 3, 2, 2), generator=seeded(s), dtype=torch.uint8) // (1 + s) for s in range(2))
    theirs = FrechetInceptionDistance(feature=Flatten(), input_img_size=(3, 2, 2))
    stats = [FeatureStatistics(), FeatureStatistics()]
    for real, images in ((True, x), (False, y)):
        for part in images.split(70):
            theirs.update(part, real=real)
            stats[real].update(part.flatten(1).float())
    assert fid(*stats) == pytest.approx(theirs.compute().item(), rel=1e-3)


def test_identical_sets_have_distance_zero_also_when_singular():
    for n in (3, 10, 200):
        x = draw(n, 24)
        stats = FeatureStatistics(x)
        assert fid(stats, FeatureStatistics(x)) <= 1e-12 * stats.covariance.trace().item() * 24
    assert kid(draw(50, 8), draw(50, 8)) < 0, "the unbiased estimator leaves the diagonal out"
    assert precision_recall(x, x) == (1.0, 1.0) and density_coverage(x, x)[1] == 1.0


def test_frechet_distance_is_symmetric_never_negative_and_moves_with_nothing():
    a, b = covariance(9, 0, 4), covariance(9, 1)
    zero, shift, turn = torch.zeros(9), torch.ones(9) * 7, torch.linalg.qr(torch.randn(9, 9, generator=seeded(3)).double()).Q
    base = frechet_distance(zero, a, zero, b)
    assert base == pytest.approx(frechet_distance(zero, b, zero, a), rel=1e-9) and base > 0
    # a is singular: rounding leaves eigenvalues of 1e-16 where 0 should be, and their roots are 1e-8
    assert base == pytest.approx(frechet_distance(shift, turn @ a @ turn.T, shift, turn @ b @ turn.T), rel=1e-7)
    assert frechet_distance(zero, 9 * a, zero, 9 * b) == pytest.approx(9 * base, rel=1e-7)
    root = matrix_root(a)
    assert_close(root @ root, a), assert_close(root, root.T)
    tiny = torch.diag(torch.tensor([1.0, -1e-17])).double()
    assert torch.isfinite(matrix_root(tiny)).all()


def test_fid_of_equal_gaussians_falls_like_one_over_n():
    """The bias: d = 8, both sets of one distribution, four times the samples leave a quarter of the FID."""
    values = [np.mean([fid(FeatureStatistics(draw(n, 8, 2 * s)), FeatureStatistics(draw(n, 8, 2 * s + 1))) for s in range(40)])
              for n in (200, 800)]
    assert 3.2 < values[0] / values[1] < 5.0


@pytest.mark.parametrize("bad", [
    (torch.zeros(2), torch.eye(3), torch.zeros(2), torch.eye(2)), (torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(2)),
    (torch.zeros(2, 2), torch.eye(2), torch.zeros(2), torch.eye(2)),
])
def test_frechet_distance_refuses_other_shapes(bad):
    with pytest.raises(ValueError, match="expected"):
        frechet_distance(*bad)


# ------------------------------------------------------------------------------------------ statistics
@pytest.mark.parametrize("sizes", [(100,), (1, 99), (33, 33, 34), (1,) * 100])
def test_batches_and_merges_equal_one_pass(sizes):
    x = draw(100, 6, shift=1e3)  # far from the origin, where sums of squares lose their digits
    whole, batched, halves = FeatureStatistics(x), FeatureStatistics(), [FeatureStatistics(), FeatureStatistics()]
    for i, part in enumerate(x.split(list(sizes))):
        batched.update(part)
        halves[i % 2].update(part)
    merged, turned = halves[0].merge(halves[1]), FeatureStatistics(x.flip(0))
    exact = torch.from_numpy(np.cov(x.double().numpy(), rowvar=False))
    for stats in (whole, batched, merged, turned):
        assert stats.n == 100 and stats.mean.dtype == stats.scatter.dtype == torch.float64
        assert_close(stats.mean, x.double().mean(0), rtol=1e-12, atol=0)
        assert_close(stats.covariance, exact, rtol=1e-9, atol=1e-9)


def test_merging_is_independent_of_order_and_copies():
    parts = [FeatureStatistics(draw(n, 5, n)) for n in (3, 40, 200)]
    results = []
    for order in itertools.permutations(range(3)):
        total = FeatureStatistics()
        for i in order:
            total.merge(parts[i])
        results.append(total)
    for other in results[1:]:
        assert_close(other.mean, results[0].mean), assert_close(other.scatter, results[0].scatter)
    assert [p.n for p in parts] == [3, 40, 200], "merging leaves what is merged as it was"
    first = FeatureStatistics().merge(parts[0])
    first.update(draw(7, 5))
    assert parts[0].n == 3 and not torch.equal(first.mean, parts[0].mean)
    assert FeatureStatistics().merge(FeatureStatistics()).n == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_statistics_are_float64_whatever_comes_in(dtype):
    x = draw(50, 4).to(dtype)
    stats = FeatureStatistics(x)
    assert_close(stats.covariance, x.double().T.cov()), assert_close(stats.mean, x.double().mean(0))


def test_statistics_are_saved_with_their_provenance(tmp_path):
    stats = FeatureStatistics(draw(20, 4), {**FACTS, "data": "x", "n": 20})
    path = save_statistics(stats, tmp_path / "a" / "s.safetensors")
    back = load_statistics(path)
    assert back.n == 20 and back.provenance == stats.provenance and torch.equal(back.scatter, stats.scatter)
    assert fid(back, stats) < 1e-12
    with pytest.raises(ValueError, match="exists already"):
        save_statistics(stats, path)
    before = path.read_bytes()
    save_statistics(FeatureStatistics(draw(30, 4), FACTS), path, overwrite=True)
    assert path.read_bytes() != before
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_statistics(tmp_path / "nothing.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="another kind"):
        load_statistics(tmp_path / "bad.safetensors")
    metrics.save_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="another kind"):
        load_statistics(tmp_path / "other.safetensors")


@pytest.mark.parametrize("key", COMPARABLE)
def test_other_provenance_is_never_compared(key):
    a, b = FeatureStatistics(draw(9, 3), FACTS), FeatureStatistics(draw(9, 3), {**FACTS, key: "other"})
    for call in (lambda: fid(a, b), lambda: a.merge(b), lambda: check_comparable(FACTS, {})):
        with pytest.raises(ValueError, match="other|None"):
            call()
    assert a.n == 9, "a refused merge changes nothing"
    check_comparable({**FACTS, "data": "p", "n": 1}, {**FACTS, "data": "q", "n": 2})


def test_statistics_refuse_what_they_cannot_use():
    stats = FeatureStatistics(draw(9, 3))
    for bad in (draw(9, 4), torch.zeros(3), torch.zeros(0, 3), torch.full((2, 3), math.nan), torch.full((2, 3), math.inf)):
        with pytest.raises(ValueError, match="expected"):
            stats.update(bad)
    with pytest.raises(ValueError, match="at least 2"):
        _ = FeatureStatistics(draw(1, 3)).covariance
    with pytest.raises(ValueError, match="4 dimensions"):
        stats.merge(FeatureStatistics(draw(9, 4)))
    with pytest.raises(TypeError):
        stats.update(np.zeros((2, 3)))


# ------------------------------------------------------------------------------------------ KID
def _kid_by_loops(x, y):
    x, y = x.double().numpy(), y.double().numpy()
    k = lambda a, b: (np.dot(a, b) / len(a) + 1) ** 3
    n, m = len(x), len(y)
    within_x = np.mean([k(x[i], x[j]) for i in range(n) for j in range(n) if i != j])
    within_y = np.mean([k(y[i], y[j]) for i in range(m) for j in range(m) if i != j])
    return within_x + within_y - 2 * np.mean([k(a, b) for a in x for b in y])


def test_kid_against_loops_and_chunks():
    x, y = draw(23, 7, 1), draw(31, 7, 2, 1.2, 0.3)
    assert kid(x, y) == pytest.approx(_kid_by_loops(x, y), rel=1e-9)
    assert metrics._kernel_sum(x.double(), y.double(), chunk=5) == pytest.approx(metrics._kernel_sum(x.double(), y.double()), rel=1e-12)


def test_kid_against_torch_fidelity_and_torchmetrics():
    """With subsets as large as the set there is one subset, and all three must give one number."""
    x, y = draw(120, 9, 1), draw(120, 9, 2, 1.2, 0.3)
    theirs = torch_fidelity.metric_kid.kid_features_to_metric(x.double(), y.double(), kid_subsets=1, kid_subset_size=120, verbose=False)
    assert kid(x, y) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    other = KernelInceptionDistance(feature=torch.nn.Flatten(), subsets=1, subset_size=120)
    other.real_features, other.fake_features = [x.double()], [y.double()]
    assert kid(x, y) == pytest.approx(other.compute()[0].item(), rel=1e-3)
    ours = kid_subsets(x, y, subsets=5, subset_size=120)
    assert ours.value == pytest.approx(kid(x, y), rel=1e-9) and ours.error < 1e-9


def test_subsets_of_kid_scatter_around_the_closed_form_as_torch_fidelitys_do():
    x, y = draw(400, 9, 1), draw(300, 9, 2, 1.1, 0.1)
    ours = kid_subsets(x, y, 200, 50, seeded(0))
    theirs = torch_fidelity.metric_kid.kid_features_to_metric(x.double(), y.double(), kid_subsets=200, kid_subset_size=50, verbose=False)
    assert abs(ours.value - kid(x, y)) < 4 * ours.error / 200**0.5
    assert 0.75 < ours.error / theirs["kernel_inception_distance_std"] < 1.33
    assert ours == kid_subsets(x, y, 200, 50, seeded(0))


def test_kid_is_unbiased_where_fid_is_not():
    values = torch.tensor([kid(draw(30, 6, 2 * s), draw(30, 6, 2 * s + 1)) for s in range(300)])
    assert abs(values.mean()) < 4 * values.std() / 300**0.5 and (values < 0).any()


def test_kid_refuses_sets_that_are_too_small_or_of_other_width():
    for call in (lambda: kid(draw(1, 3), draw(5, 3)), lambda: kid(draw(5, 3), draw(5, 4)), lambda: kid_subsets(draw(5, 3), draw(9, 3), 10, 6),
                 lambda: kid_subsets(draw(9, 3), draw(9, 3), 1, 6)):
        with pytest.raises(ValueError, match="expected"):
            call()


# ------------------------------------------------------------------------------------------ precision, recall, density, coverage
def _manifold_by_loops(samples, reference, k, k_density):
    """The four numbers, written out."""
    def radii(points, k):
        return [sorted(np.linalg.norm(p - q) for q in points)[k] for p in points]

    def share(points, centres):
        r = radii(centres, k)
        return np.mean([any(np.linalg.norm(p - c) <= r[i] for i, c in enumerate(centres)) for p in points])

    r = radii(reference, k_density)
    inside = np.array([[np.linalg.norm(s - c) <= r[i] for s in samples] for i, c in enumerate(reference)])
    return share(samples, reference), share(reference, samples), inside.sum() / (k_density * len(samples)), inside.any(1).mean()


@pytest.mark.parametrize("k, chunk", [(3, 1024), (1, 7), (5, 16)])
def test_manifold_metrics_against_loops(k, chunk):
    samples, reference = draw(45, 5, 1, 0.8, 0.2), draw(60, 5, 2)
    expected = _manifold_by_loops(samples.double().numpy(), reference.double().numpy(), k, k + 1)
    got = (*precision_recall(samples, reference, k, chunk), *density_coverage(samples, reference, k + 1, chunk))
    assert got == pytest.approx(expected, abs=1e-12) and 0 < got[0] < 1


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.5])
def test_precision_and_recall_against_torch_fidelity(scale):
    samples, reference = draw(300, 6, 1, scale), draw(250, 6, 2)
    theirs = torch_fidelity.metric_prc.prc_features_to_metric(samples.double(), reference.double(), prc_neighborhood=3, save_cpu_ram=False, verbose=False)
    assert precision_recall(samples, reference) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-3)


def test_precision_sees_inventions_and_recall_sees_omissions():
    left, right, far = draw(200, 2, 1), draw(200, 2, 2, shift=20), draw(200, 2, 3, shift=-50)
    both = torch.cat([left, right])
    dropped, invented = precision_recall(draw(200, 2, 4), both), precision_recall(torch.cat([draw(200, 2, 4), far]), left)
    assert dropped[0] > 0.9 and dropped[1] < 0.6
    assert invented[0] < 0.6 and invented[1] > 0.9
    assert density_coverage(draw(200, 2, 4), both)[1] < 0.6
    assert density_coverage(both, draw(300, 2, 5))[0] < 0.75


def test_one_outlier_fools_precision_and_hardly_density():
    """The reason for density [Naeem 2020]: a lone reference point has a huge ball."""
    reference = torch.cat([draw(200, 2, 1), torch.full((1, 2), 30.0)])
    noise = draw(200, 2, 2, 0.5, 25)
    assert precision_recall(noise, reference)[0] > 0.9 and density_coverage(noise, reference)[0] < 0.3


def test_density_of_the_same_distribution_is_about_one():
    density, coverage = density_coverage(draw(1500, 4, 1), draw(1500, 4, 2))
    assert 0.93 < density < 1.07
    assert 0.93 < coverage < 0.995  # 1 - (share of balls without a sample), 0.969 in the limit for k = 5 [Naeem 2020, lemma 2]


def test_neighbour_radii_and_their_errors():
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    assert neighbour_radii(line, 1).tolist() == [1, 1, 2, 4] and neighbour_radii(line, 3).tolist() == [7, 6, 4, 7]
    for call in (lambda: neighbour_radii(line, 4), lambda: precision_recall(line, line[:3], 3), lambda: density_coverage(line, line, 4),
                 lambda: precision_recall(line, torch.zeros(9, 2)), lambda: density_coverage(torch.zeros(0, 1), line, 1)):
        with pytest.raises(ValueError, match="expected"):
            call()


# ------------------------------------------------------------------------------------------ Inception score
def test_inception_score_against_torch_fidelity_and_torchmetrics():
    logits = 3 * torch.randn(530, 12, generator=seeded(0))
    for splits in (1, 3, 10):
        theirs = torch_fidelity.metric_isc.isc_features_to_metric(logits, splits, shuffle=False)
        got = inception_score(logits.double().softmax(1), splits)
        assert got == pytest.approx((theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-3)
    other = InceptionScore(feature=torch.nn.Flatten(), splits=1)
    other.features = [logits]
    assert inception_score(logits.double().softmax(1), 1).value == pytest.approx(other.compute()[0].item(), rel=1e-3)


def test_inception_score_at_its_ends():
    classes = torch.eye(8).repeat(5, 1)
    assert inception_score(classes, 1).value == pytest.approx(8.0), "sure and even: the number of classes"
    assert inception_score(torch.full((40, 8), 0.125), 2).value == pytest.approx(1.0)
    assert inception_score(classes[:1].repeat(20, 1), 1).value == pytest.approx(1.0), "sure, but always of one class"


@pytest.mark.parametrize("bad, splits", [(torch.ones(4, 3), 1), (torch.tensor([[2.0, -1.0]]), 1), (torch.eye(3), 4), (torch.eye(3), 0)])
def test_inception_score_refuses_what_are_no_probabilities(bad, splits):
    with pytest.raises(ValueError, match="expected"):
        inception_score(bad, splits)


# ------------------------------------------------------------------------------------------ memorisation
def test_nearest_against_loops():
    queries, keys = draw(40, 5, 1), draw(70, 5, 2)
    distance, index = nearest(queries, keys, chunk=13)
    table = np.linalg.norm(queries.double().numpy()[:, None] - keys.double().numpy()[None], axis=-1)
    assert np.allclose(distance, table.min(1)) and np.array_equal(index, table.argmin(1))


def test_memorisation_tells_copies_from_new_data():
    train, held_out, new = draw(800, 6, 1), draw(800, 6, 2), draw(800, 6, 3)
    healthy, copied = memorisation(new, train, held_out), memorisation(train[:300], train, held_out)
    assert 0.9 < healthy.ratio < 1.1 and healthy.share < 0.03
    assert copied.ratio < 1e-6 and copied.share == 1.0
    half = memorisation(torch.cat([new[:150], train[:50] + 1e-3]), train, held_out)
    assert 0.2 < half.share < 0.32, "a quarter copied"
    usual = nearest(held_out, train)[0]
    assert (usual < healthy.threshold).double().mean().item() == pytest.approx(0.01, abs=0.002)
    for bad in (0.0, 1.0):
        with pytest.raises(ValueError, match="quantile"):
            memorisation(new, train, held_out, bad)
    with pytest.raises(ValueError, match="held_out"):
        memorisation(new, train, train[:100])


# ------------------------------------------------------------------------------------------ intervals
def test_bootstrap_of_a_mean_agrees_with_its_standard_error():
    rows = torch.randn(400, generator=seeded(0))
    value, low, high = bootstrap(rows, resamples=2000, generator=seeded(1))
    assert value == pytest.approx(rows.double().mean().item())
    assert (high - low) / 2 == pytest.approx(1.96 * rows.std().item() / 20, rel=0.1) and low < value < high
    assert bootstrap(rows, generator=seeded(1)) == bootstrap(rows, generator=seeded(1)) != bootstrap(rows, generator=seeded(2))
    narrow = bootstrap(rows, level=0.5, generator=seeded(1))
    assert narrow.high - narrow.low < 0.5 * (high - low)


def test_bootstrap_covers_as_often_as_it_says():
    hits = [b.low <= 0 <= b.high for b in (bootstrap(torch.randn(60, generator=seeded(s)), resamples=150, generator=seeded(s)) for s in range(150))]
    assert 0.87 <= np.mean(hits) <= 0.99


def test_fid_interval_is_as_wide_as_fid_varies():
    """Against the spread over fresh draws, for samples that differ from the reference."""
    reference = FeatureStatistics(draw(4000, 5, 1))
    fresh = torch.tensor([fid(FeatureStatistics(draw(200, 5, 100 + s, 1.3, 0.3)), reference) for s in range(100)])
    intervals = [fid_interval(draw(200, 5, 100 + s, 1.3, 0.3), reference, 60, generator=seeded(s)) for s in range(20)]
    width = np.mean([i.high - i.low for i in intervals])
    assert 0.7 < width / (2 * 1.96 * fresh.std().item()) < 1.3
    assert all(i.low <= i.value <= i.high for i in intervals)
    assert np.mean([i.low <= fresh.mean() <= i.high for i in intervals]) >= 0.8


def test_bootstrap_refuses_nonsense():
    for rows, options in ((torch.zeros(0), {}), (torch.zeros(3), {"resamples": 1}), (torch.zeros(3), {"level": 1.0}), (torch.zeros(3), {"level": 0.0})):
        with pytest.raises(ValueError, match="expected"):
            bootstrap(rows, **options)


def test_fid_against_n_finds_the_limit():
    """Samples of a wider Gaussian: the extrapolation is nearer to the exact distance than the FID of all samples."""
    d, scale = 6, 1.2
    exact, errors, plain = d * (scale - 1) ** 2, [], []
    reference = FeatureStatistics()
    reference.n, reference.mean, reference.scatter = 10**6, torch.zeros(d).double(), torch.eye(d).double() * (10**6 - 1)
    for s in range(30):
        samples = scale * torch.randn(600, d, generator=seeded(s))
        curve = fid_against_n(samples, reference, generator=seeded(s))
        errors.append(curve.infinite - exact)
        plain.append(fid(FeatureStatistics(samples), reference) - exact)
        assert curve.sizes[0] == 120 and curve.sizes[-1] == 600 and len(curve.values) == 15
    assert np.mean(plain) > 0.01 > abs(np.mean(errors)) and curve.slope > 0


def test_the_line_of_fid_against_n_is_least_squares():
    samples, reference = draw(200, 3, 1), FeatureStatistics(draw(500, 3, 2))
    curve = fid_against_n(samples, reference, [50, 100, 200], seeded(0))
    slope, infinite = np.polyfit(1 / np.array(curve.sizes), curve.values, 1)
    assert curve.slope == pytest.approx(slope, rel=1e-6) and curve.infinite == pytest.approx(infinite, abs=1e-9)
    assert curve.values[-1] == pytest.approx(fid(FeatureStatistics(samples), reference))
    for sizes in ([100], [100, 100], [1, 100], [100, 201]):
        with pytest.raises(ValueError, match="sizes"):
            fid_against_n(samples, reference, sizes)


# ------------------------------------------------------------------------------------------ pairs
@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (2, 1, 17, 40)])
def test_psnr_and_ssim_against_torchmetrics(shape):
    x = torch.rand(shape, generator=seeded(0)) * 2 - 1
    y = (x + 0.3 * torch.randn(shape, generator=seeded(1))).clamp(-1, 1)
    theirs = tmf.structural_similarity_index_measure(y, x, data_range=2.0, reduction="none", return_full_image=True)[1]
    inner = theirs[..., 5:-5, 5:-5].flatten(1).mean(1)  # torchmetrics averages windows over the reflected border too
    assert_close(ssim(x, y), inner, rtol=1e-4, atol=1e-5)
    theirs = tmf.peak_signal_noise_ratio(y, x, data_range=2.0, reduction="none", dim=(1, 2, 3))
    assert_close(psnr(x, y), theirs.reshape(-1), rtol=1e-4, atol=1e-4)


def test_lpips_against_torchmetrics_at_random_weights():
    """The published network's code with random weights: the same features and channel weights give the same number."""
    torch.manual_seed(0)
    net = _LPIPS(pretrained=False, pnet_rand=True, net="alex").eval()
    x, y = torch.rand(2, 4, 3, 64, 64, generator=seeded(0)) * 2 - 1
    weights = [lin.model[-1].weight.detach()[0, :, 0, 0].abs() for lin in net.lins]
    for lin, w in zip(net.lins, weights):
        lin.model[-1].weight.data = w[None, :, None, None]
    with torch.no_grad():
        theirs = net(x, y).reshape(-1)
        ours = lpips(x, y, lambda v: list(net.net(net.scaling_layer(v))), weights)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_lpips_by_hand_and_its_errors():
    pyramid = lambda v: [v, v[:, :1] + 1]
    x, y = torch.rand(2, 3, 2, 5, 5, generator=seeded(0))
    unit = lambda v: v / np.sqrt((v**2).sum(1, keepdims=True))
    a, b = unit(x.numpy()), unit(y.numpy())
    by_hand = ((a - b) ** 2 * np.array([2.0, 3.0])[None, :, None, None]).sum(1).mean((1, 2))
    assert_close(lpips(x, y, pyramid, [torch.tensor([2.0, 3.0]), torch.ones(1)]), torch.from_numpy(by_hand).float(), rtol=1e-4, atol=1e-6)
    assert lpips(x, x, pyramid).tolist() == [0, 0, 0] and (lpips(x, y, pyramid) > 0).all()
    for weights in ([torch.ones(2)], [torch.ones(2), torch.ones(2)]):
        with pytest.raises(ValueError, match="channels"):
            lpips(x, y, pyramid, weights)
    with pytest.raises(ValueError, match="expected"):
        lpips(x, y[:2], pyramid)


@pytest.mark.parametrize("measure", [metrics.psnr, metrics.ssim])
def test_pictures_in_another_range_are_refused(measure):
    draw = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 2, 3, 16, 16, generator=draw)
    with pytest.raises(ValueError, match=r"x, y: got values in \[.*, 255\] and \[.*, 25.\], expected a range of 2"):
        measure(255 * x, 255 * y)
    with pytest.raises(TypeError, match=r"y: got dtype torch.uint8, expected floating point"):
        measure(x, (255 * y).byte())
    assert_close(measure(255 * x, 255 * y, data_range=255.0), measure(x, y, data_range=1.0), atol=1e-3, rtol=1e-4)
    assert measure(2 * x - 1, 50 * y).isfinite().all(), "what diverged is measured against what did not"
    assert measure(1.5 * (2 * x - 1), 1.5 * (2 * y - 1)).isfinite().all(), "a little beyond is what networks paint"


def test_a_reference_gives_its_root_once(monkeypatch):
    """For thousands of features the root costs seconds, and a bootstrap asks a hundred times."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 6, generator=draw), 1.2 * torch.randn(40, 6, generator=draw)
    reference, calls, root = metrics.FeatureStatistics(y), [], metrics.matrix_root
    plain = [metrics.frechet_distance(s.mean, s.covariance, reference.mean, reference.covariance) for s in map(metrics.FeatureStatistics, (x, x[:20]))]
    monkeypatch.setattr(metrics, "matrix_root", lambda m: calls.append(m) or root(m))
    assert [metrics.fid(metrics.FeatureStatistics(s), reference) for s in (x, x[:20])] == plain and len(calls) == 3
    before = metrics.fid(metrics.FeatureStatistics(x), reference)
    reference.update(y[:5] + 3)
    now, sample = metrics.fid(metrics.FeatureStatistics(x), reference), metrics.FeatureStatistics(x)
    assert now == metrics.frechet_distance(sample.mean, sample.covariance, reference.mean, reference.covariance) != before, "more pictures, another root"
    with pytest.raises(ValueError, match=r"mean_b: got shape \(4,\)"):
        metrics.fid(reference, metrics.FeatureStatistics(x[:, :4]))


def test_a_bootstrap_holds_one_draw_at_a_time(monkeypatch):
    """A thousand resamples of 20,000 rows are 160 MB of numbers; one is enough at a time."""
    values, draws, made, seen, real = torch.randn(50, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1), [], [], torch.randint
    monkeypatch.setattr(metrics.torch, "randint", lambda *a, **k: made.append(1) or real(*a, **k))
    out = metrics.bootstrap(values, lambda rows: seen.append(len(made)) or rows.mean().item(), 40, generator=torch.Generator().manual_seed(1))
    assert seen[:40] == list(range(1, 41)), "each is drawn when its turn comes"
    means = torch.tensor([values[real(50, (50,), generator=draws)].mean().item() for _ in range(40)], dtype=torch.float64)
    ends = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert out == pytest.approx((values.mean().item(), *ends), rel=1e-12), "the draws of one generator, in turn"
