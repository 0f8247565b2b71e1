"""Signatures, digests, units and decisions against plain Python references and datasketch."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.characters import SPACE, WORD, classes, lower
from prep.dedup import clusters, exact, minhash, paragraphs
from prep.dedup.explain import collision, explain, need
from prep.dedup.settings import DedupSettings
from prep.words import MIX_1, MIX_2, hash_word, split_words

# Random Unicode, with much of what decides: white space of all kinds, letters whose lower case has another length.
LETTERS = st.one_of(st.sampled_from("abcAB_1 .\t\n\r   ß İKȺé中\0"), st.characters(codec="utf-8"))
TEXTS = st.lists(st.text(LETTERS, max_size=60), max_size=8)


def small(text: str) -> str:
    table = lower()
    return "".join(chr(table[ord(letter)]) for letter in text)


def split(text: str) -> list[str]:
    """Words of a text in plain Python, by the table of characters."""
    table = classes()
    marked = "".join(letter if table[ord(letter)] & WORD else "\0" for letter in text)
    return [word for word in marked.split("\0") if word]


def normalised(text: str) -> str:
    table = classes()
    spaced = "".join(" " if table[ord(letter)] & SPACE else letter for letter in small(text))
    return re.sub(" +", " ", spaced).strip(" ")


def fmix64(value: int) -> int:
    for factor in (MIX_1, MIX_2):
        value = ((value ^ (value >> 33)) * factor) % 2**64
    return value ^ (value >> 33)


def shingles(text: str) -> set[int]:
    words = [hash_word(small(word)) for word in split(text)]
    size = min(len(words), minhash.SHINGLE_WORDS)
    found = set()
    for begin in range(len(words) - size + 1 if words else 0):
        value = size
        for word in words[begin : begin + size]:
            value = (value * minhash.POLYNOMIAL + word) % 2**64
        found.add(fmix64(value))
    return found


def signature(hashes: set[int], parameters: np.ndarray) -> list[int]:
    row = [minhash.EMPTY] * parameters.shape[1]
    for value in hashes:
        h = value >> 32
        h = ((h ^ h >> 16) * 0x85EBCA6B) % 2**32
        h = ((h ^ h >> 13) * 0xC2B2AE35) % 2**32
        h ^= h >> 16
        row = [min(old, (int(a) * h + int(b)) % 2**32) for old, a, b in zip(row, *parameters, strict=True)]
    return row


def sets_of(texts: pa.Array) -> list[set[int]]:
    hashes, ends = minhash.make_shingles(texts)
    for begin, end in pairwise(ends):
        assert (np.diff(hashes[begin:end].astype(object)) > 0).all()  # sorted, without repetition
    return [set(hashes[begin:end].tolist()) for begin, end in pairwise(ends)]


@given(TEXTS, st.booleans())
@settings(max_examples=150, deadline=None)
def test_shingles_and_signatures_are_those_of_the_reference(texts: list[str], large: bool) -> None:
    column = pa.array(texts, pa.large_string() if large else pa.string())
    expected = [shingles(text) for text in texts]
    assert sets_of(column) == expected
    parameters = minhash.permutations(6, seed=7)
    found = minhash.make_signatures(column, parameters)
    assert found.tolist() == [signature(hashes, parameters) for hashes in expected]


def make_documents(number: int, seed: int = 0) -> list[str]:
    """Documents of 0 to 900 words; some lengths around the borders of blocks."""
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefghijKLMNOPé", k=generator.randint(1, 9))) for _ in range(3_000)]
    lengths = [0, 1, 2, 4, 5, 6, 27, 28, 29, 259, 260, 261, 262, 516, 517]
    lengths += [generator.randint(0, 900) for _ in range(number - len(lengths))]
    return [generator.choice([" ", ", ", "\n"]).join(generator.choices(words, k=length)) for length in lengths]


def test_signatures_equal_those_of_datasketch_bit_for_bit_and_load_into_it() -> None:
    datasketch = pytest.importorskip("datasketch")
    documents = make_documents(1_000)
    documents[501] = documents[500] + " and some more words"
    texts = pa.array(documents)
    parameters = minhash.permutations()
    found = minhash.make_signatures(texts, parameters)
    hashes, ends = minhash.make_shingles(texts)
    for document, (begin, end) in enumerate(pairwise(ends)):
        peer = datasketch.MinHash(128, seed=minhash.SEED, scheme="affine32", hashfunc=lambda value: value)
        peer.update_batch((hashes[begin:end] >> np.uint64(32)).tolist())
        assert np.array_equal(peer.hashvalues, found[document]), document
        assert peer.hashvalues.dtype == found.dtype
    loaded = [datasketch.MinHash(seed=minhash.SEED, hashvalues=row, scheme="affine32") for row in found]
    exact_similarity = jaccard(set(hashes[ends[500] : ends[501]]), set(hashes[ends[501] : ends[502]]))
    assert loaded[500].jaccard(loaded[501]) == pytest.approx(exact_similarity, abs=0.1)
    index = datasketch.MinHashLSH(num_perm=128, params=(18, 7))
    for document in range(15, 1_000):
        index.insert(document, loaded[document])
    assert set(index.query(loaded[500])) >= {500, 501}
    keys = minhash.make_band_keys(found)
    ours = {other for other in range(15, 1_000) if (keys[:, other] == keys[:, 500]).any()}
    assert set(index.query(loaded[500])) == ours


def test_signatures_do_not_depend_on_how_documents_are_batched() -> None:
    documents = make_documents(60, seed=3)
    parameters = minhash.permutations()
    whole = minhash.make_signatures(pa.array(documents), parameters)
    slices = [minhash.make_signatures(pa.array(documents).slice(at, 7), parameters) for at in range(0, 60, 7)]
    assert np.array_equal(whole, np.concatenate(slices))


def test_shingles_that_come_very_often_are_sorted_too() -> None:
    generator = random.Random(4)
    documents = ["x " * 3_000, "x y " * 3_000 + "z", " ".join(generator.choices("abc", k=9_000))]
    documents += [" ".join(str(generator.random()) for _ in range(size)) for size in (7, 300, 40_000)]
    assert sets_of(pa.array(documents)) == [shingles(text) for text in documents]


def test_words_of_the_shingles_are_those_of_split_words() -> None:
    documents = ["It's 5 a.m. in İstanbul_x", "one", "a b c d e", "中文 ABC"]
    words = split_words(pa.array(documents))
    for document, (begin, end) in enumerate(pairwise(words.offsets)):
        of_document = [words.lower[token] for token in range(begin, end) if words.kind[token] & WORD]
        assert [int(word) for word in of_document] == [hash_word(small(word)) for word in split(documents[document])]


def test_band_keys_are_equal_where_all_rows_of_a_band_are_and_zero_only_for_the_empty() -> None:
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 3, (300, 12), dtype=np.uint32)
    rows[7] = minhash.EMPTY
    keys = minhash.make_band_keys(rows, bands=4, rows=3)
    assert keys.shape == (4, 300)
    assert np.array_equal((keys == 0).any(axis=0), np.arange(300) == 7)
    for band in range(4):
        values = [tuple(row) for row in rows[:, 3 * band : 3 * band + 3].tolist()]
        assert len(set(zip(values, keys[band].tolist(), strict=True))) == len(set(values)) == len(set(keys[band]))
    assert not set(keys[0][keys[0] > 0]) & set(keys[1])  # the same values in another band are another key
    with pytest.raises(ValueError, match="need 15 hashes, there are 12"):
        minhash.make_band_keys(rows, bands=5, rows=3)


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_digests_are_those_of_the_normalised_text(texts: list[str]) -> None:
    digests = exact.make_digests(pa.array(texts, pa.string()))
    data, ends = exact.normalise(pa.array(texts, pa.string()))
    for document, text in enumerate(texts):
        assert bytes(data[ends[document] : ends[document + 1]]).decode() == normalised(text)
        expected = xxhash.xxh3_128_intdigest(normalised(text).encode())
        assert (int(digests[0, document]) << 64) + int(digests[1, document]) == expected


def test_normalising_leaves_shingles_alone() -> None:
    """So an exact copy can be handed on to the keeper of its keeper with the same similarity."""
    table, small_letters = classes(), lower()
    assert np.array_equal(table & (WORD | SPACE), table[small_letters] & (WORD | SPACE))
    assert np.array_equal(small_letters[small_letters], small_letters)


def test_copies_go_to_the_best_ranked() -> None:
    digests = np.array([[5, 5, 1, 5, 5, 1, 9], [1, 2, 1, 1, 2, 1, 1]], np.uint64)
    ranks = np.array([6, 1, 2, 3, 4, 0, 5], np.uint32)
    assert exact.find_copies(digests, ranks).tolist() == [3, 1, 5, 3, 1, 5, 6]


def jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b)


def oracle(
    sets: list[set[int]], texts: list[str], keys: list[list[int]], order: list[int], reference: int, threshold: float
) -> dict[int, tuple[int, float]]:
    """Removed document -> (keeper, similarity), straight from the definition; `order`: documents, best first."""
    first: dict[str, int] = {}
    copies = {document: first.setdefault(texts[document], document) for document in order}
    order = [document for document in order if copies[document] == document]
    near: dict[int, tuple[int, float]] = {}
    runs: dict[tuple[int, int], list[int]] = defaultdict(list)
    for document in order:
        for band, key in enumerate(keys[document]):
            if key:
                runs[band, key].append(document)
    for document in order:
        if document < reference:
            continue
        found = {runs[band, key][0] for band, key in enumerate(keys[document]) if key} - {document}
        for candidate in sorted(found, key=order.index):
            stays = near[candidate][0] if candidate in near else candidate
            similarity = jaccard(sets[document], sets[stays])
            if similarity >= threshold:
                near[document] = stays, similarity
                break
    removed = dict(near)
    for document, copy in copies.items():
        if copy != document and document >= reference:
            removed[document] = near.get(copy, (copy, 1.0))
    return removed


def decide(
    sets: list[set[int]], texts: list[str], keys: np.ndarray, ranks: np.ndarray, reference: int, threshold: float
) -> clusters.Duplicates:
    """The steps of a run, in memory."""
    digests = np.array([(0, xxhash.xxh3_64_intdigest(text.encode())) for text in texts], np.uint64).reshape(-1, 2).T
    copies = exact.find_copies(digests, ranks)
    copies[:reference] = np.arange(reference)
    taking_part = np.where(copies == np.arange(len(texts)), ranks, clusters.NOBODY).astype(np.uint32)
    edges = clusters.merge_edges(clusters.find_edges(band, taking_part, reference) for band in keys)
    chosen = clusters.candidates(edges)
    documents = np.argsort(ranks)[chosen]
    ends = np.cumsum([0] + [len(sets[document]) for document in documents])
    hashes = np.array([value for document in documents for value in sorted(sets[document])], np.uint64)
    keeper, similarity, _ = clusters.resolve(edges, chosen, ends[:-1], ends[1:], hashes, threshold)
    return clusters.settle(copies, documents, keeper, similarity)


@st.composite
def corpora(draw: st.DrawFn) -> tuple[list[set[int]], list[str], list[list[int]], int, list[float] | None, float]:
    number = draw(st.integers(0, 14))
    bands = draw(st.integers(1, 4))
    sets = [set(draw(st.lists(st.integers(0, 12), min_size=1, max_size=12))) for _ in range(number)]
    keys = [[draw(st.integers(0, 4)) for _ in range(bands)] for _ in range(number)]
    texts = [str(sorted(values)) for values in sets]
    for document in range(number):  # exact copies have the same keys, as they have the same shingles
        keys[document] = keys[texts.index(texts[document])]
    reference = draw(st.integers(0, number))
    ranked = number - reference
    best = draw(st.none() | st.lists(st.sampled_from([1.0, 2.0, float("nan")]), min_size=ranked, max_size=ranked))
    return sets, texts, keys, reference, best, draw(st.sampled_from([0.3, 0.5, 0.8, 1.0]))


@given(corpora())
@settings(max_examples=400, deadline=None)
def test_decisions_are_those_of_the_oracle(
    corpus: tuple[list[set[int]], list[str], list[list[int]], int, list[float] | None, float],
) -> None:
    sets, texts, keys, reference, best, threshold = corpus
    number = len(sets)
    values = [0.0] * reference + (best or [0.0] * (number - reference))
    order = sorted(
        range(number), key=lambda d: (d >= reference, -np.nan_to_num(values[d], nan=-9) * (d >= reference), d)
    )
    ranks = clusters.make_ranks(number, best=np.array(best) if best else None, reference=reference)
    assert ranks[order].tolist() == list(range(number))
    bands = np.array(keys, np.uint64).reshape(number, len(keys[0]) if keys else 1).T
    found = decide(sets, texts, bands, ranks, reference, threshold)
    expected = oracle(sets, texts, keys, order, reference, threshold)
    removed = {d: (int(found.keeper[d]), float(found.similarity[d])) for d in range(number) if found.keeper[d] != d}
    assert removed == expected
    for document, (keeper, similarity) in removed.items():
        assert document >= reference
        assert found.keeper[keeper] == keeper  # it stands in the output
        assert similarity == jaccard(sets[document], sets[keeper]) >= min(threshold, 1.0)
    sizes = clusters.cluster_sizes(found.keeper)
    assert sum((size - 1) * count for size, count in sizes.items()) == len(removed)


@pytest.mark.parametrize("number", [pytest.param(1_500, id="small"), pytest.param(10_000, marks=pytest.mark.slow)])
def test_planted_edits_are_found_and_nothing_below_the_threshold_goes(number: int) -> None:
    """`number` originals and as many edits of known similarity between 0.5 and 1."""
    generator = random.Random(1)
    vocabulary = [f"w{number:x}" for number in range(50_000)]
    originals = [generator.choices(vocabulary, k=generator.randint(60, 300)) for _ in range(number)]
    edits = []
    for words in originals:
        changed = list(words)
        for _ in range(generator.randint(0, max(1, len(words) // 17))):  # each takes up to five shingles away
            changed[generator.randrange(len(words))] = generator.choice(vocabulary)
        edits.append(changed)
    documents = [" ".join(words) for words in originals + edits]
    texts = pa.array(documents)
    sets = sets_of(texts)
    keys = minhash.make_band_keys(minhash.make_signatures(texts, minhash.permutations()))
    found = decide(sets, documents, keys, clusters.make_ranks(2 * number), 0, 0.8)
    assert np.array_equal(found.keeper[:number], np.arange(number))
    outcome: dict[str, list[bool]] = defaultdict(list)
    for document in range(number):
        similarity = jaccard(sets[document], sets[number + document])
        group = "high" if similarity >= 0.9 else "low" if similarity >= 0.8 else "below"
        outcome[group].append(bool(found.keeper[number + document] == document))
        if outcome[group][-1]:
            assert found.similarity[number + document] == similarity
    assert min(len(group) for group in outcome.values()) > number // 20
    assert np.mean(outcome["high"]) >= 0.99
    assert np.mean(outcome["low"]) >= 0.97
    assert not any(outcome["below"])


def units_of(text: str, level: str) -> list[str]:
    """Normalised units in plain Python."""
    table = classes()
    lines = text.split("\n")
    blank = [all(table[ord(letter)] & SPACE for letter in line) for line in lines]
    if level == "line":
        return [normalised(line) for line, empty in zip(lines, blank, strict=True) if not empty]
    found: list[list[str]] = [[]]
    for line, empty in zip(lines, blank, strict=True):
        if empty:
            found.append([])
        else:
            found[-1].append(line)
    return [normalised("\n".join(unit)) for unit in found if unit]


@given(TEXTS, st.sampled_from(["paragraph", "line"]), st.integers(1, 4))
@settings(max_examples=200, deadline=None)
def test_units_and_cuts_are_those_of_the_reference(texts: list[str], level: paragraphs.Level, least: int) -> None:
    column = pa.array(texts, pa.string())
    units = paragraphs.split_units(column, level)
    expected = [units_of(text, level) for text in texts]
    assert np.diff(units.offsets).tolist() == [len(found) for found in expected]
    flat = [unit for found in expected for unit in found]
    assert units.characters.tolist() == [len(unit) for unit in flat]
    assert len(set(units.hash.tolist())) == len(set(flat)) == len(set(zip(flat, units.hash.tolist(), strict=True)))
    hashes = paragraphs.unit_hashes(column, level, least)
    repeats = paragraphs.find_repeats(hashes, np.arange(len(hashes)))
    repeated = np.zeros(len(hashes), bool)
    repeated[repeats] = True
    gone = units.characters >= least
    gone[gone] = repeated
    cut = paragraphs.cut_units(column, units, gone)
    seen: set[str] = set()
    for document, found in enumerate(expected):
        left, gone = [], []
        for unit in found:
            (gone if len(unit) >= least and unit in seen else left).append(unit)
            seen.add(unit)
        text = cut.texts[document].as_py()
        assert units_of(text, level) == left
        assert text == texts[document] if not gone else len(text) < len(texts[document])
        assert cut.units[document] == len(gone)
        assert cut.share[document] == sum(map(len, gone)) / max(1, sum(map(len, found)))


def test_a_cut_takes_the_white_space_behind_it() -> None:
    texts = pa.array(["Head\n\n  one two\nthree\n\n\nlast\n", "  One  two\nthree \n\n\tnext\n\nlast", "last\n\n"])
    hashes = paragraphs.unit_hashes(texts, "paragraph", 4)
    repeated = np.zeros(len(hashes), bool)
    repeated[paragraphs.find_repeats(hashes, np.arange(len(hashes)))] = True
    units = paragraphs.split_units(texts, "paragraph")
    assert (units.characters >= 4).all()
    cut = paragraphs.cut_units(texts, units, repeated)
    assert cut.texts.to_pylist() == ["Head\n\n  one two\nthree\n\n\nlast\n", "\tnext", ""]
    assert cut.units.tolist() == [0, 2, 1]
    assert cut.share.tolist() == [0.0, 17 / 21, 1.0]


def test_repeats_in_partitions_are_those_of_the_whole() -> None:
    hashes = np.random.default_rng(0).integers(1, 200, 1_000).astype(np.uint64)
    positions = np.arange(1_000)
    found = []
    for partition in range(4):
        chosen = hashes % 4 == partition
        found.append(paragraphs.find_repeats(hashes[chosen], positions[chosen]))
    assert np.sort(np.concatenate(found)).tolist() == paragraphs.find_repeats(hashes, positions).tolist()
    first = np.unique(hashes, return_index=True)[1]
    assert sorted({*range(1_000)} - {*first.tolist()}) == paragraphs.find_repeats(hashes, positions).tolist()


def test_explain_shows_the_curve_and_the_need() -> None:
    assert collision(0.8, 18, 7) == pytest.approx(0.986, abs=5e-4)  # DESIGN's figures
    assert collision(0.5, 18, 7) == pytest.approx(0.13, abs=5e-3)
    assert collision(0.8, 9, 13) == pytest.approx(0.399, abs=5e-4)  # what datasketch picks for 0.8 and 128 hashes
    text = explain(DedupSettings(), number=10_000_000, workers=2)
    assert "18 bands x 7 rows" in text
    assert "0.9855" in text
    assert "about 10,000,000" in text
    for settings_, what in ((DedupSettings(method="exact"), "documents"), (DedupSettings(method="line"), "lines")):
        text = explain(settings_)
        assert "bands" not in text
        assert "100,000,000" in text
        assert what in text
    assert need(10_000_000, workers=2).memory <= 4e9
