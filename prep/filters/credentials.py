"""Keys and secrets in source code: what counts as one, and what is left although it looks like one.

By form, as the issuers write them: AWS access key ids (`AKIA...`; not those that end in EXAMPLE, as in AWS's
documents) and AWS secret keys behind their names, GitHub tokens, Slack tokens and webhooks, OpenAI keys (all hold
`T3BlbkFJ`), Google API keys, OAuth secrets and access tokens, JSON Web Tokens, and private keys in PEM blocks with at
least 40 characters of content.

By name: a string in quotes of 8 to 200 characters without white space, assigned (`=`, `:`, `=>`, `:=`, `==`) to a name
with `password`, `passwd`, `pwd`, `secret`, `token`, `credential`, `auth` or `api`, `access`, `private`, `signing`,
`encryption` and `key` in it. It has a letter and a digit, and an entropy of at least 2.5 bits per character for
passwords, 3.5 for the others (as gitleaks' `generic-api-key`). Left are values that stand for one (`changeme1`,
`your-token-1`, `${TOKEN1}`, `<key1>`, `xxxx1`), links, paths and file names, and values without quotes.
"""

from __future__ import annotations

import math
import re
from collections import Counter

TOKENS = re.compile(
    r"(?<![A-Za-z0-9_])(?:"
    r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}"
    r"|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{22,255}"
    r"|xox[abeoprs]-[A-Za-z0-9-]{10,250}"
    r"|sk-[A-Za-z0-9_-]{20,250}?T3BlbkFJ[A-Za-z0-9_-]{20,250}"
    r"|AIza[A-Za-z0-9_-]{35}|GOCSPX-[A-Za-z0-9_-]{28}|ya29\.[A-Za-z0-9_-]{20,500}"
    r"|eyJ[A-Za-z0-9_-]{10,4000}\.eyJ[A-Za-z0-9_-]{10,8000}\.[A-Za-z0-9_-]{10,2000}"
    r")(?![A-Za-z0-9_])"
    r"|(?<=hooks\.slack\.com/services/)T[A-Za-z0-9_]{6,20}/B[A-Za-z0-9_]{6,20}/[A-Za-z0-9_]{16,40}",
    re.ASCII,
)
PRIVATE_KEY = re.compile(
    r"-----BEGIN (?P<kind>[A-Z0-9 ]{0,20}PRIVATE KEY(?: BLOCK)?)-----(?P<body>.{1,20000}?)-----END (?P=kind)-----",
    re.DOTALL,
)
AWS_SECRET = re.compile(
    r"(secret_?access_?key[\"']?\s{0,4}[=:]\s{0,4}[\"']?)([A-Za-z0-9/+]{40})(?![A-Za-z0-9/+])", re.ASCII | re.IGNORECASE
)
VALUE = re.compile(r"[=:]>?\s{0,4}([\"'`])([^\s\"'`]{8,200})\1", re.ASCII)
NAME_BEFORE = re.compile(
    r"(?:passw(?:or)?d|pwd|(?P<key>secret|token(?!iz)|credential|auth(?!or)"
    r"|(?:api|access|private|signing|encryption)[_-]?key))"
    r"\w{0,20}[\"']?[ \t]{0,4}(?::[ \t]{0,2}[\w\[\]. |]{1,30})?[=:]?\Z",
    re.ASCII | re.IGNORECASE,
)
LOOK_BACK = 80
STANDS_FOR_ONE = re.compile(
    r"[$<{%\[(]|[/~.]+[\w-]+/|.*(?:example|placeholder|change.?me|your|x{4}|\*{4}|dummy|sample|insert|redacted"
    r"|password|\$\{|\{\{|%\(|getenv|environ|process\.env|://)|[\w./\\-]+\.[a-z]{1,4}\Z",
    re.IGNORECASE | re.DOTALL,
)
PASSWORD_BITS, KEY_BITS = 2.5, 3.5
LEAST_BODY = 40
# a text without any of these holds no match of TOKENS; looking for words is much faster than for the pattern
_PARTS = "AKIA ASIA ABIA ACCA ghp_ gho_ ghu_ ghs_ ghr_ github_pat_ xox T3BlbkFJ AIza GOCSPX- ya29. eyJ /services/T"
_TOKEN_PARTS = _PARTS.split()
_DIGIT = re.compile("[0-9]")
_BASE64 = re.compile(r"[A-Za-z0-9+/=]")


def mask_secrets(text: str, replacement: str) -> tuple[str, int]:
    """Replace keys and secrets; the names and quotes around them stay."""
    count = 0

    def private_key(match: re.Match[str]) -> str:
        return match[0] if len(_BASE64.findall(match["body"])) < LEAST_BODY else swap(match[0])

    def token(match: re.Match[str]) -> str:
        return match[0] if match[0].endswith("EXAMPLE") else swap(match[0])

    def aws_secret(match: re.Match[str]) -> str:
        return match[0] if "EXAMPLE" in match[2] else match[1] + swap(match[2])

    def assignment(match: re.Match[str]) -> str:
        value, begin = match[2], match.start()
        name = NAME_BEFORE.search(text[max(begin - LOOK_BACK, 0) : begin])
        if name is None or not _is_secret(value, bool(name["key"])):
            return match[0]
        return match[0][: -len(value) - 1] + swap(value) + match[1]

    def swap(secret: str) -> str:
        nonlocal count
        count += secret != replacement
        return replacement

    if "PRIVATE KEY" in text:
        text = PRIVATE_KEY.sub(private_key, text)
    if any(part in text for part in _TOKEN_PARTS):
        text = TOKENS.sub(token, text)
    small = text.lower()
    if "secret" in small and "key" in small:
        text = AWS_SECRET.sub(aws_secret, text)
    return VALUE.sub(assignment, text), count


def entropy(value: str) -> float:
    """Shannon entropy of the characters of a string, in bits per character.

    >>> entropy("aabb")
    1.0
    """
    shares = [number / len(value) for number in Counter(value).values()]
    return -sum(share * math.log2(share) for share in shares)


def _is_secret(value: str, is_key: bool) -> bool:
    if STANDS_FOR_ONE.match(value) or not any(map(str.isalpha, value)) or not _DIGIT.search(value):
        return False
    return entropy(value) >= (KEY_BITS if is_key else PASSWORD_BITS)
