"""Presets: lists of steps, each a list of rules with the thresholds of its source. docs/FILTERS.md defines all of them.

A new rule is a line in one of the tables; its statistic is in `measures.STATISTICS` or comes from the step's cleaner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import Field

from prep.filters.rules import CleanStage, FilterStage, Override, Rule, override
from prep.filters.wordlists import UrlSettings, UrlStage, WordListSettings, WordListStage
from prep.stages import Stage
from shards.errors import UserError, unknown_name
from shards.settings import Settings, validate

GOPHER = "Gopher (Rae et al. 2021), A.1.1, as in datatrove 0.10"
GOPHER_TABLE = "Gopher (Rae et al. 2021), table A1, as in datatrove 0.10"
C4 = "C4 (Raffel et al. 2020), 2.2"
C4_CODE = "C4's reference code (tensorflow_datasets/text/c4_utils.py)"
FINEWEB = "FineWeb (Penedo et al. 2024), 3.6; datatrove 0.10"
DCLM = "DCLM (Li et al. 2024), baselines_configs/dclm_baseline_refinedweb.yaml"
STARCODER = "StarCoder (Li et al. 2023), 3.2; codeparrot"


def _table(step: str, source: str, rows: Sequence[tuple[str, str, float | None, float | None]]) -> tuple[Rule, ...]:
    return tuple(Rule(f"{step}.{name}", statistic, low, high, source) for name, statistic, low, high in rows)


def _repetition(step: str, prefixes: tuple[str, str, str], source: str) -> tuple[Rule, ...]:
    """Gopher's table A1; `prefixes` of the statistics of copies, of top and of duplicate n-grams."""
    copies, top, duplicate = prefixes
    paragraphs = (
        ("duplicate_paragraphs", f"{copies}_paragraphs", None, 0.3),
        ("duplicate_paragraph_characters", f"{copies}_paragraph_characters", None, 0.2),
    )
    lines = (
        ("duplicate_lines", f"{copies}_lines", None, 0.3),
        ("duplicate_line_characters", f"{copies}_line_characters", None, 0.2),
    )
    tops = ((f"top_{n}gram", f"{top}_{n}gram", None, high) for n, high in ((2, 0.2), (3, 0.18), (4, 0.16)))
    highs = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1))
    duplicates = ((f"duplicate_{n}gram", f"{duplicate}_{n}gram", None, high) for n, high in highs)
    return _table(step, source, (*paragraphs, *lines, *tops, *duplicates))


def _c4(source: str, *, words: float, sentences: float, ends: bool = True) -> tuple[Rule, ...]:
    return (
        Rule("c4.line_word_length", high=1000, source=C4_CODE),
        Rule("c4.citations", source=C4_CODE),
        Rule("c4.line_end", source=C4, active=ends),
        Rule("c4.line_words", low=words, source=source),
        Rule("c4.line_javascript", source=C4),
        Rule("c4.line_policy", source=C4_CODE),
        Rule("c4.lorem_ipsum", "lorem_ipsum", high=0, source=C4),
        Rule("c4.curly_brackets", "curly_brackets", high=0, source=C4),
        Rule("c4.sentences", "sentences", low=sentences, source=source),
    )


_QUALITY = _table(
    "gopher_quality",
    GOPHER,
    (
        ("word_count", "words", 50, 100_000),
        ("mean_word_length", "mean_word_length", 3, 10),
        ("hashes", "hashes_per_token", None, 0.1),
        ("ellipses", "ellipses_per_token", None, 0.1),
        ("bullet_lines", "bullet_lines", None, 0.9),
        ("ellipsis_lines", "ellipsis_lines", None, 0.3),
        ("alphabetic_words", "alphabetic_tokens", 0.8, None),
        ("stop_words", "different_stop_words", 2, None),
    ),
)
_FINEWEB = _table(
    "fineweb_quality",
    FINEWEB,
    (
        ("terminal_lines", "terminal_lines", 0.12, None),
        ("short_lines", "short_lines", None, 0.67),
        ("duplicate_line_characters", "copied_line_characters", None, 0.01),
        ("newlines", "newlines_per_token", None, 0.3),
    ),
)
_DCLM = (
    *_table(
        "dclm",
        DCLM,
        (
            ("word_count", "words", 50, 100_000),
            ("mean_word_length", "mean_chunk_length", 3, 10),
            ("symbols", "symbols_per_chunk", None, 0.1),
            ("bullet_lines", "bullet_filled_lines", None, 0.9),
            ("ellipsis_lines", "ellipsis_filled_lines", None, 0.3),
            ("alphabetic_words", "alphabetic_chunks", 0.8, None),
            ("stop_words", "stop_words", 2, None),
        ),
    ),
    *_repetition("dclm", ("repeated", "top_word", "repeated_word"), DCLM),
)
_DCLM_LINES = (
    Rule("dclm_lines.newlines", high=2, source=DCLM),
    Rule("dclm_lines.upper_case", high=0.5, source=DCLM),
    Rule("dclm_lines.numbers", high=0.999999, source=DCLM),
    Rule("dclm_lines.counters", source=DCLM),
    Rule("dclm_lines.words", low=2, source=DCLM),
    Rule("dclm_lines.cart", high=10, source=DCLM),
    Rule("dclm_lines.read_more", high=10, source=DCLM),
    Rule("dclm_lines.sign_in", high=10, source=DCLM),
    Rule("dclm_lines.words_removed", "words_removed", high=0.05, source=DCLM),
)
_CODE = _table(
    "code",
    STARCODER,
    (
        ("longest_line", "longest_line", None, 1000),
        ("mean_line_length", "mean_line_length", None, 100),
        ("alphanumeric", "alphanumeric_share", 0.25, None),
        ("letters", "letter_share", 0.25, None),
        ("generated", "generated_markers", None, 0),
    ),
)
# Off until they are given bounds, in front of every preset.
_LENGTH = tuple(
    Rule(f"length.{name}", name, source="none; give bounds to use it", active=False)
    for name in ("characters", "bytes", "tokens", "words", "lines")
)
# Likewise: shares that no preset bounds.
_SHARES = tuple(
    Rule(f"share.{name}", f"{name}_share", source="none; give bounds to use it", active=False)
    for name in ("letter", "alphanumeric", "upper_case", "number", "space")
)


class PresetStep(NamedTuple):
    """One stage of a preset: its name in the funnel, its rules, and the cleaner if it changes the text."""

    name: str
    rules: tuple[Rule, ...]
    cleaner: str | None = None


_GOPHER_REPETITION = _repetition("gopher_repetition", ("duplicate", "top", "duplicate"), GOPHER_TABLE)
PRESETS: dict[str, tuple[PresetStep, ...]] = {
    "gopher_quality": (PresetStep("gopher_quality", _QUALITY),),
    "gopher_repetition": (PresetStep("gopher_repetition", _GOPHER_REPETITION),),
    "gopher": (PresetStep("gopher", (*_QUALITY, *_GOPHER_REPETITION)),),
    "c4": (PresetStep("c4", _c4(C4_CODE, words=5, sentences=3), "c4_reference"),),
    "c4_paper": (PresetStep("c4", _c4(C4, words=3, sentences=5), "c4"),),
    "fineweb_quality": (PresetStep("fineweb_quality", _FINEWEB),),
    "fineweb": (
        PresetStep("gopher", (*_GOPHER_REPETITION, *_QUALITY)),
        PresetStep("c4", _c4(FINEWEB, words=3, sentences=5, ends=False), "c4"),
        PresetStep("fineweb_quality", _FINEWEB),
    ),
    "dclm": (PresetStep("dclm", _DCLM), PresetStep("dclm_lines", _DCLM_LINES, "dclm_lines")),
    "code": (
        PresetStep("code", _CODE),
        PresetStep("code_licence", (Rule("code_licence.licence", source=STARCODER),), "licence"),
    ),
}


class FilterSettings(Settings):
    """The settings of a filter: `filter: {preset: gopher, rules: {gopher_quality.word_count: {low: 20}}}`.

    Attributes:
        preset: a name of PRESETS, or several, applied one after the other.
        rules: other bounds for rules, by name; false switches a rule off.
        urls: lists of blocked addresses, applied first.
        words: lists of words, applied after the addresses.
    """

    preset: str | list[str] = Field(default_factory=list)
    rules: dict[str, Override] = Field(default_factory=dict)
    urls: UrlSettings | None = None
    words: list[WordListSettings] = Field(default_factory=list)


def build(settings: Mapping[str, Any], where: str) -> list[Stage]:
    """The stages that filter settings ask for, in the order of their work.

    Args:
        settings: as in FilterSettings.
        where: names the file or option in error messages.

    Raises:
        UserError: unknown names (with the nearest known one), wrong types, bounds that make no sense, missing lists.
    """
    given = validate(FilterSettings, dict(settings), where)
    names = [given.preset] if isinstance(given.preset, str) else given.preset
    for name in names:
        if name not in PRESETS:
            raise UserError(f"{where}: preset: {unknown_name('preset', name, PRESETS)}")
    stages: list[Stage] = []
    if given.urls is not None:
        stages.append(UrlStage.load(given.urls, where))
    stages += [WordListStage.load(words, where) for words in given.words]
    steps = [PresetStep("bounds", (*_LENGTH, *_SHARES)), *(step for name in names for step in PRESETS[name])]
    sizes = [len(step.rules) for step in steps]
    changed = override([rule for step in steps for rule in step.rules], given.rules, where)
    behind = ""
    for index, step in enumerate(steps):
        begin = sum(sizes[:index])
        rules = changed[begin : begin + sizes[index]]
        if step.cleaner is not None:
            stage = CleanStage(step.name, step.cleaner, rules, behind)
            behind = stage.leaves
            stages.append(stage)
        elif any(rule.active for rule in rules):
            stages.append(FilterStage(step.name, rules, behind))
    if not stages:
        raise UserError(f"{where}: nothing to filter by; give a preset ({', '.join(PRESETS)}), rules, urls or words")
    return stages
