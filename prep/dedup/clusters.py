"""From LSH keys to decisions: which documents go, and which document stays in the place of each.

Documents are known by their rank, 0 the best: those of the reference first, then by the keeper policy. In each band, a
run of equal keys gives edges from every member to the best-ranked one (a star, so a run of k documents costs k - 1
edges). Then, in rank order, a document goes if and only if its exact Jaccard similarity with a candidate that stays is
at least the threshold; a candidate that went hands on to its keeper, which is verified in the same way. The first
candidate in rank order that passes becomes the keeper. So every keeper stays, every removal has its similarity, and no
chain of weak links can empty a source. The result depends on ranks, keys and shingles alone.

An edge is one 64-bit number: member rank << 32 | best rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numba import njit

from shards.errors import UserError

MAX_DOCUMENTS = 2**32 - 1
NOBODY = np.uint32(2**32 - 1)  # the rank of a document that takes no part
_LOW, _HALF = np.uint64(2**32 - 1), np.uint64(32)


class Duplicates(NamedTuple):
    """Of n documents: `keeper`, int64 [n], itself for a document that stays; `similarity` to it, float64 [n]."""

    keeper: np.ndarray
    similarity: np.ndarray


def make_ranks(documents: int, *, best: np.ndarray | None = None, reference: int = 0) -> np.ndarray:
    """Ranks of documents under a keeper policy.

    Args:
        documents: how many there are.
        best: float [documents - reference]; the larger, the better, NaN last; ties, and None, go by input order.
        reference: the first so many documents are the reference: better than all others, in input order.

    Returns:
        uint32 [documents], a permutation.

    Raises:
        UserError: more documents than ranks of 32 bits.
    """
    if documents > MAX_DOCUMENTS:
        raise UserError(f"dedup: {documents:,} documents are too many for one run, {MAX_DOCUMENTS:,} fit")
    ranks = np.arange(documents, dtype=np.uint32)
    if best is not None:
        order = np.argsort(-best, kind="stable")
        ranks[reference + order] = np.arange(reference, documents, dtype=np.uint32)
    return ranks


def find_edges(keys: np.ndarray, ranks: np.ndarray, reference: int = 0) -> np.ndarray:
    """The edges of one band.

    Args:
        keys: uint64 [n]; 0: no candidate.
        ranks: uint32 [n], NOBODY for documents that take no part (exact copies of another one).
        reference: documents of a lower rank are never removed, so no edge leads away from them.

    Returns:
        edges, uint64 [m], sorted.
    """
    edges = np.empty(len(keys), np.uint64)
    n = _find_edges(keys, np.argsort(keys), ranks, reference, edges)
    return np.sort(edges[:n])


def merge_edges(bands: Iterable[np.ndarray]) -> np.ndarray:
    """All edges of some bands, once each, sorted; uint64 [m]."""
    merged = np.zeros(0, np.uint64)
    for edges in bands:
        if len(edges):
            merged = np.unique(np.concatenate([merged, edges]))
    return merged


def candidates(edges: np.ndarray) -> np.ndarray:
    """The ranks that stand in edges, sorted; int64 [c]. Only their shingles are needed."""
    return np.unique(np.concatenate([edges >> _HALF, edges & _LOW])).astype(np.int64)


def resolve(
    edges: np.ndarray, ranks: np.ndarray, begins: np.ndarray, ends: np.ndarray, hashes: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """Verify the candidates and decide.

    Args:
        edges: uint64 [m], sorted, each once.
        ranks: `candidates(edges)`, int64 [c].
        begins: int64 [c]; the shingles of candidate i are hashes[begins[i]:ends[i]].
        ends: int64 [c].
        hashes: uint64, sorted and without repetition inside each document; may be a memory map.
        threshold: the lowest Jaccard similarity of a duplicate.

    Returns:
        keeper of each candidate (position among the candidates, itself if it stays), int64 [c]; similarity to it,
        float64 [c]; how many pairs were verified.
    """
    members = np.searchsorted(ranks, (edges >> _HALF).astype(np.int64))
    bests = np.searchsorted(ranks, (edges & _LOW).astype(np.int64))
    keeper, similarity = np.arange(len(ranks)), np.ones(len(ranks))
    verified = _resolve(members, bests, begins, ends, hashes, threshold, keeper, similarity)
    return keeper, similarity, verified


def settle(
    copies: np.ndarray, candidate_documents: np.ndarray, keeper: np.ndarray, similarity: np.ndarray
) -> Duplicates:
    """Put exact copies and near-duplicates together.

    The keeper of an exact copy may itself have gone, as a near-duplicate of a third document: then the copy's keeper is
    that third one. It has the same shingles as its own first keeper, so the similarity is the same too.

    Args:
        copies: int64 [n], of `find_copies`.
        candidate_documents: the document of each candidate, int64 [c].
        keeper: of `resolve`, int64 [c].
        similarity: of `resolve`, float64 [c].
    """
    near, near_similarity = np.arange(len(copies)), np.ones(len(copies))
    near[candidate_documents] = candidate_documents[keeper]
    near_similarity[candidate_documents] = similarity
    return Duplicates(near[copies], near_similarity[copies])


def cluster_sizes(keeper: np.ndarray) -> dict[int, int]:
    """Number of clusters of each size from 2 on; a cluster is a document that stays and those that it stands for."""
    removed = keeper[keeper != np.arange(len(keeper))]
    _, sizes = np.unique(removed, return_counts=True)
    values, counts = np.unique(sizes + 1, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


@njit(nogil=True, cache=True)
def _find_edges(keys: np.ndarray, order: np.ndarray, ranks: np.ndarray, reference: int, edges: np.ndarray) -> int:
    n = 0
    begin = 0
    while begin < len(order):
        key = keys[order[begin]]
        end = begin
        best = np.uint64(NOBODY)
        while end < len(order) and keys[order[end]] == key:
            best = min(best, np.uint64(ranks[order[end]]))
            end += 1
        if key != 0 and end - begin > 1:
            for i in range(begin, end):
                rank = np.uint64(ranks[order[i]])
                if rank != best and rank != NOBODY and rank >= reference:
                    edges[n] = rank << _HALF | best
                    n += 1
        begin = end
    return n


@njit(nogil=True, cache=True)
def _jaccard(a: np.ndarray, b: np.ndarray, threshold: float) -> float:
    """Similarity of two sorted sets; -1 as soon as it cannot reach the threshold."""
    i, j, both = 0, 0, 0
    total = len(a) + len(b)
    while i < len(a) and j < len(b):
        most = both + min(len(a) - i, len(b) - j)
        if most / (total - most) < threshold:
            return -1.0
        for _ in range(16):
            x, y = a[i], b[j]
            both += x == y
            i += x <= y
            j += y <= x
            if i == len(a) or j == len(b):
                break
    similarity = both / (total - both)
    return similarity if similarity >= threshold else -1.0


@njit(nogil=True, cache=True)
def _resolve(
    members: np.ndarray,
    bests: np.ndarray,
    begins: np.ndarray,
    ends: np.ndarray,
    hashes: np.ndarray,
    threshold: float,
    keeper: np.ndarray,
    similarity: np.ndarray,
) -> int:
    verified = 0
    first = 0  # of the edges of one member
    for e in range(len(members)):
        member = members[e]
        if members[first] != member:
            first = e
        if keeper[member] != member:
            continue
        stays = keeper[bests[e]]
        tried = False
        for before in range(first, e):  # few: no more than there are bands
            tried |= keeper[bests[before]] == stays
        if tried:
            continue
        verified += 1
        found = _jaccard(hashes[begins[member] : ends[member]], hashes[begins[stays] : ends[stays]], threshold)
        if found >= 0:
            keeper[member], similarity[member] = stays, found
    return verified
