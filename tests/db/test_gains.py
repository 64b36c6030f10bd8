"""Equal loudness without true-peak overs, for any pair of figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from db.gains import PEAK_CEILING_DBFS, TARGET_LUFS, pair_gains_db

figures = st.tuples(st.floats(-60, -5), st.floats(-40, 3))


@given(figures, figures)
def test_a_pair_is_equally_loud_and_below_the_ceiling(x: tuple[float, float], y: tuple[float, float]) -> None:
    gain_x_db, gain_y_db = pair_gains_db(*x, *y)
    assert x[0] + gain_x_db == pytest.approx(y[0] + gain_y_db, abs=0.2)
    assert x[0] + gain_x_db <= TARGET_LUFS + 1e-9
    assert max(x[1] + gain_x_db, y[1] + gain_y_db) <= PEAK_CEILING_DBFS + 1e-9


def test_a_silent_clip_is_left_alone_and_the_other_reaches_the_target() -> None:
    assert pair_gains_db(None, None, -24.0, -12.0) == (0.0, 6.0)
