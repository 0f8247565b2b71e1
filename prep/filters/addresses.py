"""What counts as an e-mail address, a public IP address or a phone number, and what only looks like one and is left.

E-mail, `local@domain`:

* local: letters, digits and `_ . + % -`, at most 64; it begins with a letter, a digit or `_`. The rarer signs of RFC
  5322 (`' = / ! # $ & * ? ^ { | } ~`) end it, since in running text they quote, assign and separate.
* domain: labels with dots and a last one of 2 to 24 letters (or `xn--...`); or an IP address in brackets.
* letters are ASCII, Latin with diacritics, Greek and Cyrillic. Scripts that are written without spaces end an address:
  of `联系abc@qq.com谢谢` only `abc@qq.com` is one.
* `a@b.org@c.org` is one address, and so is `pw@host.org` of `https://user:pw@host.org`.
* left: domains kept for examples (RFC 2606: example.com .net .org .edu, .example .test .invalid .localhost), `git@host`
  (a fixed account, not a person), versions (`lodash@4.17.x`), names of images (`icon@2x.png`), `user at host dot com`.

IPv4, four numbers of 0 to 255 without leading zeros:

* left: special ranges (IANA's registry: private, loopback, link-local, shared, documentation, benchmarking, multicast,
  reserved); a part of a longer word or number (`v1.20.3.4`, `1.20.3.4.5`, `app-1.20.3.4`, `Chrome/11.20.3.4`,
  `1.20.3.4-rc1`); behind a word for versions and sections (`version 1.20.3.4`, `Section 1.20.3.4`) or a sign that pins
  a version (`==`, `>= `, `~> `); and four numbers below ten: versions, sections, or name servers open to all.
* a port, a prefix length or `http://` beside it stays.

IPv6: within 2000::/3, all that is given out; ranges for documentation and benchmarks are left, and so are addresses
that end in `::`, which name a network. Of IPv4 inside IPv6 (`::ffff:93.184.216.34`) the IPv4 rules hold.

Phone numbers, conservative: `+`, a country code other than 1, and 8 to 15 digits in all, in at most six groups (10 to
15 without any separator), as far as digits go on; and North American numbers, `(202) 555-0147`, `202-555-0147`,
`202.555.0147` with or without `1-`, or any of these behind `+1`. National forms of other countries and bare runs of
digits are left.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Address, IPv6Network

Masked = tuple[str, int]  # the text, and how many were replaced

_EMAIL_SIGN, _PHONE_SIGN, _IPV6_SIGN = re.compile("@"), re.compile(r"\+[2-9]"), re.compile(":[0-9A-Fa-f:]")
_IPV4_SIGN = re.compile(r"\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]")

_LETTERS = r"A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u0370-\u052f"
_LABEL = rf"[{_LETTERS}0-9](?:[{_LETTERS}0-9_-]{{0,61}}[{_LETTERS}0-9])?"
_LOCAL_REVERSED = re.compile(rf"[{_LETTERS}0-9_.+%-]+")
_DOMAIN = re.compile(
    rf"(?:(?:{_LABEL}\.)+(?:xn--[A-Za-z0-9-]{{2,59}}|[{_LETTERS}]{{2,24}})(?![{_LETTERS}0-9_]|-[{_LETTERS}0-9])"
    r"|\[[0-9A-Fa-f:.]{2,45}\])"
)
_EXAMPLE = re.compile(r"(?:.*\.)?(?:example\.(?:com|net|org|edu)|example|test|invalid|localhost)", re.IGNORECASE)
_NOT_DOMAIN = re.compile(r"[0-9]+\.[0-9]|[0-9]+x\.")
LONGEST_LOCAL = 64

_IPV4 = re.compile(r"[0-9]{1,3}(?:\.[0-9]{1,3}){3}", re.ASCII)
_NUMBERED = """v ver vers version versions rel release releases rev revision revisions build builds firmware driver
drivers patch update updates section sections sect sec chapter chapters clause clauses article articles figure figures
fig table tables paragraph paragraphs para appendix item items rule rules"""
_VERSION_WORDS = frozenset(_NUMBERED.split())
# what stands before a number, read backwards: the word, and the signs that pin or continue a version
_WORD_BEFORE = re.compile(r"[.:#\s]{0,3}([A-Za-z]+)")
_VERSION_BEFORE = re.compile(r"\s?=[<>~!]|==|\s?>~|\^|\s{0,2}§|\.[0-9]|[-/][A-Za-z_]")
_VERSION_BEHIND = re.compile(r"\.v?[0-9]|-[A-Za-z]")
_CONTEXT, _DIGITS = 24, frozenset("0123456789")
_IPV6 = re.compile(r"[23][0-9A-Fa-f]{3}(?::[0-9A-Fa-f]{0,4}){1,8}(?:(?:\.[0-9]{1,3}){3})?", re.ASCII)

# https://www.iana.org/assignments/iana-ipv4-special-registry and multicast (RFC 5771)
_SPECIAL = """0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24
192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4"""
_SPECIAL_IPV4 = [(int(network.network_address), int(network.netmask)) for network in map(IPv4Network, _SPECIAL.split())]
# https://www.iana.org/assignments/iana-ipv6-special-registry, what of it lies in 2000::/3 and names no one's machine
_SPECIAL_IPV6 = [
    IPv6Network(name) for name in ("2001:2::/48", "2001:10::/28", "2001:20::/28", "2001:db8::/32", "3fff::/20")
]

_INTERNATIONAL = re.compile(r"\+[2-9](?:[ .\-()/]{0,2}[0-9]){7,14}+(?![0-9A-Za-z_]|[ .-][0-9])", re.ASCII)
_NORTH_AMERICAN = re.compile(
    r"(?<![0-9A-Za-z_+./#=-])(?:"
    r"\+1[ .-]?(?:\([2-9][0-9]{2}\)|[2-9][0-9]{2})[ .-]?[2-9][0-9]{2}[ .-]?"
    r"|(?:1[-. ])?(?:\([2-9][0-9]{2}\) ?[2-9][0-9]{2}-|[2-9][0-9]{2}([-.])[2-9][0-9]{2}\1)"
    r")[0-9]{4}(?![0-9A-Za-z_]|[-.][0-9])",
    re.ASCII,
)
_GROUPS = re.compile(r"[0-9]+")
MOST_GROUPS, BARE_DIGITS = 6, 10


def mask_emails(text: str, replacement: str) -> Masked:
    """Replace e-mail addresses."""
    return _replace_around(_EMAIL_SIGN, _email, text, replacement)


def mask_ipv4(text: str, replacement: str) -> Masked:
    """Replace public IPv4 addresses."""
    return _replace_around(_IPV4_SIGN, _ipv4, text, replacement)


def mask_ipv6(text: str, replacement: str) -> Masked:
    """Replace public IPv6 addresses."""
    return _replace_around(_IPV6_SIGN, _ipv6, text, replacement)


def mask_phones(text: str, replacement: str) -> Masked:
    """Replace phone numbers."""
    text, first = _replace_around(_PHONE_SIGN, _international, text, replacement)
    second = sum(match[0] != replacement for match in _NORTH_AMERICAN.finditer(text))
    return (_NORTH_AMERICAN.sub(lambda _: replacement, text) if second else text), first + second


def _replace_around(
    sign: re.Pattern[str], find: Callable[[str, int, int], tuple[int, int] | None], text: str, replacement: str
) -> Masked:
    """Replace what `find(text, place of a sign, end of what was found before)` finds: its borders, or nothing.

    `re` looks for one sign at the speed of memory, and for a class of characters a hundred times slower.
    """
    pieces: list[str] = []
    done = found_until = 0
    place = sign.search(text)
    while place:
        borders = find(text, place.start(), found_until)
        if borders is not None:
            begin, found_until = borders
            if text[begin:found_until] != replacement:
                pieces += (text[done:begin], replacement)
                done = found_until
        place = sign.search(text, max(place.start() + 1, found_until))
    return "".join([*pieces, text[done:]]), len(pieces) // 2


def _email(text: str, at: int, done: int) -> tuple[int, int] | None:
    """Borders of the address around the sign at `at`, not before `done`, if it is one to mask."""
    window = text[max(done, at - LONGEST_LOCAL - 1) : at]
    run = _LOCAL_REVERSED.match(window[::-1])
    if run is None:
        return None
    local = run[0][::-1].lstrip(".+%-")
    domain = _DOMAIN.match(text, at + 1)
    if not local or local.endswith(".") or len(local) > LONGEST_LOCAL or domain is None:
        return None
    name, end = domain[0], domain.end()
    while text[end : end + 1] == "@" and (domain := _DOMAIN.match(text, end + 1)):
        end = domain.end()
    alone = end == at + 1 + len(name)
    if alone and (local == "git" or _EXAMPLE.fullmatch(name) or _NOT_DOMAIN.match(name)):
        return None
    return at - len(local), end


def _ipv4(text: str, at: int, done: int) -> tuple[int, int] | None:
    """Borders of the address whose first point is at `at`, if it is one to mask."""
    begin = at
    while begin > max(done, at - 3) and text[begin - 1] in _DIGITS:
        begin -= 1
    match = _IPV4.match(text, begin)
    return match.span() if match and _is_public_ipv4(match) else None


def _ipv6(text: str, at: int, done: int) -> tuple[int, int] | None:
    """Borders of the address whose first colon is at `at`, if it is one to mask."""
    match = _IPV6.match(text, at - 4) if at - 4 >= done else None
    if match is None or _touches_word(match, ":"):
        return None
    name = match[0]
    if name.endswith(":") and not name.endswith("::"):
        name = name[:-1]  # a colon of the sentence
    return (at - 4, at - 4 + len(name)) if not name.endswith(":") and _is_public_ipv6(name) else None


def _international(text: str, at: int, done: int) -> tuple[int, int] | None:
    """Borders of the number whose plus sign is at `at`."""
    match = _INTERNATIONAL.match(text, at)
    if match is None or _touches_word(match, "+."):
        return None
    groups = _GROUPS.findall(match[0])
    enough = len(groups[0]) >= BARE_DIGITS if len(groups) == 1 else len(groups) <= MOST_GROUPS
    return match.span() if enough else None


def _is_word(character: str) -> bool:
    return character.isascii() and (character.isalnum() or character == "_")


def _touches_word(match: re.Match[str], also_before: str = "") -> bool:
    """Whether the match is a part of a longer word."""
    text, begin, end = match.string, match.start(), match.end()
    before, after = text[begin - 1 : begin] if begin else "", text[end : end + 1]
    return _is_word(before) or (before != "" and before in also_before) or _is_word(after)


def _is_public_ipv4(match: re.Match[str]) -> bool:
    numbers = match[0].split(".")
    if any((len(number) > 1 and number[0] == "0") or int(number) > 255 for number in numbers):
        return False
    if _touches_word(match) or max(map(int, numbers)) < 10:
        return False
    text, begin, end = match.string, match.start(), match.end()
    before = text[max(begin - _CONTEXT, 0) : begin][::-1]
    word = _WORD_BEFORE.match(before)
    if word and word[1][::-1].lower() in _VERSION_WORDS:
        return False
    if _VERSION_BEFORE.match(before) or _VERSION_BEHIND.match(text, end):
        return False
    value = int.from_bytes(bytes(map(int, numbers)))
    return not any(value & mask == network for network, mask in _SPECIAL_IPV4)


def _is_public_ipv6(name: str) -> bool:
    try:
        address = IPv6Address(name)
    except ValueError:
        return False
    return not any(address in network for network in _SPECIAL_IPV6)
