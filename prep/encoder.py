"""Text to token ids: `fastokens` where it gives exactly the ids of `tokenizers`, else `tokenizers`.

`fastokens` is some fifty times faster; `tokenizers` is the reference. At start both encode a list of nasty strings and
the first documents of the run; on any difference the run uses `tokenizers`, and says so.

Text never turns into control tokens: a literal `<|endoftext|>` in a document is encoded like any other text. No token
is added by the tokenizer's post-processor, and its truncation and padding settings are ignored.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from prep.fast import load_fast_encoder
from shards.errors import UserError, unknown_name

# What ends a document in tokenizers that are in use; what ends a turn of a chat serves where nothing else is there.
DOCUMENT_ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<EOS>",
    "<｜end▁of▁sentence｜>",
)
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")

Encode = Callable[[list[str]], tuple[np.ndarray, np.ndarray]]
FALLBACK_BATCH = 1 << 20
SAMPLE_DOCUMENTS, SAMPLE_CHARACTERS, SAMPLE_DOCUMENT = 64, 128 << 10, 16 << 10

NASTY = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t\t \n\n\n",
    " \u00a0\u2003\u3000 ",
    "\x00",
    "a\x00b",
    "\x01\x07\x1b[0m\x7f\x85",
    "\ufeffa",
    "line\r\nline\rline\n\n\n    indented\n\tdef f(x):\n\t\treturn x  # comment   \n",
    "a" * 5_000,
    "ab" * 2_000,
    " " * 3_000,
    "\n" * 1_000,
    "!?" * 500,
    "0123456789" * 50,
    "9" * 1_001,
    "I'm we've they'll he'd it's isn't I'M WE'VE 'tis 'Twas don’t",
    "1 12 123 1234 12345 3.14159 1,000,000 0x1F 1e-5 ½ ² ٣ ४ Ⅻ 𝟘",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪🇫🇷 ☺️ 🫠 \u200d \ufe0f",
    "e\u0301 é n\u0303 Å A\u030a ﬁ ẛ̣ Z̷͕̀a̸l̵g̶o̷ 각 \u1100\u1161\u11a8",
    "日本語のテキスト、全角　空白。中文分词测试！한국어 텍스트 ｶﾀｶﾅ ＡＢＣ１２３",
    "مرحبا بالعالم שלום עולם \u202eabc\u202c \u200f\u200e नमस्ते ไทยไม่มีช่องว่าง",
    "Ünïcödé ǅ ß ẞ İ ı ſ Σς ΑΒΓ Ёж 𝔘𝔫𝔦 \U0010ffff \ue000 \ufffd \ufffe \uffff \ud7ff",
    r"\ud800 \u0000 \n %00 &#0; <0x0A> <0xFF> <unk> <s> </s> <pad> [CLS] [MASK] ▁ Ġ Ċ ĉ Ã©",
    "<|endoftext|><|im_start|>user\n<|im_end|> <| endoftext |> <|endoftext| |>",
    "__init__ snake_case camelCase SCREAMING_CASE a.b.c(d)[e]{f} x+=1;y-->z; // ## ** ~~ `` == != <= >= && || ::",
    "https://example.com/a?b=c&d=%20e#f user@example.com C:\\Users\\x ../../etc",
]


class Encoder:
    """A tokenizer as a run uses it.

    Args:
        tokenizer_json: content of a `tokenizer.json`.
        where: its name in error messages.
        sample: gives the first documents, for the check; called while the vocabulary loads.

    Attributes:
        backend: "fastokens VERSION" or "tokenizers VERSION".
        notice: why `fastokens` is not used, or None.
        vocab_size: largest id + 1.
        special_tokens: literal text of each control token -> id.

    Raises:
        UserError: not a tokenizer.
    """

    def __init__(self, tokenizer_json: bytes, where: str, sample: Callable[[], Sequence[str]] = tuple) -> None:
        import tokenizers

        loading = load_fast_encoder(tokenizer_json)
        try:
            self._reference: Any = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # tokenizers raises bare Exceptions
            raise UserError(f"{where}: not a tokenizer.json that `tokenizers` can load: {error}") from None
        documents = sample()
        self._reference.encode_special_tokens = True
        self._reference.no_truncation()
        self._reference.no_padding()
        added = self._reference.get_added_tokens_decoder()
        self.special_tokens: dict[str, int] = {
            token.content: number for number, token in added.items() if token.special
        }
        self.vocab_size = max(self._reference.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._any_special = "|".join(map(re.escape, sorted(self.special_tokens, key=len, reverse=True)))
        self.encode: Encode = self._encode_reference
        self.backend = f"tokenizers {tokenizers.__version__}"
        self.notice: str | None = None
        try:
            fast = loading.result()
            difference = self.compare(fast.encode, documents)
        except Exception as error:
            difference = f"it cannot use this tokenizer ({error})"
        if difference:
            self.notice = (
                f"fastokens is not used: {difference}; `tokenizers` does the work, at a small part of the speed"
            )
        else:
            self.encode, self.backend = fast.encode, fast.backend

    def compare(self, encode: Encode, sample: Sequence[str]) -> str | None:
        """Where another encoder first differs from `tokenizers` on the nasty strings and the sample; None: nowhere."""
        texts = [*NASTY, *self._nasty_specials(), *_bounded(sample)]
        ids, offsets = encode(texts)
        expected, expected_offsets = self._encode_reference(texts)
        if np.array_equal(ids, expected) and np.array_equal(offsets, expected_offsets):
            return None
        for index, text in enumerate(texts):
            got = ids[offsets[index] : offsets[index + 1]]
            if not np.array_equal(got, expected[expected_offsets[index] : expected_offsets[index + 1]]):
                return f"it differs from `tokenizers` on {text[:40]!r}"
        return "it differs from `tokenizers` in the number of documents"

    def count_specials(self, texts: pa.Array) -> Counter[str]:
        """How often each control token stands in documents as literal text."""
        if not self._any_special:
            return Counter()
        hits = texts.filter(pc.match_substring_regex(texts, self._any_special))
        return Counter(found for text in hits.to_pylist() for found in re.findall(self._any_special, text))

    def _encode_reference(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """`tokenizers` by pieces: its encodings are large objects."""
        ids: list[np.ndarray] = []
        offsets = np.zeros(len(texts) + 1, np.int64)
        start = 0
        while start < len(texts):
            stop, size = start, 0
            while stop < len(texts) and (stop == start or size + len(texts[stop]) <= FALLBACK_BATCH):
                size += len(texts[stop])
                stop += 1
            for index, encoding in enumerate(
                self._reference.encode_batch_fast(texts[start:stop], add_special_tokens=False), start
            ):
                ids.append(np.array(encoding.ids, np.uint32))
                offsets[index + 1] = offsets[index] + len(ids[-1])
            start = stop
        return (np.concatenate(ids) if ids else np.zeros(0, np.uint32)), offsets

    def _nasty_specials(self) -> list[str]:
        """The tokenizer's own control tokens as literal text, glued to others and cut short."""
        names = list(self.special_tokens)
        names = names[:8] + names[8:][-2:]
        return [text for name in names for text in (name, f"a{name}b", f" {name} \n{name}{name}", name[:-1], name[1:])]


def end_of_document(special_tokens: dict[str, int], eos: str | None, path: Path) -> int:
    """The id that is put behind each document: the one named, else the one that the tokenizer's files tell.

    Looks for `eos_token` in the `tokenizer_config.json` beside the tokenizer, then for the one well-known name.

    Raises:
        UserError: no such token, none that is well known, or several; lists the control tokens.
    """
    if eos is not None:
        return control_token(special_tokens, eos, "--eos")
    config = path.with_name(path.name.replace("tokenizer.json", "tokenizer_config.json"))
    if config != path and config.is_file():
        try:
            named = orjson.loads(config.read_bytes()).get("eos_token")
        except (orjson.JSONDecodeError, AttributeError):
            raise UserError(
                f"{config}: not a valid tokenizer_config.json; mend it, or name the token with --eos"
            ) from None
        named = named.get("content") if isinstance(named, dict) else named
        if named in special_tokens:
            return special_tokens[named]
    for names in (DOCUMENT_ENDS, TURN_ENDS):
        known = [name for name in names if name in special_tokens]
        if len(known) == 1:
            return special_tokens[known[0]]
        if known:
            raise UserError(f"{path}: {' and '.join(known)} may each end a document; name one with --eos")
    listed = ", ".join(list(special_tokens)[:20]) or "none"
    raise UserError(f"{path}: no well-known token that ends a document; name one with --eos (control tokens: {listed})")


def control_token(special_tokens: dict[str, int], name: str, option: str) -> int:
    """The id of a control token named by the user."""
    if name in special_tokens:
        return special_tokens[name]
    raise UserError(f"{option}: {unknown_name('control token', name, special_tokens)}")


def _bounded(sample: Sequence[str]) -> list[str]:
    """A part of the sample that `tokenizers` encodes in a moment."""
    texts: list[str] = []
    left = SAMPLE_CHARACTERS
    for text in sample[:SAMPLE_DOCUMENTS]:
        texts.append(text[: min(SAMPLE_DOCUMENT, left)])
        left -= len(texts[-1])
        if left <= 0:
            break
    return texts
