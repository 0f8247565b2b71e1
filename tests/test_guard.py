"""The skip guard against the rule in plain Python, and what the rule is for."""

from __future__ import annotations

import math
import statistics
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.guard import SkipGuard

CPU = torch.device("cpu")
NORMS = st.lists(
    st.one_of(
        st.floats(0.5, 1.5, width=32),
        st.floats(0, 2.0**100, width=32),
        st.sampled_from([math.nan, math.inf, 0.0]),
    ),
    max_size=80,
)


def judge(guard: SkipGuard, norms: list[float]) -> list[float]:
    return [guard.judge(torch.tensor(norm)).item() for norm in norms]


def by_the_rule(norms: list[float], sigma: float) -> list[float]:
    """Which of the norms are skipped, told by the definition."""
    window: list[float] = []
    skipped = []
    for norm in norms:
        limit = math.inf
        if len(window) >= 64 and (mean := statistics.fmean(window)) > 0:
            limit = max(mean + sigma * statistics.pstdev(window, mean), 2 * mean)
            limit = struct.unpack("f", struct.pack("f", limit))[0]
        skipped.append(float(not math.isfinite(norm) or norm > limit))
        if math.isfinite(norm):
            window = [*window, min(norm, limit)][-128:]
    return skipped


@settings(max_examples=60, deadline=None)
@given(start=st.integers(60, 130), spread=st.floats(0.0, 0.4), norms=NORMS, sigma=st.sampled_from([1.0, 3.0, 6.0]))
def test_skips_what_the_rule_skips(start, spread, norms, sigma):
    usual = [1.0 + spread * math.sin(2.5 * step) for step in range(start)]
    guard = SkipGuard(sigma, CPU)
    found = judge(guard, usual + norms)
    assert found == by_the_rule(usual + norms, sigma)
    assert guard.total == sum(found)
    assert guard.recent() == sum(found[-100:])


def test_a_spike_is_skipped_and_the_steps_around_it_are_not():
    norms = [1.0 + 0.1 * math.sin(step) for step in range(200)]
    norms[150] = 4.0
    assert [step for step, skipped in enumerate(judge(SkipGuard(6.0, CPU), norms)) if skipped] == [150]


def test_nothing_finite_is_skipped_before_half_the_window_is_known():
    assert judge(SkipGuard(6.0, CPU), [1.0] * 63 + [1e6]) == [0.0] * 64
    assert judge(SkipGuard(6.0, CPU), [1.0] * 64 + [1e6]) == [0.0] * 64 + [1.0]
    assert judge(SkipGuard(6.0, CPU), [math.nan, math.inf]) == [1.0, 1.0]


def test_almost_constant_norms_make_no_outliers_of_harmless_steps():
    assert judge(SkipGuard(6.0, CPU), [1.0] * 128 + [1.9, 2.5]) == [0.0] * 129 + [1.0]


def test_without_sigma_only_what_is_not_finite_is_skipped():
    guard = SkipGuard(None, CPU)
    assert judge(guard, [1.0] * 128 + [1e30, math.nan]) == [0.0] * 129 + [1.0]
    assert guard.norms.isfinite().all()


@pytest.mark.parametrize(("times", "steps"), [(3.0, 9), (10.0, 21), (100.0, 41)])
def test_a_lasting_change_is_accepted(times, steps):
    found = judge(SkipGuard(6.0, CPU), [1.0] * 128 + [times] * 128)[128:]
    assert found == [1.0] * steps + [0.0] * (128 - steps)


def test_norms_of_zero_set_no_scale():
    assert judge(SkipGuard(6.0, CPU), [0.0] * 128 + [1.0]) == [0.0] * 129


def test_forgets_skips_after_a_hundred_steps_but_not_their_number():
    guard = SkipGuard(6.0, CPU)
    judge(guard, [math.nan] * 3 + [1.0] * 98)
    assert (guard.recent(), guard.total) == (2, 3)


def test_goes_on_from_its_state_as_if_it_had_not_stopped():
    norms = [1.0 + 0.2 * math.sin(step) + (2.0 if step % 37 == 36 else 0.0) for step in range(300)]
    guard, other = SkipGuard(6.0, CPU), SkipGuard(6.0, CPU)
    judge(guard, norms[:150])
    for name, tensor in other.state_dict().items():
        tensor.copy_(guard.state_dict()[name])
    found = judge(guard, norms[150:])
    assert judge(other, norms[150:]) == found
    assert 0 < sum(found) < len(found)
    assert all(torch.equal(a, b) for a, b in zip(guard.state_dict().values(), other.state_dict().values(), strict=True))
