"""Class lists: what can be named, and the sentences that CLIP reads the names in.

A class list is a dataset's own, or a text file with one class a line. Opens no image and no label.
"""

from __future__ import annotations

import functools
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import clip
from datasets import DATASETS, IGNORE
from toyland.world import TEMPLATES as TOYLAND_TEMPLATES

# The 85 sentences that MaskCLIP and ReCLIP average for a class's query (OpenAI's 80 for ImageNet and five more).
QUERY_TEMPLATES = Path(__file__).with_name("templates.txt").read_text(encoding="utf-8").splitlines()


@dataclass(frozen=True)
class Vocabulary:
    """What can be named: for each class its names (the first is shown, all are averaged) and its colour."""
    synonyms: tuple[tuple[str, ...], ...]
    palette: tuple[tuple[int, int, int], ...]
    templates: tuple[str, ...]

    @property
    def names(self) -> list[str]:
        return [names[0] for names in self.synonyms]

    def __len__(self) -> int:
        return len(self.synonyms)


def vocabulary(data: str, classes_file: str | None = None) -> Vocabulary:
    """The classes of a dataset, or those of `classes_file` in its place. Raises ValueError, FileNotFoundError."""
    if classes_file is not None:
        return vocabulary_of(data, read_classes(Path(classes_file)))
    if data in DATASETS:
        return vocabulary_of(data, tuple((name,) for name in DATASETS[data].names))
    raise ValueError(f"--data {data}: expected {', '.join(DATASETS)}, or a folder of your own images together with --classes "
                     "FILE, a text file with one class name a line (synonyms after commas); found no --classes.")


def vocabulary_of(data: str, synonyms: tuple[tuple[str, ...], ...]) -> Vocabulary:
    """Names with colours and query templates. A dataset's own classes keep its official colours."""
    palette = distinct_colours(len(synonyms))
    if data in DATASETS and [first for first, *_ in synonyms] == DATASETS[data].names:
        palette = DATASETS[data].palette
    return Vocabulary(synonyms, tuple(palette), tuple(TOYLAND_TEMPLATES if data == "toyland" else QUERY_TEMPLATES))


def read_classes(path: Path) -> tuple[tuple[str, ...], ...]:
    """A text file with one class a line, synonyms after commas. Empty lines and lines from # on are passed over."""
    if not path.is_file():
        raise FileNotFoundError(f"--classes {path}: expected a text file with one class name a line, found no such file.")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--classes {path}: expected a UTF-8 text file, found other bytes ({error.reason}). "
                         "Save it as UTF-8.") from error
    return parse_classes([line for line in lines if line.strip() and not line.lstrip().startswith("#")],
                         source=f"--classes {path}")


def parse_classes(lines: list[str], source: str) -> tuple[tuple[str, ...], ...]:
    """Lines of comma-separated synonyms → names per class. Raises ValueError unless there are 2 to 255 different ones."""
    synonyms = tuple(tuple(name for name in (part.strip() for part in line.split(",")) if name) for line in lines)
    if len(synonyms) < 2:
        raise ValueError(f"{source}: expected at least two classes, found {len(synonyms)}. A class is told from the others: "
                         "with one there is nothing to decide. Add what else is in the images (wall, grass, sky, …).")
    if len(synonyms) > IGNORE:
        raise ValueError(f"{source}: expected at most {IGNORE} classes (a label picture has 256 values), found {len(synonyms)}.")
    seen: dict[tuple[int, ...], tuple[str, int]] = {}       # by what CLIP reads: letter case and extra spaces are nothing
    for number, names in enumerate(synonyms, start=1):
        if not names:
            raise ValueError(f"{source}: expected a name for class {number}, found only commas. Name it or remove the line.")
        for name in names:
            tokens = tokens_of_name(name, source)
            if tokens in seen:
                other, where = seen[tokens]
                same = "" if other.lower() == name.lower() else f": to CLIP it is the same as {other!r}"
                raise ValueError(f"{source}: expected every name once, found {name!r} at class {where} and at class {number}"
                                 f"{same}. Remove one of them.")
            seen[tokens] = name, number
    return synonyms


def tokens_of_name(name: str, source: str) -> tuple[int, ...]:
    """CLIP's tokens of a class name. Raises ValueError for one that cannot be said inside CLIP's 77 tokens."""
    room = 77 - 2 - longest_template()
    if any(unicodedata.category(letter) == "Cc" for letter in name) or "<|" in name:
        raise ValueError(f"{source}: expected names in plain words, found {name[:80]!r} with control characters or one of CLIP's "
                         "own marks in it.")
    tokens = tuple(clip.encode(name)) if len(name) <= 500 else None             # the tokenizer is slow with endless words
    if tokens is None or len(tokens) > room:
        found = f"{len(name)} characters" if tokens is None else len(tokens)
        raise ValueError(f"{source}: expected class names of at most {room} tokens, which fit into CLIP's 77 with a sentence "
                         f"around them; found {found} in {name[:80]!r}. Shorten it.")
    if not tokens:
        raise ValueError(f"{source}: expected names that can be read, found {name!r} without a readable character.")
    return tokens


@functools.cache
def longest_template() -> int:
    """How many tokens the longest of the query's sentences has without a name."""
    return max(len(clip.encode(template)) for template in QUERY_TEMPLATES) - 1


def distinct_colours(count: int) -> list[tuple[int, int, int]]:
    """Colours for a user's own classes: hues by the golden angle, in three shades."""
    import colorsys
    return [tuple(round(255 * value) for value in colorsys.hsv_to_rgb(i * 0.618 % 1, (0.85, 0.55, 0.95)[i % 3],
                                                                       (0.95, 0.85, 0.6)[i // 2 % 3]))
            for i in range(count)]


