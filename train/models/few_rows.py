"""The matrix product of decoding on a CPU: few rows of activations times a weight, which is read from memory once.

Matrix libraries are made for many rows. Here each row of the weight is one stream that is multiplied with all rows of
the activations while it is in the first cache. Measured on two Zen cores against MKL, weights larger than the caches:
1.1 times as fast for 1 row, 2 to 3 times for 4 to 16.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

MAX_ROWS = 16  # what was measured


def is_decoding(x: Tensor, weight: Tensor) -> bool:
    """Whether `few_rows_product` may and should take the place of F.linear(x, weight)."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() <= MAX_ROWS * x.shape[-1]
        and not torch.is_grad_enabled()
        and type(x) is Tensor  # nothing fake, traced or distributed
        and type(weight) in (Tensor, Parameter)
        and weight.is_contiguous()
    )


def few_rows_product(x: Tensor, weight: Tensor) -> Tensor:
    """[..., in_features] times weight [out_features, in_features], transposed: float32 [..., out_features]."""
    rows = x.reshape(-1, x.shape[-1]).numpy()
    out = np.empty((len(rows), weight.shape[0]), np.float32)
    threads = torch.get_num_threads()
    if threads > 1:
        _product_by_threads(rows, weight.detach().numpy(), out, threads)
    else:
        _slice_of_product(rows, weight.detach().numpy(), out, 0, weight.shape[0])
    return torch.from_numpy(out).view(*x.shape[:-1], -1)


@numba.njit(nogil=True, fastmath=True, parallel=True, cache=True)
def _product_by_threads(x: np.ndarray, weight: np.ndarray, out: np.ndarray, threads: int) -> None:
    rows = weight.shape[0]
    for thread in numba.prange(threads):
        _slice_of_product(x, weight, out, rows * thread // threads, rows * (thread + 1) // threads)


@numba.njit(nogil=True, fastmath=True, cache=True)
def _slice_of_product(x: np.ndarray, weight: np.ndarray, out: np.ndarray, first: int, stop: int) -> None:
    zero = np.float32(0)
    rows, size = x.shape
    for n in range(first, stop):
        m = 0
        while m + 4 <= rows:
            a = b = c = d = zero
            for k in range(size):
                w = weight[n, k]
                a += w * x[m, k]
                b += w * x[m + 1, k]
                c += w * x[m + 2, k]
                d += w * x[m + 3, k]
            out[m, n], out[m + 1, n], out[m + 2, n], out[m + 3, n] = a, b, c, d
            m += 4
        while m < rows:
            a = zero
            for k in range(size):
                a += weight[n, k] * x[m, k]
            out[m, n] = a
            m += 1
