"""Pages for people: each is one HTML file that needs nothing else, works from the disk, and follows `page.html`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

# What a page or a terminal must not obey: controls (but tab and newline), DEL and the C1 controls (ESC [ and its
# one-character twin steer terminals), marks without width (but the joiners of emoji and of Persian and Indic words),
# and those that turn the direction of the text around them. Lone surrogates cannot even be written.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    r"""The text with characters that cannot be seen, or that steer what shows it, written out.

    Controls become their pictures, others their code; tabs and newlines stay.

    >>> visible("a\x00b\u202ec")
    'a␀b⟨202E⟩c'
    """
    return HIDDEN.sub(_picture, text)


def _picture(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else f"⟨{code:02X}⟩"


def amount(number: float | None) -> str:
    """A count in three digits: 9.00 K, 12.3 M, 2.00 T; whole numbers below 1,000; a dash where it is not known."""
    if number is None:
        return "–"
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.{2 - (scaled >= 9.995) - (scaled >= 99.95)}f} {unit}"
    return f"{number:.0f}"


def render_page(template: Path, values: Mapping[str, Any], filters: Mapping[str, Callable[..., Any]]) -> str:
    """Fill a template, which may extend `page.html`; all values are escaped and `visible`, None is a dash."""
    environment = _environment(template.parent)
    environment.filters.update(filters)
    return environment.get_template(template.name).render(**values)


@lru_cache(maxsize=4)
def _environment(folder: Path) -> jinja2.Environment:
    """Kept, since compiling a template takes longer than filling it."""
    import jinja2
    from markupsafe import Markup

    def finish(value: Any) -> Any:
        if isinstance(value, str) and not isinstance(value, Markup):
            return visible(value)
        return "–" if value is None else value

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=finish,
    )
