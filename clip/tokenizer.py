"""The byte-pair tokenizer of CLIP: text → token ids.

Lower-cased text is cut into words, digits and runs of punctuation. Each is spelled in 256 printable stand-ins
for its bytes, so that any text of any language has a spelling. Then pairs of neighbours are merged, again and
again, first the pair that was merged first when the vocabulary was made. `bpe_simple_vocab_16e6.txt.gz` holds
OpenAI's merges (MIT, see NOTICE.md).
"""

from __future__ import annotations

import gzip
import html
from functools import lru_cache
from pathlib import Path

import ftfy
import regex
import torch

CONTEXT_LENGTH = 77
MERGES = 49152 - 256 - 2            # of the file's many merges CLIP uses as many as fill its vocabulary
VOCABULARY = 49408                  # tokens in all
START, END = 49406, 49407           # the two special tokens stand at the end of the vocabulary
SPECIAL = {"<|startoftext|>": START, "<|endoftext|>": END}

WORDS = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE)


@lru_cache
def byte_letters() -> dict[int, str]:
    """A visible character for each of the 256 bytes: itself where it prints, else the next from 256 on."""
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printing}
    hidden = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


@lru_cache
def vocabulary() -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """`(ids, ranks)`: the id of each token, and for each mergeable pair how early it was merged."""
    file = Path(__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    pairs = [tuple(line.split()) for line in lines[1:1 + MERGES]]            # line 0 is a version note
    # The order of the ids: bytes (printing ones first), bytes at the end of a word, results of the merges.
    letters = list(byte_letters().values())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in pairs]
    return ({token: i for i, token in enumerate(tokens)} | SPECIAL,
            {pair: rank for rank, pair in enumerate(pairs)})


@lru_cache(maxsize=65536)
def merge(word: str) -> tuple[str, ...]:
    """The tokens of a word spelled in byte letters: the earliest known pair is merged until there is none."""
    _, ranks = vocabulary()
    parts = [*word[:-1], word[-1] + "</w>"]
    while len(parts) > 1:
        best = min(zip(parts, parts[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged, i = [], 0
        while i < len(parts):
            if tuple(parts[i:i + 2]) == best:
                merged.append(parts[i] + parts[i + 1])
                i += 2
            else:
                merged.append(parts[i])
                i += 1
        parts = merged
    return tuple(parts)


def encode(text: str) -> list[int]:
    """Token ids of a text, of any length, without start and end token."""
    ids, _ = vocabulary()
    text = html.unescape(html.unescape(ftfy.fix_text(text)))    # captions from the web are escaped twice
    text = " ".join(text.split()).lower()
    found = []
    for word in WORDS.findall(text):
        if word in SPECIAL:
            found.append(SPECIAL[word])
        else:
            spelled = "".join(byte_letters()[byte] for byte in word.encode("utf-8"))
            found.extend(ids[token] for token in merge(spelled))
    return found


def tokenize(texts: str | list[str], context_length: int = CONTEXT_LENGTH,
             truncate: bool = False) -> torch.Tensor:
    """Token ids of one text or of a list, framed by start and end token: (N, context_length), zeros behind.

    Raises ValueError for a text that is too long, and names it. With `truncate=True` it is cut instead and
    keeps its end token, where CLIP reads the sentence.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    result = torch.zeros(len(texts), context_length, dtype=torch.int)
    for row, text in zip(result, texts):
        ids = [START, *encode(text), END]
        if len(ids) > context_length:
            if not truncate:
                raise ValueError(
                    f"tokenize: a text should fit in {context_length} tokens, start and end included; found "
                    f"{len(ids)} in {text[:200]!r}. Shorten it, or pass truncate=True to cut it.")
            ids = ids[:context_length - 1] + [END]
        row[:len(ids)] = torch.tensor(ids)
    return result
