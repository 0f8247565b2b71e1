"""Learning-rate schedules: bounds, ends and steps for every setting."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from train.config import TrainingConfig
from train.schedule import learning_rate

SCHEDULES = ["cosine", "wsd", "linear", "constant"]


def config(**fields) -> TrainingConfig:
    return TrainingConfig.model_validate({"batch_size": 1, "learning_rate": 1e-3, **fields})


@st.composite
def cases(draw):
    """A training section and the steps of its run."""
    schedule = draw(st.sampled_from(SCHEDULES))
    fields = {
        "lr_scheduler": schedule,
        "learning_rate": draw(st.floats(1e-6, 1)),
        "warmup_steps": draw(st.integers(0, 60)),
        "min_lr_ratio": draw(st.floats(0, 1)),
    }
    if schedule == "wsd":
        fields["decay_steps"] = draw(st.none() | st.integers(1, 120))
    return config(**fields), draw(st.integers(1, 100))


@given(cases())
def test_bounds_and_warm_up(case):
    training, total = case
    rates = [learning_rate(step, training, total) for step in range(1, total + 1)]
    peak, warmup = training.learning_rate, training.warmup_steps
    for step, rate in enumerate(rates, start=1):
        assert 0 <= rate <= peak * (1 + 1e-12)
        if step <= warmup:
            assert rate == pytest.approx(peak * step / warmup)
        else:
            assert rate >= peak * (training.min_lr_ratio - 1e-12)
    after = rates[max(warmup - 1, 0) :]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in itertools.pairwise(after))  # then it only falls


@given(cases())
def test_last_step_has_the_lowest_rate(case):
    training, total = case
    assume(training.lr_scheduler != "constant" and total > training.warmup_steps)
    low = training.learning_rate * training.min_lr_ratio
    assert learning_rate(total, training, total) == pytest.approx(low, abs=1e-15)


@given(cases())
def test_no_jumps(case):
    """No step falls further than the steepest part of its curve: pi / 2 times the straight line."""
    training, total = case
    warmup = training.warmup_steps
    assume(total > warmup)
    decay = total - warmup
    if training.lr_scheduler == "wsd":
        decay = min(decay, training.wsd_decay_steps(total))
    largest = training.learning_rate * (1 - training.min_lr_ratio) * math.pi / 2 / decay
    rates = [learning_rate(step, training, total) for step in range(max(1, warmup), total + 1)]
    assert all(a - b <= largest * (1 + 1e-9) + 1e-15 for a, b in itertools.pairwise(rates))


def test_curves():
    """Some points by hand: peak 1e-3, 10 steps of warm-up, 110 steps, down to a tenth."""
    common = {"warmup_steps": 10, "min_lr_ratio": 0.1}
    expected = {
        "constant": {5: 5e-4, 10: 1e-3, 60: 1e-3, 110: 1e-3},
        "linear": {5: 5e-4, 10: 1e-3, 60: 5.5e-4, 110: 1e-4},
        "cosine": {5: 5e-4, 10: 1e-3, 35: 1e-4 + 9e-4 * (1 + math.sqrt(0.5)) / 2, 60: 5.5e-4, 110: 1e-4},
        "wsd": {5: 5e-4, 10: 1e-3, 99: 1e-3, 110: 1e-4},  # the last 11 steps fall
    }
    for schedule, points in expected.items():
        training = config(lr_scheduler=schedule, **common)
        for step, rate in points.items():
            assert learning_rate(step, training, 110) == pytest.approx(rate), (schedule, step)
    slow = config(lr_scheduler="wsd", decay_steps=50, **common)
    assert [learning_rate(step, slow, 110) for step in (60, 85, 110)] == pytest.approx([1e-3, 5.5e-4, 1e-4])


def test_decay_steps_belong_to_wsd():
    with pytest.raises(ValidationError, match="decay_steps belongs to lr_scheduler wsd, not cosine"):
        config(decay_steps=5)
