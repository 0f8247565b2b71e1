"""Rules, presets and lists: decisions, thresholds from outside, kept statistics, messages."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from filter_reference import clean_c4, statistics
from prep_data import write_rows
from prep_runs import kept, rejected
from test_filters import SHARED, rows

from prep.cli_documents import filter_documents
from prep.filters.presets import PRESETS, build
from prep.filters.rules import CleanStage, FilterStage, MeasureStage
from prep.stages import Tally, replace_text
from shards.errors import UserError

PROSE = "The cat sat on the mat and looked at the dog with care. It had to be so, and that was all there was of it.\n"


def batch(texts: list[str], **columns: list) -> pa.RecordBatch:
    ids = [str(number) for number in range(len(texts))]
    arrays = {"id": ids, "text": texts, "source": ["s"] * len(texts), **columns}
    return pa.RecordBatch.from_pydict({name: pa.array(values) for name, values in arrays.items()})


def run(settings: dict, documents: pa.RecordBatch) -> tuple[pa.RecordBatch, dict[str, str], list[Tally]]:
    """What stays, the rule that removed each other document, and the tallies."""
    removed, tallies = {}, []
    for stage in build(settings, "test"):
        tally = Tally(stage.name)
        documents = pickle.loads(pickle.dumps(stage))(documents, tally)
        tallies.append(tally)
        for gone in tally.rejected:
            removed |= dict(zip(gone.column("id").to_pylist(), gone.column("rule").to_pylist(), strict=True))
    return documents, removed, tallies


def decide(text: str, stages: list) -> tuple[str | None, str]:
    """The first broken rule by the reference's values, and the text at the end."""
    for stage in stages:
        if isinstance(stage, FilterStage):
            values = statistics(text)
        elif stage.cleaner == "c4":
            ends = next(rule.active for rule in stage.rules if rule.name == "c4.line_end")
            cleaned, values = clean_c4(text, ends=ends)
        for rule in stage.rules:
            if rule.on_lines:
                continue
            value = values[rule.statistic]
            if (rule.low is not None and value < rule.low) or (rule.high is not None and value > rule.high):
                return rule.name, text
        if isinstance(stage, CleanStage):
            if not cleaned:
                return f"{stage.name}.nothing_left", text
            text = cleaned
    return None, text


@pytest.mark.parametrize("preset", ["gopher", "gopher_repetition", "c4_paper", "fineweb", "fineweb_quality"])
def test_decisions_equal_the_reference(preset):
    made = ["\n", " ", "a", PROSE * 3, PROSE * 40, "- x\n" * 60, "x y {\n" * 9]
    texts = [*rows(SHARED / "c4-300.jsonl", 300), *made]
    kept, removed, _ = run({"preset": preset}, batch(texts))
    stages = build({"preset": preset}, "test")
    left = dict(zip(kept.column("id").to_pylist(), kept.column("text").to_pylist(), strict=True))
    assert len(left) + len(removed) == len(texts)
    for number, text in enumerate(texts):
        rule, end = decide(text, stages)
        assert removed.get(str(number)) == rule
        assert left.get(str(number), end) == end


def test_bounds_are_inclusive_and_reported():
    texts = ["one two three", "one two three four", "one two three four five six"]
    settings = {"rules": {"length.words": {"low": 4, "high": 5}}}
    kept, removed, (tally,) = run(settings, batch(texts))
    assert kept.column("id").to_pylist() == ["1"]
    assert removed == {"0": "length.words", "2": "length.words"}
    reasons = pa.Table.from_batches(tally.rejected).to_pylist()
    assert [(row["value"], row["threshold"]) for row in reasons] == [(3.0, 4.0), (6.0, 5.0)]
    assert sum(tally.histograms["length.words"].counts) == 3
    assert (tally.histograms["length.words"].low, tally.histograms["length.words"].high) == (4, 5)


def test_rules_are_changed_by_name():
    documents = batch([PROSE])
    assert run({"preset": "gopher_quality"}, documents)[1] == {"0": "gopher_quality.word_count"}
    for change in ({"low": 20}, {"low": None}, False):
        settings = {"preset": "gopher_quality", "rules": {"gopher_quality.word_count": change}}
        assert run(settings, documents)[1] == {}
    settings = {"preset": "c4_paper", "rules": {"c4.sentences": False, "c4.line_words": {"low": 20}}}
    kept, _, (tally,) = run(settings, batch([f"Only four words here.\n{PROSE}"]))
    assert kept.column("text").to_pylist() == [PROSE.strip()]
    assert tally.counts == {"lines": 2, "lines.words": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "gofer"}, "unknown preset 'gofer'; did you mean 'gopher'?"),
        ({"preset": "c4", "rules": {"c4.sentence": False}}, "unknown rule 'c4.sentence'; did you mean 'c4.sentences'?"),
        ({"preset": "c4", "rules": {"gopher_quality.hashes": False}}, "unknown rule 'gopher_quality.hashes'"),
        ({"preset": "c4", "rules": {"c4.sentences": {"low": "many"}}}, "c4.sentences"),
        ({"preset": "c4", "rules": {"c4.sentences": {"hihg": 3}}}, "hihg"),
        ({"preset": "c4", "rules": {"c4.sentences": 3}}, "c4.sentences"),
        ({"preset": "c4", "rules": {"c4.line_words": {"high": 3}}}, "high means nothing for it; give only low"),
        ({"preset": "c4", "rules": {"c4.line_policy": {"low": 3}}}, "give only true or false"),
        ({"preset": "c4", "rules": {"length.words": True}}, "no bound of its own"),
        ({"preset": "gopher", "rules": {"gopher_quality.word_count": {"low": 200_000}}}, "nothing would stay"),
        ({"preset": "gopher", "rulse": {}}, "did you mean 'rules'?"),
        ({}, "nothing to filter by"),
        ({"urls": {}}, "no list"),
        ({"words": [{"files": ["/no/such/list"]}]}, "/no/such/list"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=r"recipe\.yaml") as caught:
        build(settings, "recipe.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize("preset", [*PRESETS, ["c4", "dclm", "gopher"], ["gopher", "c4_paper", "c4_paper", "gopher"]])
def test_kept_statistics_give_the_same_documents(preset, monkeypatch):
    """Behind cleanings too, which here change every other text."""
    texts = rows(SHARED / "c4-300.jsonl", 120)
    dirt = "By the use of cookies you agree to this.\n3 likes\nA [[1]2] citation of what the cat did to the dog.\n"
    documents = batch([f"# Copyright me\n\n{dirt}{text}" if number % 2 else text for number, text in enumerate(texts)])
    stages = build({"preset": preset}, "test")
    measured = MeasureStage(tuple(stages))(documents, Tally("statistics"))
    assert measured.schema == pa.schema([*documents.schema, *MeasureStage(tuple(stages)).adds])
    assert measured.num_rows == documents.num_rows
    expected, expected_removed, _ = run({"preset": preset}, documents)
    if any(isinstance(stage, CleanStage) for stage in stages):
        assert any(expected.column("text")[n].as_py() not in texts for n in range(expected.num_rows))
    with monkeypatch.context() as patch:
        patch.setattr("prep.filters.measures.GROUPS", {})  # nothing can be measured any more
        kept, removed, _ = run({"preset": preset}, measured)
    assert kept.select(["id", "text"]).equals(expected.select(["id", "text"]))
    assert removed == expected_removed
    # What is left may be filtered again: nothing that was kept of the text before is taken for the one after.
    assert run({"preset": preset}, kept)[1] == run({"preset": preset}, expected)[1]


def test_a_folder_with_statistics_is_filtered_without_measuring(tmp_path, monkeypatch):
    """Through files, with documents that each of the three stages rejects and a cleaning in between."""
    monkeypatch.chdir(tmp_path)
    dirt = "By the use of cookies you agree to this.\nBut the cat did what the dog had to do with it."
    texts = [f"{dirt}\n{text}" for text in rows(SHARED / "c4-300.jsonl", 150)]
    texts += [f"{text}\nx {{" for text in texts[:9]]
    write_rows(tmp_path / "a.jsonl", [{"id": str(n), "text": text} for n, text in enumerate(texts)])
    filter_documents(["a.jsonl"], "direct", preset=["fineweb"], rule=["fineweb_quality.short_lines=..0.05"], workers=1)
    filter_documents(["a.jsonl"], "stats", preset=["fineweb"], stats_only=True, workers=1)
    monkeypatch.setattr("prep.filters.measures.GROUPS", {})
    filter_documents(["stats"], "again", preset=["fineweb"], rule=["fineweb_quality.short_lines=..0.05"], workers=1)
    names = ["id", "text", "stage", "rule", "value", "threshold"]
    direct, again = ([[row[name] for name in names] for row in rejected(tmp_path / out)] for out in ("direct", "again"))
    assert direct == again
    assert len({stage for _, _, stage, *_ in direct}) == 3
    stayed = [[(row["id"], row["text"]) for row in kept(tmp_path / out)] for out in ("direct", "again")]
    assert stayed[0] == stayed[1]
    assert dirt.split("\n")[0] not in stayed[0][0][1]


def test_statistics_are_measured_anew_over_those_that_are_there():
    documents = batch(rows(SHARED / "c4-300.jsonl", 9))
    gopher, fineweb = (MeasureStage(tuple(build({"preset": name}, "t"))) for name in ("gopher", "fineweb"))
    once = fineweb(documents, Tally("x"))
    twice = fineweb(gopher(documents, Tally("x")), Tally("x"))
    assert twice.select(once.schema.names).equals(once)
    assert len(set(twice.schema.names)) == len(twice.schema.names)


@pytest.mark.parametrize(
    "option",
    [{name: ["x"]} for name in ("language", "words", "url_domains")]
    + [{name: "a:b:1"} for name in ("classifier", "mask")],
)
def test_the_command_refuses_what_has_no_statistics(option, tmp_path):
    (name,) = option
    with pytest.raises(UserError, match=f"--stats-only: .* leave out --{name.replace('_', '-')} and"):
        filter_documents([str(tmp_path)], str(tmp_path / "out"), preset=["gopher"], stats_only=True, **option)
    assert not list(tmp_path.iterdir())


def test_only_rules_have_statistics(tmp_path):
    path = write(tmp_path / "w", "bad\n")
    with pytest.raises(ValueError, match="without statistics: words"):
        MeasureStage(tuple(build({"preset": "gopher", "words": [{"files": [path]}]}, "t")))


def test_kept_statistics_of_a_changed_text_are_not_used():
    documents = batch([PROSE * 4, PROSE * 30])
    stages = build({"preset": "gopher_quality"}, "test")
    measured = MeasureStage(tuple(stages))(documents, Tally("statistics"))
    column = measured.schema.get_field_index("gopher_quality.word_count@1")
    changed = replace_text(measured, pa.array(["short", PROSE * 30]))
    assert changed.column(column).null_count == 1
    assert stages[0](changed, Tally("x")).column("id").to_pylist() == ["1"]


def test_values_behind_another_cleaning_have_another_name():
    names = [
        set(MeasureStage(tuple(build({"preset": "fineweb", "rules": rules}, "t"))).adds.names)
        for rules in ({}, {"c4.line_words": {"low": 4}}, {"c4.sentences": {"low": 4}})
    ]
    assert names[0] == names[2]
    assert {name.partition("@")[0] for name in names[0] ^ names[1]} >= {"fineweb_quality.newlines", "c4.sentences"}
    assert "gopher_quality.word_count@1" in names[0] & names[1]


def test_descriptions_change_with_what_matters():
    one = [stage.describe() for stage in build({"preset": "fineweb"}, "t")]
    assert one == [stage.describe() for stage in build({"preset": "fineweb"}, "elsewhere")]
    other = build({"preset": "fineweb", "rules": {"c4.line_policy": False}}, "t")
    assert one[0] == other[0].describe()
    assert one[1] != other[1].describe()


def test_empty_batches_pass():
    for preset in PRESETS:
        kept, removed, _ = run({"preset": preset}, batch(["x"]).slice(0, 0))
        assert kept.num_rows == 0
        assert not removed


def test_code():
    code = "def add(first, second):\n    return first + second\n"
    generated = "# Code generated by protoc. DO NOT EDIT.\n" + code
    texts = [code, "x = 1\n" + "y" * 2000, generated, "{}[]();,\n" * 9, "# Copyright me\n"]
    texts.append("# Copyright me\n# All rights reserved\n\n" + code)
    kept, removed, _ = run({"preset": "code"}, batch(texts))
    assert removed == {
        "1": "code.longest_line",
        "2": "code.generated",
        "3": "code.alphanumeric",
        "4": "code_licence.nothing_left",
    }
    assert kept.column("text").to_pylist() == [code, code]


def test_dclm_removes_what_loses_too_many_words():
    long = PROSE * 8
    texts = [long + "MENU HOME\n3 likes\n2019\nRead more...\n", long + "LOUD WORDS HERE\n" * 20]
    off = ["duplicate_lines", "duplicate_line_characters", *(f"duplicate_{n}gram" for n in range(5, 11))]
    off += [f"top_{n}gram" for n in (2, 3, 4)]
    settings = {"preset": "dclm", "rules": {f"dclm.{name}": False for name in off}}
    kept, removed, tallies = run(settings, batch(texts))
    assert kept.column("text").to_pylist() == [long.strip()]
    assert removed == {"1": "dclm_lines.words_removed"}
    assert tallies[1].counts["lines.upper_case"] == 21


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_addresses(tmp_path):
    urls = {
        "http://user:pw@www.Bad.com:8080/x": "urls.domain",
        "https://bad.com": "urls.domain",
        "notbad.com/a": None,
        "https://good.org/Page/#top": "urls.url",
        "https://good.org/page": None,
        "https://fine.net/SpamStuff": "urls.substring",
        None: None,
        "": None,
    }
    lists = {
        "domains": [write(tmp_path / "d", "# domains\n\nBad.com\n")],
        "urls": [write(tmp_path / "u", "http://good.org/Page\n")],
        "substrings": [write(tmp_path / "s", "spam\n")],
    }
    documents = batch(["x"] * len(urls), address=list(urls))
    _, removed, (tally,) = run({"urls": {"column": "address", **lists}}, documents)
    assert [removed.get(str(number)) for number in range(len(urls))] == list(urls.values())
    assert tally.samples["urls.domain"][0]["detail"] == "http://user:pw@www.Bad.com:8080/x"
    with pytest.raises(UserError, match="no column 'url'"):
        run({"urls": lists}, documents)


def test_words(tmp_path):
    path = write(tmp_path / "w", "Foo\nnew  york\ncafé\n$$$\nпривет\n")
    texts = ["a foo.", "food", "NEW\nYORK!", "renew york", "CAFÉ", "cafés", "x$$$$", "Привет", "foo foo_ FOO", "K"]
    expected = [1, 0, 1, 0, 1, 0, 2, 1, 2, 0]
    for most in (0, 1):
        _, removed, (tally,) = run({"words": [{"name": "bad", "files": [path], "max_matches": most}]}, batch(texts))
        assert removed == {str(n): "words_bad.matches" for n, count in enumerate(expected) if count > most}
    assert {row["detail"] for gone in tally.rejected for row in gone.to_pylist()} == {"$$$", "Foo"}
    anywhere = run({"words": [{"files": [path], "match": "substring"}]}, batch(texts))[1]
    assert sorted(anywhere) == ["0", "1", "2", "3", "4", "5", "6", "7", "8"]


def test_a_changed_list_changes_the_description(tmp_path):
    path = write(tmp_path / "w", "one\n")
    before = build({"words": [{"files": [path]}]}, "t")[0]
    assert before(batch(["one", "two"]), Tally("w")).num_rows == 1
    write(tmp_path / "w", "two\n")
    assert build({"words": [{"files": [path]}]}, "t")[0].describe() != before.describe()
    write(tmp_path / "w", "# nothing\n")
    with pytest.raises(UserError, match="no entries"):
        build({"words": [{"files": [path]}]}, "t")


def test_many_words_against_a_plain_search(tmp_path):
    words = [f"{a}{b}{c}" for a in "abcd" for b in "abcd" for c in "abcde"]
    path = write(tmp_path / "w", "\n".join(words))
    random = np.random.default_rng(1)
    texts = ["".join(random.choice(list("abcde "), 40)) for _ in range(300)]
    expected = {str(n) for n, text in enumerate(texts) if any(word in text for word in words)}
    assert set(run({"words": [{"files": [path], "match": "substring"}]}, batch(texts))[1]) == expected
    whole = {str(n) for n, text in enumerate(texts) if set(words) & set(text.split())}
    assert set(run({"words": [{"files": [path]}]}, batch(texts))[1]) == whole
