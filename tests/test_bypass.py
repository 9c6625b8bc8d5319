"""Whether drafts pay: they are used where they do, and tried again ever more rarely where not."""

from ds4mlx.engine.bypass import COUNTED, LONGEST, PAUSE, RENEWED, WARM, Bypass


def spent(bypass, plain, drafted, tokens):
    """How many of the next tokens were drafted, if they take so long."""
    count = 0
    for _ in range(tokens):
        count += bypass.drafting
        bypass.took(1, drafted if bypass.drafting else plain)
    return count


def test_drafts_stay_where_they_pay():
    bypass = Bypass()
    assert not bypass.drafting and spent(bypass, 1.0, 0.6, 10_000) > 9_500
    assert spent(bypass, 1.0, 1.5, 10_000) < 500  # and go when they no longer do


def test_drafts_go_where_they_lose():
    """They are tried again ever more rarely, and stay when they have come to pay."""
    bypass = Bypass()
    assert spent(bypass, 1.0, 1.2, 30_000) == 8 * (WARM + COUNTED)
    assert spent(bypass, 1.0, 0.5, 2 * LONGEST) > LONGEST / 2


def test_a_draw_changes_nothing():
    """Speeds within the gain that is asked for: what is used stays in use."""
    bypass = Bypass()
    assert spent(bypass, 1.0, 0.97, 2 * (WARM + COUNTED) + PAUSE) <= WARM + COUNTED + 1
    bypass = Bypass()
    spent(bypass, 1.0, 0.5, 4 * (WARM + COUNTED))
    assert spent(bypass, 1.0, 0.97, 10 * (WARM + COUNTED)) == 10 * (WARM + COUNTED)


def test_the_speed_without_drafts_is_measured_anew():
    bypass = Bypass()
    period = (RENEWED + 1) * (WARM + COUNTED)
    assert 0 < 3 * period - spent(bypass, 1.0, 0.5, 3 * period) <= 4 * (WARM + COUNTED)
