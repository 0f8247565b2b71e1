"""Masking: what is replaced, what is left, and that the fast way finds all that the slow one does."""

from __future__ import annotations

import json
import pickle
import random

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prep_data import prose

from prep.filters import masking_kernel
from prep.filters.credentials import entropy
from prep.filters.masking import MASKERS, MaskStage, build
from prep.stages import Tally
from shards.errors import UserError

ALL = {"phone": True, "secrets": True}
SHORT = {"secret": "<S>", "email": "<E>", "ipv4": "<4>", "ipv6": "<6>", "phone": "<P>"}
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV"
PEM = "-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEowIBAAKCAQEA\n" * 8 + "-----END RSA PRIVATE KEY-----"

MASKED = [
    ("write to ann.lee@site.org.", "write to <E>."),
    ("ann+news@mail.site.co.uk, BOB_1@SITE.ORG", "<E>, <E>"),
    ("<a href='mailto:ann@site.org'>ann</a>", "<a href='mailto:<E>'>ann</a>"),
    ("'ann@site.org' \"ann@site.org\" (ann@site.org) [ann@site.org]", "'<E>' \"<E>\" (<E>) [<E>]"),
    ("user=ann@site.org&x=1", "user=<E>&x=1"),
    ("müller@bücher.de иван@почта.рф νίκος@σελίδα.gr", "<E> <E> <E>"),
    ("联系abc@qq.com谢谢", "联系<E>谢谢"),
    ("x@163.com", "<E>"),
    ("a@xn--bcher-kva.xn--p1ai", "<E>"),
    ("root@[93.184.216.34]", "<E>"),
    ("https://user:pw@host.org/x", "https://user:<E>/x"),
    ("a@b.org@c.org", "<E>"),
    ("follow @ann@mastodon.social", "follow @<E>"),
    ("a@b.org-c@d.org", "a@<E>"),
    ("connect to 93.184.216.34:8080", "connect to <4>:8080"),
    ("http://93.184.216.34/x 93.184.216.0/24", "http://<4>/x <4>/24"),
    ("<td>93.184.216.34</td>, 93.184.216.34.", "<td><4></td>, <4>."),
    ("93.184.216.34-93.184.216.40", "<4>-<4>"),
    ("root@93.184.216.34", "root@<4>"),
    ("::ffff:93.184.216.34", "::ffff:<4>"),
    ("地址93.184.216.34。", "地址<4>。"),
    ("100.63.255.255 100.128.0.0 223.255.255.255", "<4> <4> <4>"),
    ("2001:4860:4860::8888: the server", "<6>: the server"),
    ("[2607:F8B0:4005:805::200E]:443", "[<6>]:443"),
    ("2a00:1450:4001:0810:0000:0000:0000:200e", "<6>"),
    ("2002:5db8:d822::1.2.3.4", "<6>"),
    ("+49 30 1234567, +33 6 12 34 56 78; +44 (0)20 7946 0958", "<P>, <P>; <P>"),
    ("+4930123456789", "<P>"),
    ("+1 (415) 555-2671 or +14155552671", "<P> or <P>"),
    ("(415) 555-2671, 415-555-2671, 415.555.2671, 1-415-555-2671", "<P>, <P>, <P>, <P>"),
    ("key AKIAQWERTYUIOPASDFGH here", "key <S> here"),
    ("ghp_" + "a1B2" * 9, "<S>"),
    ("github_pat_" + "a1B2_" * 10, "<S>"),
    ("xoxb-123456789012-abcdefABCDEF", "<S>"),
    (
        "https://hooks.slack.com/services/T0123ABCD/B0123ABCD/abcdefghij0123456789ABCD",
        "https://hooks.slack.com/services/<S>",
    ),
    ("sk-" + "a1B2c" * 4 + "T3BlbkFJ" + "d3E4f" * 4, "<S>"),
    ("AIza" + "Sy0_-" * 7, "<S>"),
    ("GOCSPX-" + "a1B2" * 7, "<S>"),
    (f"Authorization: Bearer {JWT}", "Authorization: Bearer <S>"),
    (f"before\n{PEM}\nbehind", "before\n<S>\nbehind"),
    ('password = "hunter22x!"', 'password = "<S>"'),
    ("'db_passwd': 'xK3!mmq7pL'", "'db_passwd': '<S>'"),
    ('API_KEY: str = "9fK2mQ8xLr7TzB4nWc6V"', 'API_KEY: str = "<S>"'),
    ('clientSecret => "9fK2mQ8xLr7TzB4nWc6V"', 'clientSecret => "<S>"'),
    ('token := "9fK2mQ8xLr7TzB4nWc6V"', 'token := "<S>"'),
    ("aws_secret_access_key = " + "wJalrXUtnFEMI/K7MDENG+bPxRfiCYzZ" + "q1W2e3R4", "aws_secret_access_key = <S>"),
]
LEFT = [
    # e-mail
    "ann@example.com x@mail.example.org bob@host.invalid me@localhost",
    "git clone git@github.com:owner/repo.git",
    "lodash@4.17.x, react@18.2.0-beta.rc, icon@2x.png",
    "user at host dot com, a @ b.org, @decorator.name, foo@bar, a@b.c, foo.@bar.org, " + "x" * 70 + "@y.org",
    "@media screen @import 'x.css'",
    # IPv4
    "10.1.20.3 127.0.0.1 192.168.1.10 172.16.99.1 169.254.10.1 100.64.10.1 198.18.20.1 0.10.20.30",
    "192.0.2.77 198.51.100.20 203.0.113.9 224.0.0.251 239.255.255.250 255.255.255.0",
    "version 11.20.3.4, Version: 11.20.3.4, v11.20.3.4, ver. 11.20.3.4, release 11.20.3.4, firmware 11.20.3.4",
    "Section 11.20.3.4, see §11.20.3.4 and Table 11.20.3.4",
    "1.2.3.4 8.8.8.8 1.1.1.1",
    "11.20.3.4.5 1.11.20.3.4 256.11.20.3 11.20.3.04 011.20.3.4 1111.20.3.4 11.20.3",
    "Chrome/11.20.3.4 lib-11.20.3.4.tar.gz lib_11.20.3.4 11.20.3.4-rc1 11.20.3.4a 11.20.3.4.v3",
    "pkg==11.20.3.4 pkg>=11.20.3.4 '~> 11.20.3.4' ^11.20.3.4",
    # IPv6
    "::1 fe80::1 fc00::1 fd12:3456::1 ff02::1 2001:db8::1 2001:db8:0:1::2 3fff::1 2600:: 2a00:1450::/32",
    "std::vector std2001::ab 2001:dg8::1 12:30:45 2021:12:05 2001:1:2:3:4:5:6:7:8:9 x2001:4860::1",
    # phone
    "+12345678 +1 0 0 1 1 0 0 1 0 x+4930123456789 2+49 30 1234567 +1.5 +100",
    "123-456-7890 415-555-26711 1415-555-2671 2020-10-1234 978-3-16-148410-0 4155552671 192.168.100.1000",
    "+49 1 2 3 4 5 6 7 8 9",
    # secrets
    "AKIAIOSFODNN7EXAMPLE AKIA1234 xAKIAQWERTYUIOPASDFGH ghp_short eyJhbGciOiJIUzI1NiJ9",
    "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
    "-----BEGIN PUBLIC KEY-----\n" + "MIIBIjANBgkq\n" * 8 + "-----END PUBLIC KEY-----",
    'password = "changeme123" password = "your_password1" password = "${DB_PASS1}" password = "<password1>"',
    'password = "xxxxxxxx1" password = "short1" password = "correcthorse" password = "with a space 1"',
    'password = "aaaaaaaa1" token = "abcabcabc123123" password = os.environ["DB_PASSWORD_1"]',
    'tokenizer = "9fK2mQ8xLr7TzB4nWc6V" author = "9fK2mQ8xLr7TzB4nWc6V" name = "9fK2mQ8xLr7TzB4nWc6V"',
    'token_url = "https://host.org/v1/abc9fK2mQ8x" pwd = "/home/ann1/project" secret_file = "conf/secret-2021.json"',
    "PASSWORD=hunter22x!",
    'if path == "api/token":\n    result = "9fK2mQ8xLr7TzB4nWc6V"',
]


def batch(texts, kind=None):
    columns = [pa.array([f"d{n}" for n in range(len(texts))]), pa.array(texts, kind or pa.string())]
    return pa.RecordBatch.from_arrays([*columns, pa.array(["s"] * len(texts))], names=["id", "text", "source"])


def run(stage, texts):
    tally = Tally("mask")
    return stage(batch(texts), tally).column("text").to_pylist(), tally.counts


def slowly(stage, text):
    """The same by definition: every kind looked for, again and again."""
    while True:
        before = text
        for kind in MASKERS:
            text, _ = MASKERS[kind](text, stage.replacements[kind])
        if text == before:
            return text


@pytest.mark.parametrize(("text", "expected"), MASKED)
def test_masked(text, expected):
    assert run(MaskStage(SHORT), [text])[0] == [expected]
    surrounded = f"Liebe Grüße: {text}\nend"
    assert run(MaskStage(SHORT), [surrounded])[0] == [f"Liebe Grüße: {expected}\nend"]


@pytest.mark.parametrize("text", LEFT)
def test_left(text):
    assert run(MaskStage(SHORT), [text]) == ([text], {})


def test_defaults_counts_and_untouched_documents():
    stage = build({}, "recipe")
    texts = ["ann@site.org and bob@site.org", "nothing", "93.184.216.34 2001:4860:4860::8888", "+49 30 1234567 " + JWT]
    new, counts = run(stage, texts)
    assert new == ["email@example.com and email@example.com", texts[1], "192.0.2.1 2001:db8::1", texts[3]]
    assert counts == {"masked.email": 2, "masked.ipv4": 1, "masked.ipv6": 1, "masked.documents": 2}
    assert run(stage, new) == (new, {})
    masked = build(ALL, "recipe")
    assert run(masked, [texts[3]]) == (
        ["555-0100 <SECRET>"],
        {"masked.phone": 1, "masked.secret": 1, "masked.documents": 1},
    )


def test_a_batch_without_hits_is_handed_on_as_it_is():
    documents = batch(["no hit", "at 5 p.m. @ home, 1.5, 12:30"])
    assert build(ALL, "recipe")(documents, Tally("mask")) is documents
    assert build({}, "recipe")(batch([]), Tally("mask")).num_rows == 0


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_slices_types_and_other_columns_stay(kind):
    whole = batch(["x@y.org"] * 3 + ["plain", "ann@site.org", "плоский"], kind)
    out = build({}, "recipe")(whole.slice(3, 3), Tally("mask"))
    assert out.schema == whole.schema
    assert out.column("text").to_pylist() == ["plain", "email@example.com", "плоский"]
    assert out.column("id").to_pylist() == ["d3", "d4", "d5"]


PIECES = [
    "a",
    "Z9",
    "é",
    "я",
    "谢",
    "@",
    "@@",
    ".",
    "..",
    ":",
    "::",
    "-",
    "_",
    "+",
    "%",
    " ",
    "\n",
    "/",
    '"',
    "'",
    "=",
    "=>",
]
PIECES += [
    "org",
    "example.com",
    "8",
    "93.184.216.34",
    "11.20",
    "2001:4860",
    "2001:db8::1",
    "email@example.com",
    "v",
    "415-555-2671",
]
PIECES += [
    "(415)",
    "+49",
    "30 1234",
    "password",
    "api_key",
    "token",
    "hunter22x!",
    "9fK2mQ8xLr7TzB4nWc6V",
    "<SECRET>",
    "sk-",
    "ghp_",
]
PIECES += [
    "secret_access_key",
    "wJalrXUtnFEMI/K7MDENG+bPxRfiCYzZq1W2e3R4",
    "AKIAQWERTYUIOPASDFGH",
    JWT,
    PEM,
    "`",
    "https://",
    ">",
    "\x1c",
]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
@example('a@b.com.c@d.com"')
def test_kernel_misses_nothing_and_masking_twice_is_masking_once(text):
    for stage in (build(ALL, "recipe"), MaskStage(SHORT), MaskStage(dict.fromkeys(SHORT, "x"))):
        once = run(stage, [text])[0] if text else [text]
        assert once == [slowly(stage, text)]
        assert run(stage, once) == (once, {})


def test_the_slow_way_agrees_on_long_texts_with_things_planted():
    rng = random.Random(1)
    texts = [prose(number, 500) for number in range(len(MASKED) + 20)]
    for number, (planted, _) in enumerate(MASKED):
        at = rng.randrange(len(texts[number]))
        texts[number] = f"{texts[number][:at]} {planted} {texts[number][at:]}"
    stage = build(ALL, "recipe")
    new, counts = run(stage, texts)
    assert new == [slowly(stage, text) for text in texts]
    assert counts["masked.documents"] >= len(MASKED)


def test_hints_only_for_the_wanted_kinds():
    texts = pa.array(["ann@site.org 93.184.216.34", "2001:4860::1", "plain"])
    kinds = masking_kernel.IPV4 | masking_kernel.IPV6
    assert masking_kernel.find_hints(texts, kinds).tolist() == [masking_kernel.IPV4, masking_kernel.IPV6, 0]


def test_settings_are_checked():
    for section, message in [
        ({"emails": True}, "did you mean 'email'"),
        ({"email": "yes"}, "email"),
        ({"email": False, "ip": False}, "nothing to mask"),
        ({"email_replacement": ""}, "email_replacement"),
        ({"email_replacement": "me@site.org!"}, "would itself be masked"),
        ({"email_replacement": "see 93.184.216.34"}, "would itself be masked, as 'see 192.0.2.1'"),
    ]:
        with pytest.raises(UserError, match=message.replace(".", r"\.")):
            build(section, "recipe.yaml: mask")
    # equal to what is put in: stable, so allowed
    assert run(build({"email_replacement": "me@site.org"}, "x"), ["ann@site.org"])[0] == ["me@site.org"]


def test_description_and_pickle():
    stage = build({"secrets": True, "email_replacement": "<EMAIL>"}, "recipe")
    assert pickle.loads(pickle.dumps(stage)) == stage
    assert stage.describe()["replacements"]["email"] == "<EMAIL>"
    assert stage.describe() != build({}, "recipe").describe()
    assert json.dumps(stage.describe())


def test_entropy():
    assert entropy("aaaa") == 0
    assert entropy("abab") == 1
    assert entropy("abcdefgh") == 3
