"""Drawing one token per sequence, against NumPy and against the probabilities themselves."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ds4mlx.engine.sampling import Sampler, draw_key, log_probs
from ds4mlx.errors import DataError

SIZES = st.tuples(st.integers(1, 3), st.integers(1, 40))
SEEDS = st.integers(0, 2**32 - 1)
OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0.05, 5),
        "top_p": st.floats(0, 1),
        "top_k": st.integers(0, 50),
        "min_p": st.floats(0, 1),
    },
)


def random_logits(seed, size):
    return np.random.default_rng(seed).normal(0, 3, size).astype(np.float32)


def softmax(row):
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def reference(row, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0):
    """Probabilities a token is drawn with, (vocab,) float64, and the closest decision's margin."""
    row = row.astype(np.float64) / temperature
    order = np.argsort(-row, kind="stable")
    kept = list(order[: top_k or len(row)])
    shares = softmax(row[kept])
    before = np.cumsum(shares) - shares
    margin = np.abs(before[1:] - top_p).min(initial=1) if 0 < top_p < 1 else 1
    if top_p < 1:
        kept = [t for i, t in enumerate(kept) if i == 0 or before[i] < top_p]
    relative = np.exp(row[kept] - row[kept[0]])
    margin = min(margin, np.abs(relative[1:] - min_p).min(initial=1)) if min_p else margin
    kept = [t for t, share in zip(kept, relative, strict=True) if share >= min_p]
    result = np.zeros(len(row))
    result[kept] = softmax(row[kept])
    return result, margin


def log_probabilities(sampler, logits):
    """What the sampler's candidates say, (B, vocab) in the order of the ids."""
    tokens, logs = (np.array(part) for part in sampler.candidates(mx.array(logits)))
    result = np.full(logits.shape, np.nan)
    np.put_along_axis(result, tokens, logs, axis=-1)
    return result


def probabilities(sampler, logits):
    return np.exp(log_probabilities(sampler, logits))


def draw(sampler, logits, position=0):
    """The tokens drawn at a position, int (B,)."""
    return sampler(mx.array(logits), draw_key(sampler.seed or 0, position))


@given(SEEDS, SIZES, OPTIONS)
def test_candidates_match_the_reference(seed, size, options):
    logits = random_logits(seed, size)
    expected = [reference(row, **options) for row in logits]
    assume(all(margin > 1e-5 for _, margin in expected))
    chances = np.array([chances for chances, _ in expected])
    logs = log_probabilities(Sampler(**options), logits)
    np.testing.assert_array_equal(np.isfinite(logs), chances > 0)
    np.testing.assert_allclose(np.exp(logs), chances, rtol=2e-4, atol=1e-6)


@given(SEEDS, SIZES, OPTIONS)
def test_a_drawn_token_is_a_candidate(seed, size, options):
    logits = random_logits(seed, size)
    sampler = Sampler(**options, seed=seed)
    drawn = draw(sampler, logits)
    assert drawn.dtype == mx.int32
    assert drawn.shape == size[:1]
    logs = log_probabilities(sampler, logits)
    assert np.all(np.isfinite(logs[np.arange(len(logs)), np.array(drawn)]))


def test_top_p_keeps_the_token_that_crosses():
    logits = np.log(np.array([[0.1, 0.5, 0.15, 0.25]], np.float32))
    kept = {p: np.flatnonzero(probabilities(Sampler(top_p=p), logits)[0]) for p in (0.4, 0.6, 0.8)}
    assert [list(tokens) for tokens in kept.values()] == [[1], [1, 3], [1, 2, 3]]


def test_each_filter_sees_what_the_one_before_left():
    # Among the first two tokens the first has 5/8, so 0.6 is reached there but not among all.
    logits = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))
    assert np.count_nonzero(probabilities(Sampler(top_p=0.6), logits)) == 2
    assert np.count_nonzero(probabilities(Sampler(top_p=0.6, top_k=2), logits)) == 1
    # The temperature comes first: at 1/2 the shares are 25 : 9 : 4.
    cold = probabilities(Sampler(temperature=0.5, min_p=0.3), logits)
    np.testing.assert_allclose(cold[0], [25 / 34, 9 / 34, 0], rtol=1e-5)


@pytest.mark.parametrize("options", [{"top_p": 0.0}, {"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-9}])
def test_the_most_probable_token_always_stays(options):
    logits = mx.array(random_logits(3, (64, 500)))
    drawn = draw(Sampler(**options, seed=1), logits)
    assert drawn.tolist() == mx.argmax(logits, axis=-1).tolist()


def test_equal_logits_still_cut_to_k():
    assert np.count_nonzero(probabilities(Sampler(top_k=3), np.zeros((1, 9), np.float32))) == 3


@given(SEEDS, SIZES)
def test_greedy_takes_the_lowest_of_equals(seed, size):
    logits = np.random.default_rng(seed).integers(0, 3, size).astype(np.float32)
    drawn = draw(Sampler(temperature=0, top_k=2, seed=seed), logits)
    assert drawn.dtype == mx.int32
    assert drawn.tolist() == np.argmax(logits, axis=-1).tolist()


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 5e-324])
@pytest.mark.parametrize("top_k", [0, 5])
def test_hardly_any_temperature_is_greedy(temperature, top_k):
    logits = mx.array(random_logits(5, (16, 100)) * 1e3)
    drawn = draw(Sampler(temperature=temperature, top_k=top_k, seed=2), logits)
    assert drawn.tolist() == mx.argmax(logits, axis=-1).tolist()


@pytest.mark.parametrize("top_k", [0, 6])
def test_tokens_ruled_out_are_never_drawn(top_k):
    row = np.full(8, -np.inf, np.float32)
    row[[2, 5]] = [3e38, 3e38]
    logits = mx.array(np.tile(row, (2000, 1)))
    drawn = draw(Sampler(temperature=1e300, top_k=top_k, seed=4), logits)
    assert set(drawn.tolist()) == {2, 5}


DRAWS = 20_000


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.5, "top_k": 6},
        {"top_p": 0.8},
        {"min_p": 0.1, "top_p": 0.95},
    ],
)
def test_draws_follow_the_probabilities(options):
    row = random_logits(11, (12,)) / 2
    chances, _ = reference(row, **options)
    drawn = draw(Sampler(**options, seed=7), np.tile(row, (DRAWS, 1)))
    counts = np.bincount(np.array(drawn), minlength=len(row))
    expected = chances[chances > 0] * DRAWS
    statistic = np.sum((counts[chances > 0] - expected) ** 2 / expected)
    assert counts[chances == 0].sum() == 0
    # Mean n - 1 and variance 2 (n - 1) for n tokens; six deviations are out of reach of chance.
    freedom = len(expected) - 1
    assert statistic < freedom + 6 * math.sqrt(2 * freedom)


def draws(seed, count=30):
    logits = mx.zeros((2, 1000))
    return [draw(Sampler(seed=seed), logits, position).tolist() for position in range(count)]


def test_a_draw_depends_on_seed_and_position_alone():
    first = draws(5)
    mx.random.seed(1)
    before = mx.random.uniform().item()
    mx.random.seed(1)
    again = draws(5)
    assert mx.random.uniform().item() == before
    assert again == first
    assert len({tuple(pair) for pair in first}) > 25
    assert draws(6) != first
    assert draw(Sampler(seed=5), mx.zeros((2, 1000)), 17).tolist() == first[17]


@pytest.mark.parametrize("seed", [0, 1, 1 << 32, (1 << 64) - 1])
def test_keys_of_neighbours_differ(seed):
    others = [(seed, 1), ((seed + 1) % (1 << 64), 0), (seed * 10 + 1, 0), (seed // 10, 0)]
    keys = {tuple(draw_key(*each).tolist()) for each in [(seed, 0), *others]}
    assert len(keys) == len({(seed, 0), *others})


VOCABULARY = 129_280


def kept_tokens(logits, **options):
    """The candidates of one row of logits, as a set of ids."""
    return set(np.flatnonzero(np.isfinite(log_probabilities(Sampler(**options), logits[None])[0])))


@pytest.mark.parametrize("top_p", [0.1, 0.25, 0.5, 0.75, 0.9, 0.999, 1 - 2**-30])
@pytest.mark.parametrize("temperature", [0.6, 1, 1.7])
def test_the_nucleus_of_a_whole_vocabulary_is_what_float64_says(top_p, temperature):
    """In the flat tail 100,000 small shares add up; a float32 sum is off by many tokens there."""
    logits = np.random.default_rng(5).normal(0, 1, VOCABULARY).astype(np.float32)
    row = logits.astype(np.float64) / temperature
    order = np.argsort(-row, kind="stable")
    shares = softmax(row[order])
    count = 1 + np.count_nonzero(np.cumsum(shares)[:-1] < top_p)
    assert kept_tokens(logits, top_p=top_p, temperature=temperature) == set(order[:count])


@pytest.mark.parametrize(
    ("equals", "top_p", "count"),
    [
        (VOCABULARY, 0.5, VOCABULARY // 2),
        (VOCABULARY, 0.25, VOCABULARY // 4),
        (VOCABULARY, 1 - 1 / (2 * VOCABULARY), VOCABULARY),
        (VOCABULARY, 1.5 / VOCABULARY, 2),
        (1 << 16, 0.5, 1 << 15),
        (1 << 16, 0.5 + 2**-17, (1 << 15) + 1),
        (3, 2 / 3, 2),
        (10, 0.1, 1),
        (10, 0.7, 7),
    ],
)
def test_ties_at_the_edge_of_the_nucleus(equals, top_p, count):
    """Of n equal tokens, the fewest that reach the share; those ruled out do not count."""
    logits = np.full(VOCABULARY, -np.inf, np.float32)
    logits[:equals] = 1.25
    assert len(kept_tokens(logits, top_p=top_p)) == count


@pytest.mark.parametrize("top_k", [8, 9, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 63, 10**40])
@pytest.mark.parametrize("more", [{}, {"top_p": 0.999999}, {"min_p": 1e-9}])
def test_top_k_of_the_vocabulary_and_more_is_no_limit(top_k, more):
    logits = random_logits(3, (2, 8))
    want = probabilities(Sampler(**more, top_k=0), logits)
    np.testing.assert_array_equal(probabilities(Sampler(top_k=top_k, **more), logits), want)
    assert draw(Sampler(top_k=top_k, seed=(1 << 64) - 1, **more), logits).shape == (2,)


@pytest.mark.parametrize("min_p", [5e-324, 1e-300, np.float32(0.25), 1])
@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 10**400, np.float64(0.5), 1e308])
def test_extreme_numbers_still_draw_a_possible_token(min_p, temperature):
    row = np.array([[0, 1, -np.inf, 3e38]], np.float32)
    sampler = Sampler(temperature, min_p=min_p, top_p=0.99, seed=np.uint64(1 << 63))
    assert draw(sampler, row).item() in (0, 1, 3)


@given(SEEDS, SIZES, st.sampled_from([mx.float32, mx.bfloat16]))
def test_log_probs(seed, size, dtype):
    logits = mx.array(random_logits(seed, size) * 20).astype(dtype)
    logs = log_probs(logits)
    assert logs.dtype == mx.float32
    expected = [np.log(softmax(np.float64(row))) for row in np.array(logits.astype(mx.float32))]
    np.testing.assert_allclose(np.array(logs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, "1", None, True]),
        ("top_p", [-0.1, 1.1, math.nan, "1", None]),
        ("min_p", [-0.1, 1.1, math.nan, "1", None]),
        ("top_k", [-1, 1.5, "1", None, True]),
        ("seed", [-1, 1 << 64, 1.5, "1", False]),
    ],
)
def test_bad_option_is_named(option, values):
    for value in values:
        with pytest.raises(DataError, match=f"^{option} must be a"):
            Sampler(**{option: value})
