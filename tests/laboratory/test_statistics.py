"""Intervals of differences, on simulated models whose true difference is known."""

import math

import numpy as np
import pytest

from laboratory.statistics import LEVEL, Answers, compare, drawn, holm, mean_and_deviation, student

TRIES = 400
PICTURES = 40
QUESTIONS = 5  # of each picture

# Of 400 intervals that miss the truth in one of twenty, more than this do in one of a thousand.
MOST_MISSES = 34


def simulate(rng, gap: float, seed_sd: float, seeds: int = 3) -> tuple[Answers, Answers]:
    """Return one score of a cell and of a baseline: right answers whose odds are all random.

    gap: how much better the cell is, in log odds. seed_sd: how much a seed shifts a model's log
    odds. Pictures are easy or hard for both cells, and questions suit one of them more.
    """
    picture = np.repeat(rng.normal(1.0, 1.0, PICTURES), QUESTIONS)
    found = []
    for shift in (gap / 2, -gap / 2):
        liking = np.repeat(rng.normal(0, 0.4, PICTURES), QUESTIONS)
        of_seed = rng.normal(0, seed_sd, (seeds, 1))
        odds = picture + liking + rng.normal(0, 0.4, len(picture)) + of_seed + shift
        credits = (rng.random(odds.shape) < 1 / (1 + np.exp(-odds))).astype(float)
        found.append(answers(credits))
    return found[0], found[1]


def answers(credits: np.ndarray) -> Answers:
    """Return a score of these credits, of QUESTIONS about each picture."""
    weights = np.ones_like(credits)
    clusters = np.arange(credits.shape[1]) // QUESTIONS
    scores = 100 * credits.mean(1)
    return Answers("score", scores, 50.0, credits.shape[1], None, credits, weights, clusters)


def true_difference(gap: float, seed_sd: float) -> float:
    """Return the expected difference, of a large sample."""
    rng = np.random.default_rng(1)
    odds = rng.normal(1.0, math.sqrt(1 + 2 * 0.4**2 + seed_sd**2), 1_000_000)
    right = [1 / (1 + np.exp(-(odds + shift))) for shift in (gap / 2, -gap / 2)]
    return 100 * float((right[0] - right[1]).mean())


def misses(gap: float, seed_sd: float, seeds: int = 3) -> int:
    """Return how many of TRIES intervals do not hold the true difference."""
    rng = np.random.default_rng(0)
    truth = true_difference(gap, seed_sd)
    found = [compare(*simulate(rng, gap, seed_sd, seeds)) for _ in range(TRIES)]
    return sum(abs(one.mean - truth) > one.half(LEVEL) for one in found)


@pytest.mark.parametrize("gap, seed_sd", [(0.0, 0.0), (0.0, 0.1), (0.0, 0.4), (0.8, 0.1)])
def test_the_interval_holds_the_truth_as_often_as_it_says(gap, seed_sd):
    """Of cells that do not differ (a null axis), that is how often none is called a difference."""
    assert misses(gap, seed_sd) <= MOST_MISSES


@pytest.mark.parametrize("seeds", [2, 5])
def test_the_interval_holds_the_truth_with_fewer_and_more_seeds(seeds):
    assert misses(0.0, 0.3, seeds) <= MOST_MISSES


def two_way_bootstrap(cell: Answers, other: Answers, rng) -> tuple[float, float]:
    """Return the interval of percentiles when seeds are drawn as pictures are."""
    gains = cell.credits - other.credits
    gains = gains.reshape(len(gains), PICTURES, QUESTIONS).mean(2)  # (seeds, pictures)
    seeds = rng.multinomial(len(gains), np.full(len(gains), 1 / len(gains)), 300)
    pictures = rng.multinomial(PICTURES, np.full(PICTURES, 1 / PICTURES), 300)
    means = ((seeds @ gains) * pictures).sum(1) / gains.size
    return tuple(np.percentile(100 * means, [2.5, 97.5]))


def test_drawing_three_seeds_promises_too_much():
    """That is why the interval is none of percentiles."""
    rng = np.random.default_rng(0)
    called = 0
    for _ in range(TRIES):
        low, high = two_way_bootstrap(*simulate(rng, 0.0, 0.4), rng)
        called += not low <= 0 <= high
    assert called > MOST_MISSES


@pytest.mark.parametrize("seeds, gap", [(3, 1.6), (5, 1.0)])
def test_a_planted_difference_is_found(seeds, gap):
    """Of 25 points with three seeds and 200 questions; with five seeds 16 points are enough."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(100):
        low, _ = compare(*simulate(rng, gap, 0.1, seeds)).interval
        found += low > 0
    assert found >= 90


def test_the_bootstrap_has_the_variance_of_the_formula():
    """Of a mean over equal pictures that is the variance of the pictures' means by their number."""
    cell, _ = simulate(np.random.default_rng(3), 0.0, 0.2)
    of_pictures = 100 * cell.credits.reshape(3, PICTURES, QUESTIONS).mean((0, 2))
    assert drawn(cell).std() == pytest.approx(of_pictures.std() / math.sqrt(PICTURES), rel=0.05)


def test_questions_count_by_their_weights():
    credits = np.array([[1.0, 0.0, 0.5], [1.0, 0.0, 0.5]])
    one = answers(credits)
    one.weights = np.array([[1.0, 0.0, 3.0], [1.0, 0.0, 3.0]])
    one.clusters = np.zeros(3, int)
    assert drawn(one) == pytest.approx(100 * 2.5 / 4)


def test_models_that_are_right_everywhere_have_an_interval():
    """Other questions might tell them apart."""
    perfect = answers(np.ones((3, 300)))
    found = compare(perfect, perfect)
    low, high = found.interval
    assert found.mean == 0 and low < -1 and high > 1 and found.p == pytest.approx(1)


def test_p_is_the_level_at_which_the_interval_reaches_zero():
    cell, other = simulate(np.random.default_rng(0), 1.0, 0.1)
    found = compare(cell, other)
    assert found.half(found.p) == pytest.approx(found.mean)

    # Without questions it is that of Student's test on the pairs.
    cell.credits = None
    gains = cell.scores - other.scores
    t = gains.mean() / (gains.std(ddof=1) / math.sqrt(3))
    assert student(compare(cell, other).p, 2) == pytest.approx(t, rel=1e-6)


def test_two_sets_of_seeds_are_not_paired():
    cell, other = simulate(np.random.default_rng(0), 0.0, 0.5)
    other.scores = cell.scores + 1.0
    other.credits = cell.credits = None
    assert compare(cell, other).p < 1e-6
    assert compare(cell, other, paired=False).p > 0.05


def test_one_seed_has_no_interval():
    cell, other = simulate(np.random.default_rng(0), 0.0, 0.1, seeds=1)
    assert compare(cell, other) is None
    assert mean_and_deviation(cell.scores) == (cell.scores[0], None)


def test_holm():
    """His procedure stops at the first that is too large, whatever follows."""
    assert holm([0.01, 0.02, 0.04]) == [True, True, True]
    assert holm([0.04, 0.01, 0.03]) == [False, True, False]
    assert holm([0.02, 0.03, 0.001, 0.9]) == [False, False, True, False]
    assert holm([]) == []


@pytest.mark.parametrize(
    "level, freedom, t",
    [(0.05, 1, 12.7062), (0.05, 2, 4.30265), (0.05, 3, 3.18245), (0.01, 5, 4.03214)]
    + [(0.001, 2, 31.5991), (0.05, 30, 2.04227), (0.05, 100, 1.98397), (0.05, 1000, 1.96234)],
)
def test_students_t_is_that_of_the_tables(level, freedom, t):
    assert student(level, freedom) == pytest.approx(t, rel=1e-5)
