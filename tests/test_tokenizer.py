"""clip/tokenizer.py against open_clip's tokenizer, on ten thousand strings as odd as captions from the web.

    python -m pytest tests/test_tokenizer.py
"""

import hashlib
import html
import random
import re
from pathlib import Path

import ftfy
import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clip
from clip.tokenizer import byte_letters, vocabulary

START, END = 49406, 49407


# --------------------------------------------------------------------------------------------- odd strings

SCRIPTS = {                                                                        # first and last code point
    "Latin": (0x00C0, 0x024F), "Greek": (0x0370, 0x03FF), "Cyrillic": (0x0400, 0x04FF),
    "Hebrew": (0x05D0, 0x05EA), "Arabic": (0x0600, 0x06FF), "Devanagari": (0x0900, 0x097F),
    "Thai": (0x0E00, 0x0E5B), "Georgian": (0x10A0, 0x10FF), "Hangul": (0xAC00, 0xD7A3),
    "Kana": (0x3040, 0x30FF), "Han": (0x4E00, 0x9FFF), "combining": (0x0300, 0x036F),
    "punctuation": (0x2000, 0x206F), "symbols": (0x2190, 0x27BF), "emoji": (0x1F300, 0x1FAFF),
    "full width": (0xFF01, 0xFF5E), "ligatures": (0xFB00, 0xFB06), "numbers": (0x2150, 0x218B),
    "mathematics": (0x1D400, 0x1D7FF), "tags": (0xE0000, 0xE007F), "control": (0x0000, 0x001F),
    "C1": (0x0080, 0x00A0)}
WORDS = ("a photo of the cat dog person skyscraper conveyor tvmonitor Photograph IMG_2041.JPG DSC00012 don't "
         "I'm they're we'll he'd 'S 'LL it’s naïve Straße İstanbul ſtraße ΣΊΣΥΦΟΣ ﬁne 42 3.14 1,000 ½ x² № "
         "👩‍🚀 🇩🇪 ❤️ ... ?! -- // #hashtag @user http://a.b/c?d=e&f=g <b>bold</b> "
         "aaaaaaaaaaaaaaaaaaaa").split()
ENTITIES = ["&amp;", "&lt;", "&gt;", "&quot;", "&#39;", "&nbsp;", "&eacute;", "&#x1F600;", "&amp;amp;",
            "&amp;lt;br&amp;gt;", "&amp;#39;", "&amp;amp;amp;", "&notanentity;", "&", "&#0;", "&#xD800;",
            "&#1114112;"]
SPECIALS = ["<|startoftext|>", "<|endoftext|>", "<|EndOfText|>", "<|endoftext|", "<|endofteXt|>s",
            "<|ſtartoftext|>",
            "!<|endoftext|>!", "<start_of_text>", "<end_of_text>"]
SPACES = [" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u200b", "\x1c", "\x85", ""]


def from_script(r: random.Random) -> str:
    first, last = r.choice(list(SCRIPTS.values()))
    return "".join(chr(r.randint(first, last)) for _ in range(r.randint(1, 8)))


def mojibake(r: random.Random) -> str:
    """UTF-8 read as if it were another encoding, once or twice: what ftfy is there to mend."""
    text = r.choice(["naïve café", "schön", "“quoted”", "it’s", "日本語", "Привет", from_script(r)])
    for _ in range(r.randint(1, 2)):
        encoding = r.choice(["latin-1", "cp1252", "cp437", "macroman"])
        text = text.encode("utf-8", "replace").decode(encoding, "replace")
    return text


def odd_string(r: random.Random) -> str:
    """Pieces of all kinds, glued with all kinds of spaces or none; one in fifty is far too long for CLIP."""
    kinds = [lambda: r.choice(WORDS), lambda: r.choice(WORDS), lambda: r.choice(ENTITIES),
             lambda: from_script(r), lambda: mojibake(r), lambda: r.choice(SPECIALS),
             lambda: str(r.randrange(10 ** r.randint(1, 12))),
             lambda: "".join(r.choice("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") for _ in range(r.randint(1, 6))),
             lambda: "".join(r.choice("abcdefghijklmnopqrstuvwxyzABCXYZ") for _ in range(r.randint(1, 12)))]
    count = r.randint(60, 150) if r.random() < 0.02 else r.randint(1, 7)
    return "".join(r.choice(kinds)() + r.choice(SPACES) for _ in range(count))


def odd_strings(count: int) -> list[str]:
    r = random.Random(0)
    return ["", " ", *(odd_string(r) for _ in range(count - 2))]


# --------------------------------------------------------------------------------------------- the comparison

def reference_tokenizer():
    """open_clip's tokenizer with the two special tokens spelled as OpenAI's package spells them."""
    open_clip = pytest.importorskip("open_clip")
    tokenizer = open_clip.tokenizer.SimpleTokenizer()
    pattern = tokenizer.pat.pattern
    for theirs, openai in (("<start_of_text>", "<|startoftext|>"), ("<end_of_text>", "<|endoftext|>")):
        assert theirs in pattern
        pattern = pattern.replace(theirs, re.escape(openai))
        tokenizer.encoder[openai] = tokenizer.encoder[theirs]
        tokenizer.cache[openai] = openai
    tokenizer.pat = regex.compile(pattern, regex.IGNORECASE)
    return tokenizer


@pytest.mark.slow
def test_ten_thousand_strings_equal_open_clip():
    """encode and tokenize give open_clip's ids for every string, cut where it cuts."""
    reference, texts = reference_tokenizer(), odd_strings(10_000)
    assert len(set(texts)) > 9_500
    expected = [reference.encode(text) for text in texts]
    for text, ids in zip(texts, expected):
        assert clip.encode(text) == ids, repr(text)
    assert sum(len(ids) > 75 for ids in expected) > 150                          # the cut is really exercised
    assert torch.equal(clip.tokenize(texts[:2000], truncate=True).long(), reference(texts[:2000]))


def test_known_ids():
    """Three sentences whose ids are known from OpenAI's own package: right also without open_clip."""
    assert clip.encode("hello world!") == [3306, 1002, 256]
    assert clip.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]
    row = clip.tokenize("a diagram")[0].tolist()
    assert row == [START, 320, 22697, END] + [0] * 73


def test_clean_up_comes_first():
    """Mojibake is mended, entities are unescaped twice, white space and case do not matter."""
    plain = clip.encode("naïve < cat")
    assert plain == clip.encode("  NAÏVE \n <\tCat ") == clip.encode("naïve &amp;lt; cat")
    # ftfy unescapes too, but not beside a "<", so that this one takes both rounds of ours.
    assert clip.encode("<br> &amp;lt; cat") == clip.encode("<br> < cat")
    assert plain == clip.encode("naïve < cat".encode().decode("latin-1"))
    assert plain != clip.encode("naive < cat")


def test_special_tokens_in_a_text():
    """The literals of the special tokens become these tokens; almost-literals are ordinary punctuation."""
    assert clip.encode("a <|startoftext|> b <|ENDOFTEXT|>") == [320, START, 321, END]
    assert END not in clip.encode("a <|end of text|>") and END not in clip.encode("<end_of_text>")


def test_shapes():
    """One text or a list gives (N, 77) integers with zeros behind the end; another length is possible."""
    assert clip.tokenize("cat").shape == (1, 77)
    assert clip.tokenize([]).shape == (0, 77)
    tokens = clip.tokenize(["", "cat", "a photo of a cat"], context_length=9)
    assert tokens.shape == (3, 9) and not tokens.is_floating_point()
    assert tokens[0].tolist() == [START, END] + [0] * 7
    assert tokens[2, 6:].tolist() == [END, 0, 0]


def test_too_long_a_text_is_named():
    """75 tokens fit; 76 raise a ValueError that quotes the text and says what to do."""
    assert clip.tokenize("cat " * 75)[0, -1] == END
    with pytest.raises(ValueError, match="77 tokens.*found 78.*'cat cat cat.*truncate=True"):
        clip.tokenize(["a dog", "cat " * 76])


def test_truncation_keeps_the_end():
    """truncate=True keeps the first 75 tokens and the end token, where CLIP reads; short texts stay."""
    tokens = clip.tokenize(["cat " * 76, "cat " * 1000, "a dog"], truncate=True)
    assert tokens[0].tolist() == tokens[1].tolist() == [START] + [2368] * 75 + [END]
    assert torch.equal(tokens[2:], clip.tokenize("a dog"))


# ------------------------------------------------------------------------------------------ any string at all

def decode(ids: list[int]) -> str:
    """The text of token ids, without spaces: letters back to bytes, bytes back to text."""
    tokens = {i: token for token, i in vocabulary()[0].items()}
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    letters = "".join(tokens[i].removesuffix("</w>") for i in ids)
    return bytes(byte_of[letter] for letter in letters).decode("utf-8")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=200))
def test_any_string_can_be_encoded_and_read_back(text):
    """encode accepts every string, its ids lie in the vocabulary, and nothing but spaces and case is lost."""
    ids = clip.encode(text)
    assert all(0 <= i < 49408 for i in ids)
    cleaned = html.unescape(html.unescape(ftfy.fix_text(text))).lower()
    assert decode(ids) == "".join(cleaned.split())
    tokens = clip.tokenize(text, truncate=True)[0]
    assert tokens[0] == START and (tokens == END).any()


def test_vocabulary_file():
    """The shipped vocabulary is OpenAI's, byte for byte: 49408 tokens with 256 different byte letters."""
    data = (Path(clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()
    expected = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    assert hashlib.sha256(data).hexdigest() == expected
    ids, ranks = vocabulary()
    assert len(ids) == 49408 and sorted(ids.values()) == list(range(49408)) and len(ranks) == 49408 - 2 - 512
    assert len(set(byte_letters().values())) == 256
