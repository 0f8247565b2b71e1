"""Rates of GPUs by the names that CUDA gives them."""

from __future__ import annotations

import pytest
import torch

from shards.errors import UserError
from train.hardware import GPUS, find_gpu, peak_flops

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),  # another card
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a seventh of one
        ("Radeon", None),
    ],
)
def test_cards_are_known_by_their_whole_name(monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(CUDA) == flops


def test_a_cpu_has_no_rate():
    assert peak_flops(torch.device("cpu")) is None


def test_an_unknown_card_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'h100'"):
        find_gpu("h10O")


def test_no_name_is_taken_twice():
    names = [name for gpu in GPUS.values() for name in gpu.devices]
    assert len(names) == len(set(names))
