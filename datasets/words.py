"""Class lists: what can be named, and the sentences that CLIP reads the names in.

A class list is a dataset's own, or a text file with one class a line. Opens no image and no label.
"""

from __future__ import annotations

import functools
import html
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import clip
from datasets import DATASETS, IGNORE, is_drawn
from toyland.world import TEMPLATES as TOYLAND_TEMPLATES

# The 85 sentences that MaskCLIP and ReCLIP average for a class's query (OpenAI's 80 for ImageNet and five
# more).
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
    """The classes of a dataset, or those of `classes_file` in its place. Raises ValueError,
    FileNotFoundError."""
    if classes_file is not None:
        return vocabulary_of(data, read_classes(Path(classes_file)))
    if data in DATASETS:
        return vocabulary_of(data, tuple((name,) for name in DATASETS[data].names))
    raise ValueError(f"--data {data}: expected {', '.join(DATASETS)}, or a folder of your own images "
                     "together with --classes FILE, a text file with one class name a line (synonyms after "
                     "commas); found no --classes.")


def vocabulary_of(data: str, synonyms: tuple[tuple[str, ...], ...]) -> Vocabulary:
    """Names with colours and query templates. A dataset's own classes keep its official colours."""
    palette = distinct_colours(len(synonyms))
    if data in DATASETS and [first for first, *_ in synonyms] == DATASETS[data].names:
        palette = DATASETS[data].palette
    return Vocabulary(synonyms, tuple(palette),
                      tuple(TOYLAND_TEMPLATES if is_drawn(data) else QUERY_TEMPLATES))


def read_classes(path: Path) -> tuple[tuple[str, ...], ...]:
    """A text file with one class a line, synonyms after commas; or what other programs write
    (`class_lines`)."""
    if not path.is_file():
        raise FileNotFoundError(f"--classes {path}: expected a text file with one class name a line, found "
                                "no such file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"--classes {path}: expected a UTF-8 text file, found other bytes ({error.reason}). "
                         "Save it as UTF-8.") from error
    return parse_classes(class_lines(text, source=f"--classes {path}"), source=f"--classes {path}")


NUMBERED = re.compile(r"^(\d+)(?:\s*[:,;=.)-]\s*|\s+)(\S.*)$")
COLOURS = re.compile(r"(?:^|[:,;\s])\d{1,3}(?:[,;\s]+\d{1,3}){2}(?!\w)")       # beside a name: 128,64,0
FOREIGN = re.compile(r"[:|=<>]|\s#|#[0-9a-f]{6}", re.IGNORECASE)             # of YAML, tables, code


def class_lines(text: str, source: str) -> list[str]:
    """The class names of a file, in the order of their numbers: lines with synonyms after commas.

    Also read: JSON (a list of names or of objects with a "name", or number → name), CVAT's labelmap.txt,
    labelme's labels.txt, "0: name" on every line, YAML's "- name", semicolons between synonyms. Empty lines
    and lines from # on are passed over. Raises ValueError where numbers do not count from 0: label pictures
    would mean other classes; and for what looks like yet another syntax.
    """
    text = "".join(letter for letter in text if unicodedata.category(letter) != "Cf")      # invisible letters
    of_cvat = text.lstrip().lower().startswith("# label:color_rgb")
    if text.lstrip()[:1] in ("[", "{"):
        lines = json_names(text, source)
    else:
        lines = [line.strip() for line in text.splitlines() if line.strip()
                 and not line.lstrip().startswith("#")]
    if of_cvat:
        lines = [line.partition(":")[0] for line in lines]
    if lines and lines[0].lower().replace(" ",
                                          "").startswith(("pixelvalue,", "id,name", "index,", "number,name")):
        lines = lines[1:]                                               # the header of a table
    lines = [line.removeprefix("- ") for line in lines]
    numbered = [NUMBERED.match(line) for line in lines]
    if lines and all(numbered):
        numbers = [int(match[1]) for match in numbered]
        if numbers != list(range(len(lines))):
            raise ValueError(f"{source}: expected numbers that count from 0, as values in label pictures do, "
                             f"found {', '.join(map(str, numbers[:5]))}{', …' if len(numbers) > 5 else ''}. "
                             "Put the lines in the order of the values and take the numbers away.")
        lines = [match[2] for match in numbered]
    if "__ignore__" in lines[1:]:
        raise ValueError(f"{source}: expected __ignore__ in the first line, as labelme has it, found it at "
                         f"class {lines.index('__ignore__') + 1}. Remove it if 255 stands for it in the "
                         "labels.")
    if lines[:1] == ["__ignore__"]:                                  # labelme: its value is 255, and no class
        lines = lines[1:]
    for line in lines:
        if COLOURS.search(line) or FOREIGN.search(html.unescape(line)):
            what = "colours" if COLOURS.search(line) else "signs of another syntax"
            raise ValueError(f"{source}: expected names alone, synonyms after commas, one class a line; "
                             f"found {what} in {line[:60]!r}. Leave the names, in the order of the labels' "
                             "values.")
    lines = ["background" if line == "_background_" else line for line in lines]
    return [html.unescape(line).replace(";", ",") for line in lines]        # the ; of &amp; ends no name


def json_names(text: str, source: str) -> list[str]:
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            inside = [content[key] for key in ("categories", "names", "labels", "id2label") if key in content]
            content = inside[0] if inside else content
        if isinstance(content, dict):                                   # number → name, or name → number
            pairs = [(number, name) if str(number).isdecimal() else (name, number)
                     for number, name in content.items()]
            content = [f"{int(number)}: {name}"
                       for number, name in sorted(pairs, key=lambda pair: int(pair[0]))]
        if content and all(isinstance(one, dict) and "id" in one for one in content):
            by_id = sorted(content, key=lambda one: int(one["id"]))
            return [f"{int(one['id'])}: {one['name']}" for one in by_id]
        return [one["name"] if isinstance(one, dict) else str(one) for one in content]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{source}: expected a JSON list of names, found another content ({error}). Write "
                         "one class name a line.") from error


def parse_classes(lines: list[str], source: str) -> tuple[tuple[str, ...], ...]:
    """Lines of comma-separated synonyms → names per class. Raises ValueError unless there are 2 to 255
    different ones."""
    parts = [[part.strip().strip(QUOTES).strip() for part in line.split(",")] for line in lines]
    synonyms = tuple(tuple(name for name in names if name) for names in parts)
    if len(synonyms) < 2:
        raise ValueError(f"{source}: expected at least two classes, found {len(synonyms)}. A class is told "
                         "from the others: with one there is nothing to decide. Write one class a line, and "
                         "add what else is in the images (wall, grass, sky, …).")
    if len(synonyms) > IGNORE:
        raise ValueError(f"{source}: expected at most {IGNORE} classes (a label picture has 256 values), "
                         f"found {len(synonyms)}.")
    # by what CLIP reads: letter case and extra spaces are nothing
    seen: dict[tuple[int, ...], tuple[str, int]] = {}
    for number, names in enumerate(synonyms, start=1):
        if not names:
            raise ValueError(f"{source}: expected a name for class {number}, found only commas. Name it or "
                             "remove the line.")
        for name in names:
            tokens = tokens_of_name(name, source)
            if tokens in seen:
                other, where = seen[tokens]
                same = "" if other.lower() == name.lower() else f": to CLIP it is the same as {other!r}"
                raise ValueError(f"{source}: expected every name once, found {name!r} at class {where} and "
                                 f"at class {number}{same}. Remove one of them.")
            seen[tokens] = name, number
    return synonyms


QUOTES = " \t\"\u201c\u201d\u201e\u2018\u00ab\u00bb"  # straight and curly; an apostrophe may belong to a name


def tokens_of_name(name: str, source: str) -> tuple[int, ...]:
    """CLIP's tokens of a class name. Raises ValueError for one that cannot be said inside CLIP's 77
    tokens."""
    room = 77 - 2 - longest_template()
    if any(unicodedata.category(letter) == "Cc" for letter in name) or "<|" in name:
        raise ValueError(f"{source}: expected names in plain words, found {name[:80]!r} with control "
                         "characters or one of CLIP's own marks in it.")
    # the tokenizer is slow with endless words
    tokens = tuple(clip.encode(name)) if len(name) <= 500 else None
    if tokens is None or len(tokens) > room:
        found = f"{len(name)} characters" if tokens is None else len(tokens)
        raise ValueError(f"{source}: expected class names of at most {room} tokens, which fit into CLIP's 77 "
                         f"with a sentence around them; found {found} in {name[:80]!r}. Shorten it.")
    if not tokens:
        raise ValueError(f"{source}: expected names that can be read, found {name!r} without a readable "
                         "character.")
    return tokens


@functools.cache
def longest_template() -> int:
    """How many tokens the longest of the query's sentences has without a name."""
    return max(len(clip.encode(template)) for template in QUERY_TEMPLATES) - 1


def distinct_colours(count: int) -> list[tuple[int, int, int]]:
    """Colours for a user's own classes: hues by the golden angle, in three shades."""
    import colorsys
    return [tuple(round(255 * value)
                  for value in colorsys.hsv_to_rgb(i * 0.618 % 1, (0.85, 0.55, 0.95)[i % 3],
                                                                       (0.95, 0.85, 0.6)[i // 2 % 3]))
            for i in range(count)]


