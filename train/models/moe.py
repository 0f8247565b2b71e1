"""Mixture of experts: a router picks `top_k` of the expert MLPs for each token (Shazeer et al. 2017, arXiv 1701.06538).

Each (token, chosen expert) pair is a slot. The slots are sorted by expert, so that every expert sees one block of rows
and each of the two products of all experts is one grouped product. Every slot is computed: there is no capacity and no
token is dropped. Shapes depend on the batch alone, so that nothing waits for the host on GPUs with a grouped kernel
(bf16 from compute capability 9.0 on; PyTorch loops over the experts on others).

The output of a token x is the sum over its experts e of weight_e * down_e(silu(gate_e x) * up_e x), and the shared
experts' output where there are any. The weight is multiplied in before the last product, which is linear: its gradient
then needs no output of an expert to be kept.

What balances the load is returned, never stored, so that a forward pass may run twice (activation checkpointing).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.models.linear import SwiGLU


class Routing(NamedTuple):
    """What a pass says about the load of the experts.

    `load`: float32 [experts], slots that went to each expert; without gradient; sums to tokens x top_k.
    `balance`: float32 [batch], balance loss of each sequence, differentiable, without coefficient; 1 where the
    experts are used equally, `experts / top_k` where all tokens choose the same with certainty.
    """

    load: Tensor
    balance: Tensor


class Router(nn.Module):
    """Scores of the experts and the choice of `top_k`, in float32 whatever the activations are.

    A softmax router without bias is that of Qwen3-MoE and DeepSeek-V2 (arXiv 2405.04434), a sigmoid router with
    `correction_bias` that of DeepSeek-V3 (arXiv 2412.19437): the bias takes part in the choice only, the weights come
    from the scores without it.

    With `groups` > 1 only the experts of the `top_groups` best groups can be chosen. The score of a group is that of
    its best expert, or with `correction_bias` the sum of its two best.

    `normalize` divides the weights of a token by their sum; they are multiplied by `scale` in any case. Published codes
    differ in a case that no released model has: DeepSeek-V2's own does not multiply where it normalises (give `scale=1`
    for that), and like minimind-2's it does not normalise a single expert; `transformers`' V2 never normalises.
    """

    e_score_correction_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: Literal["softmax", "sigmoid"] = "softmax",
        normalize: bool,
        scale: float = 1.0,
        groups: int = 1,
        top_groups: int = 1,
        correction_bias: bool = False,
    ) -> None:
        super().__init__()
        assert num_experts % groups == 0, (num_experts, groups)
        assert top_groups <= groups, (top_groups, groups)
        assert top_k <= top_groups * (num_experts // groups), (top_k, top_groups, num_experts, groups)
        self.num_experts = num_experts
        self.top_k = top_k
        self.scoring = scoring
        self.normalize = normalize
        self.scale = scale
        self.groups = groups
        self.top_groups = top_groups
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        bias = torch.empty(num_experts, dtype=torch.float32) if correction_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the experts of each token.

        Args:
            x: [tokens, hidden].

        Returns:
            weights, float32 [tokens, top_k]; experts, int64 [tokens, top_k]; probabilities, float32 [tokens, experts]:
            the scores, which sum to 1 for each token (those of a sigmoid are divided by their sum).
        """
        logits = F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if self.scoring == "sigmoid" else logits.softmax(-1)
        with torch.no_grad():
            experts = self._choose(scores)
        weights = scores.gather(1, experts)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.scale != 1.0:
            weights = weights * self.scale
        probabilities = scores / (scores.sum(-1, keepdim=True) + 1e-20) if self.scoring == "sigmoid" else scores
        return weights, experts, probabilities

    def _choose(self, scores: Tensor) -> Tensor:
        """Int64 [tokens, top_k]: the best experts of the best groups."""
        if self.e_score_correction_bias is not None:
            scores = scores + self.e_score_correction_bias
        if self.top_groups < self.groups:
            grouped = scores.unflatten(1, (self.groups, -1))
            if self.e_score_correction_bias is None:
                group_scores = grouped.amax(-1)
            else:
                group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            best = group_scores.topk(self.top_groups, dim=-1).indices
            outside = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, best, False)
            scores = grouped.masked_fill(outside[..., None], float("-inf")).flatten(1)
        return scores.topk(self.top_k, dim=-1).indices

    @torch.no_grad()
    def update_correction_bias(self, load: Tensor, rate: float) -> None:
        """Make the experts with less than the mean load likelier and the others less likely, by `rate` each.

        Balances without a loss (Wang et al. 2024, arXiv 2408.15664). Call it once per optimiser step with the load
        [experts] of the global batch; all zeros change nothing.
        """
        assert self.e_score_correction_bias is not None
        self.e_score_correction_bias += rate * (load.mean() - load).sign()


class Experts(nn.Module):
    """All routed experts, each a SwiGLU: `gate_up_proj` [experts, 2 * ffn, hidden] (gate rows, then up rows) and
    `down_proj` [experts, hidden, ffn], used in the dtype of the activations as in `Linear`."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))

    def forward(self, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        """Output of each slot times its weight.

        Args:
            rows: [slots, hidden], sorted by expert.
            weights: float32 [slots].
            offsets: int32 [experts], where the rows of each expert end.

        Returns:
            [slots, hidden] in the dtype of `rows`.
        """
        gate, up = grouped_linear(rows, self.gate_up_proj.to(rows.dtype), offsets).chunk(2, dim=-1)
        inner = (F.silu(gate) * up * weights[:, None]).to(rows.dtype)
        return grouped_linear(inner, self.down_proj.to(rows.dtype), offsets)


class MixtureOfExperts(nn.Module):
    """Router, routed experts and, with `shared_size` > 0, one SwiGLU of that size that every token passes through."""

    def __init__(self, hidden_size: int, intermediate_size: int, router: Router, *, shared_size: int = 0) -> None:
        super().__init__()
        self.gate = router
        self.experts = Experts(router.num_experts, hidden_size, intermediate_size)
        self.shared_experts = SwiGLU(hidden_size, shared_size) if shared_size else None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Routing]:
        """[batch, length, hidden] -> the same shape and dtype, and the load of the experts.

        `valid` [batch, length] is false where there is padding, which goes through the experts but is not counted.
        """
        tokens = x.flatten(0, 1)
        weights, experts, probabilities = self.gate(tokens)
        chosen = torch.zeros_like(probabilities, requires_grad=False).scatter(1, experts, 1.0)
        offsets = chosen.sum(0).to(torch.int32).cumsum(0, dtype=torch.int32)
        routing = measure_load(chosen.unflatten(0, x.shape[:2]), probabilities.unflatten(0, x.shape[:2]), valid)
        # slot s of the sorted order is slot order[s] of the tokens' order; position is the inverse
        order = experts.flatten().argsort(stable=True)
        position = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        token, position = order // self.gate.top_k, position.view_as(experts)
        rows = Dispatch.apply(tokens, token, position)
        out = Combine.apply(self.experts(rows, weights.flatten()[order], offsets), token, position).view_as(x)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out, routing


def measure_load(chosen: Tensor, probabilities: Tensor, valid: Tensor | None) -> Routing:
    """Load of the experts, and for each sequence sum_e f_e P_e (DeepSeek-V3, arXiv 2412.19437, equations 17 to 20).

    f_e = slots of e in the sequence * experts / (top_k * length), P_e = mean probability of e over the sequence. The
    choice counted is the real one, made with the correction bias where there is one. A sequence's value does not depend
    on the others, so that it is the same however a batch is shared among ranks.

    Args:
        chosen: float32 [batch, length, experts], 1 for the experts of a token and 0 for the others.
        probabilities: float32 [batch, length, experts].
        valid: [batch, length], false where a token does not count; None: all do.
    """
    if valid is not None:
        chosen, probabilities = chosen * valid[..., None], probabilities * valid[..., None]
    counts = chosen.sum(1)
    shares = counts / counts.sum(1, keepdim=True).clamp_min(1.0)  # of the slots of the sequence
    used = probabilities.sum(1) / probabilities.sum((1, 2)).clamp_min(1e-20)[:, None]  # mean, as each token's sum to 1
    return Routing(counts.sum(0), (shares * used).sum(-1) * probabilities.shape[-1])


class Dispatch(torch.autograd.Function):
    """rows[s] = x[token[s]]: the tokens' rows in sorted order, each as often as it was chosen.

    Its gradient is a gather and a sum over the slots of a token, as that of `Combine` is a gather: the gradient that
    PyTorch would derive adds row by row, in no fixed order on GPUs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, position: Tensor) -> Tensor:
        """x [tokens, hidden], token [slots], position [tokens, top_k] -> [slots, hidden]."""
        ctx.save_for_backward(position)
        return x[token]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """[slots, hidden] -> [tokens, hidden]."""
        (position,) = ctx.saved_tensors
        return sum_slots(grad, position), None, None


class Combine(torch.autograd.Function):
    """out[t] = sum over the slots s of token t of rows[s]; see `Dispatch`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, position: Tensor) -> Tensor:
        """rows [slots, hidden], token [slots], position [tokens, top_k] -> [tokens, hidden]."""
        ctx.save_for_backward(token)
        return sum_slots(rows, position)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """[tokens, hidden] -> [slots, hidden]."""
        (token,) = ctx.saved_tensors
        return grad[token], None, None


def sum_slots(rows: Tensor, position: Tensor) -> Tensor:
    """[slots, hidden] -> [tokens, hidden]: the rows at `position` [tokens, top_k], summed over top_k."""
    return rows[position[:, 0]] if position.shape[1] == 1 else rows[position].sum(1)


# Operators of our own, because torch 2.13 refuses to trace its grouped product in other types than bf16, and on CPUs
# in other widths than multiples of 16 bytes.


@torch.library.custom_op("minigpt::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows of `x` times the transposed weight of their group.

    Args:
        x: [rows, in], the rows of a group next to each other.
        weight: [groups, out, in] in the dtype of `x`.
        offsets: int32 [groups], where the rows of each group end; the last is `rows`. Groups may be empty.

    Returns:
        [rows, out].

    Raises:
        RuntimeError: on GPUs, from PyTorch: `in` and `out` have to be multiples of 16 bytes there, of 8 in bf16.
    """
    if x.device.type != "cpu":
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    out = x.new_empty(x.shape[0], weight.shape[1])
    for group, (start, stop) in enumerate(borders(offsets)):
        if start < stop:
            torch.mm(x[start:stop], weight[group].T, out=out[start:stop])
    return out


@torch.library.custom_op("minigpt::grouped_outer", mutates_args=())
def grouped_outer(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """Gradient of `grouped_linear` for its weight: per group grad^T x, with grad [rows, out] and x [rows, in].

    Returns:
        [groups, out, in], zero for empty groups.
    """
    if x.device.type != "cpu":
        out = F.grouped_mm(grad.T, x, offs=offsets)
        if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device)[0] > 9:
            # the kernel for Blackwell leaves the gradients of empty groups unwritten (pytorch #172439)
            out.masked_fill_((offsets.diff(prepend=offsets.new_zeros(1)) == 0)[:, None, None], 0.0)
        return out
    out = x.new_empty(len(offsets), grad.shape[1], x.shape[1])
    for group, (start, stop) in enumerate(borders(offsets)):
        torch.mm(grad[start:stop].T, x[start:stop], out=out[group])
    return out


def borders(offsets: Tensor) -> list[tuple[int, int]]:
    """First row and end of each group."""
    stops = offsets.tolist()
    return list(zip([0, *stops], stops, strict=False))


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_outer.register_fake
def _(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], grad.shape[1], x.shape[1])


def keep_inputs(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    """What the gradients of `grouped_linear` need."""
    ctx.save_for_backward(*inputs)


def grouped_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """Gradients of `grouped_linear` for `x` and `weight`."""
    x, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    for_x = grouped_linear(grad, weight.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    for_weight = grouped_outer(grad, x, offsets) if ctx.needs_input_grad[1] else None
    return for_x, for_weight, None


grouped_linear.register_autograd(grouped_linear_backward, setup_context=keep_inputs)
