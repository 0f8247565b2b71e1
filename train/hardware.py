"""GPUs that the trainer knows: their bf16 rate, which MFU is measured against, and their memory.

Rates are dense bf16 with float32 accumulation, from NVIDIA's data sheets; where a sheet gives only the rate "with
sparsity", half of it. They are what the sheet promises at its highest clock: matrix products reach 70 to 75 % of 989
TFLOP/s on an H100 under its power limit. Memory is what CUDA reports as the total,
which is less than the name says.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shards.errors import UserError, unknown_name


@dataclass(frozen=True)
class Gpu:
    """A card.

    Attributes:
        devices: the names that CUDA gives it. They are compared whole: a "RTX 4090 Laptop GPU" is another card.
        tflops: bf16 dense, in TFLOP/s.
        memory: GiB that CUDA reports.
    """

    devices: tuple[str, ...]
    tflops: float
    memory: float

    @property
    def flops(self) -> float:
        """bf16 dense FLOP/s."""
        return self.tflops * 1e12

    @property
    def bytes(self) -> int:
        """Memory in bytes."""
        return int(self.memory * 2**30)


GPUS = {
    # NVIDIA H100 data sheet: 1,979 TFLOP/s (SXM), 1,671 (NVL), 1,513 (PCIe) with sparsity
    "h100": Gpu(("NVIDIA H100 80GB HBM3",), 989.0, 79.1),
    "h100-nvl": Gpu(("NVIDIA H100 NVL",), 835.0, 93.1),
    "h100-pcie": Gpu(("NVIDIA H100 PCIe",), 756.0, 79.1),
    # NVIDIA H200 data sheet: 1,979 TFLOP/s (SXM), 1,671 (NVL) with sparsity, 141 GB
    "h200": Gpu(("NVIDIA H200",), 989.0, 139.8),
    "h200-nvl": Gpu(("NVIDIA H200 NVL",), 835.0, 139.8),
    # NVIDIA GH200 data sheet: the GPU of the H100 SXM with 96 GB
    "gh200": Gpu(("NVIDIA GH200 480GB",), 989.0, 94.5),
    # NVIDIA HGX B200 data sheet: 36 PFLOP/s for eight cards with sparsity, 180 GB each
    "b200": Gpu(("NVIDIA B200",), 2250.0, 178.3),
    # NVIDIA A100 data sheet: 312 TFLOP/s
    "a100-80": Gpu(("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), 312.0, 79.2),
    "a100-40": Gpu(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 312.0, 39.4),
    # NVIDIA L40S and L4 data sheets: 362 TFLOP/s; 242 with sparsity
    "l40s": Gpu(("NVIDIA L40S",), 362.0, 44.4),
    "l4": Gpu(("NVIDIA L4",), 121.0, 22.0),
    # NVIDIA A10 data sheet: 125 TFLOP/s
    "a10": Gpu(("NVIDIA A10",), 125.0, 22.1),
    # NVIDIA Ada architecture whitepaper, appendix A: 165.2 TFLOP/s; GeForce cards accumulate float32 at half the rate
    "rtx4090": Gpu(("NVIDIA GeForce RTX 4090",), 165.2, 23.6),
    # NVIDIA Ampere GA102 whitepaper, table 2: 71 TFLOP/s
    "rtx3090": Gpu(("NVIDIA GeForce RTX 3090",), 71.0, 23.6),
    # NVIDIA Blackwell GeForce whitepaper, appendix A: 209.5 TFLOP/s
    "rtx5090": Gpu(("NVIDIA GeForce RTX 5090",), 209.5, 31.4),
}


def find_gpu(name: str) -> Gpu:
    """The card of a short name, as in `minigpt-plan --gpu h100`.

    Raises:
        UserError: the table has none of that name; the message names the nearest.
    """
    if name not in GPUS:
        raise UserError(unknown_name("GPU", name, GPUS))
    return GPUS[name]


def gpu_of(device: torch.device) -> Gpu | None:
    """The card that a device is; None for CPUs and cards that the table does not have."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((gpu for gpu in GPUS.values() if name in gpu.devices), None)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has bf16 products; a CPU without them emulates bf16, more than ten times as slow as float32."""
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def peak_flops(device: torch.device) -> float | None:
    """bf16 dense FLOP/s of a device; None for CPUs and cards that the table does not have."""
    gpu = gpu_of(device)
    return None if gpu is None else gpu.flops
