"""Rates of GPUs by the names that CUDA gives them."""

from __future__ import annotations

import pytest
import torch
from training_runs import train_here, write_experiment, write_sources

from shards.errors import UserError
from train.hardware import GPUS, find_gpu, multiplies_bf16, peak_flops

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


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


@pytest.mark.parametrize("there", [True, False])
def test_a_processor_that_emulates_bf16_is_said(monkeypatch, tmp_path, there):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: there, raising=False)
    assert (multiplies_bf16(CPU), multiplies_bf16(CUDA)) == (there, True)
    mixture = write_sources(tmp_path / "data")
    config = write_experiment(tmp_path, mixture, training={"max_steps": 1, "warmup_steps": 0})
    for precision, said in (("bf16", not there), ("fp32", False)):
        status, output = train_here(
            config, f"training.mixed_precision={precision}", f"checkpointing.output_dir={tmp_path / precision}"
        )
        assert status == 0, output
        assert ("training.mixed_precision=fp32 is faster" in output) == said
