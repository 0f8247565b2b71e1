"""How fast a run is, counted by hand on a clock that the test turns."""

from __future__ import annotations

import mmap
import resource
from types import SimpleNamespace

import pytest
import torch

import train.speed
from train.speed import MEASURED, Speed, memory_gb

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when the test says so."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(train.speed.time, "perf_counter", lambda: now.seconds)

    def wait(seconds: float) -> None:
        now.seconds += seconds

    return wait


def new_speed(peak: float | None = 1e9, devices: int = 2) -> Speed:
    return Speed(10, 110, 500, flops_per_token=1000, flops_per_token_full=1200, peak=peak, devices=devices, device=CPU)


def test_speed_by_hand(clock):
    speed = new_speed()
    assert speed.status(11, None) == "step     11/110"
    with speed.waiting("data"):
        clock(2)
    clock(6)
    with speed.waiting("evaluate"):
        clock(4)
        with speed.waiting("log"):  # belongs to the validation
            clock(1)
    for seconds in (3, 4):
        with speed.waiting("save"):
            clock(seconds)
    row = speed.measure(14)  # 20 s, of which 5 + 7 are no training; 4 steps
    assert row.pop("memory_gb").keys() == {"resident", "peak"}
    assert row == {
        "tokens_per_second": 4 * 500 / 8,
        "tflops_per_device": pytest.approx(4 * 500 / 8 * 1000 / 2 / 1e12),
        "mfu": pytest.approx(4 * 500 / 8 * 1000 / 2 / 1e9),
        "mfu_full": pytest.approx(4 * 500 / 8 * 1200 / 2 / 1e9),
        "data_wait": 2 / 20,
        "blocked": {"evaluate": 5 / 20, "log": 0.0, "save": 7 / 20},
    }
    assert speed.status(14, 2.34567) == "step     14/110  loss 2.3457  250 tok/s  ETA 3m12s"  # 96 steps of 2 s
    assert speed.status(62, None) == "step     62/110  250 tok/s  ETA 1m36s"
    clock(5)
    row = speed.measure(15)
    assert (row["tokens_per_second"], row["data_wait"]) == (100, 0)
    assert row["blocked"] == {"evaluate": 0, "log": 0, "save": 0}
    assert speed.account() == "25s since the start, of it waiting for data 8.0%, evaluate 20.0%, log 0.0%, save 28.0%"


def test_a_rollback_is_no_negative_speed(clock):
    speed = new_speed()
    clock(10)
    speed.measure(20)
    with speed.waiting("save"):
        clock(10)
    speed.go_back(12)
    clock(10)
    row = speed.measure(14)
    assert row["tokens_per_second"] == 100
    assert row["blocked"]["save"] == 0
    assert "save 33.3%" in speed.account()


def test_a_wait_that_fails_is_counted_and_over(clock):
    speed = new_speed()

    def no_more_batches() -> None:
        clock(1)
        raise StopIteration

    with pytest.raises(StopIteration), speed.waiting("data"):
        no_more_batches()
    with speed.waiting("save"):
        clock(3)
    row = speed.measure(11)
    assert (row["data_wait"], row["blocked"]["save"]) == (0.25, 0.75)


def test_no_mfu_without_a_peak(clock):
    clock(1)
    assert not {"mfu", "mfu_full"} & new_speed(peak=None).measure(11).keys()
    assert set(new_speed().measure(11)) == set(MEASURED)


def test_memory_of_the_process():
    before = memory_gb(CPU)
    block = mmap.mmap(-1, 200_000_000)  # the allocator might have as much left over
    block.write(bytes(200_000_000))
    during = memory_gb(CPU)
    assert during["resident"] - before["resident"] == pytest.approx(0.2, abs=0.02)
    assert during["peak"] >= during["resident"] * 0.999
    assert during["peak"] == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, rel=0.02)
    block.close()
