"""datasets/words.py: class lists as people have them, the sentences around the names, and the colours.

    python -m pytest tests/test_words.py
"""

import pytest

import clip
from datasets import DATASETS, words
from helpers import voc_colour
from toyland.networks import small_clip

WORDS = (("cat",), ("dog",))


def write_classes(folder, content: str | bytes):
    path = folder / "names.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ------------------------------------------------------------------------------------------ class files

@pytest.mark.parametrize("content", [
    "cat\ndog\n", "cat\ndog", "\n cat \n\n\tdog\n\n", "# what lives here\ncat\n  # and\ndog\n",
                                     "cat\r\ndog\r\n",
    b"\xef\xbb\xbfcat\ndog\n", "cat,\n,dog\n"],
    ids=["plain", "no last newline", "blanks", "comments", "Windows' line ends", "byte order mark",
         "loose commas"])
def test_class_file_holds_one_class_a_line(tmp_path, content):
    """However an editor saves the file, the same two classes come out of it."""
    assert words.read_classes(write_classes(tmp_path, content)) == WORDS


def test_synonyms_stand_after_commas_and_the_first_is_shown(tmp_path):
    """All names of a class are kept, in the file's order; the first stands for the class."""
    path = write_classes(tmp_path, "sofa, couch , settee\nKüchentisch\n")
    found = words.vocabulary("photos", str(path))
    assert found.synonyms == (("sofa", "couch", "settee"), ("Küchentisch",))
    assert found.names == ["sofa", "Küchentisch"] and len(found) == 2


@pytest.mark.parametrize("content, expected, found", [
    ("", "at least two classes", "found 0"),
    ("# cat\n\n", "at least two classes", "found 0"),
    ("cat\n", "at least two classes", "found 1"),
    ("".join(f"word {i}\n" for i in range(256)), "at most 255 classes", "found 256"),
    ("cat\ndog\nCat\n", "every name once", "found 'Cat' at class 1 and at class 3"),
    ("cat, puss\ndog, puss\n", "every name once", "found 'puss' at class 1 and at class 2"),
    ("potted plant\ndog\npotted  plant\n", "every name once",
     "class 3: to CLIP it is the same as 'potted plant'"),
    ("cafe\u0301\ndog\ncaf\xe9\n", "every name once", "to CLIP it is the same as"),
    ("dog\n" + "x" * 100_000, "at most 65 tokens", "found 100000 characters in 'xxx"),
    ("cat\n , ,\ndog\n", "a name for class 2", "found only commas"),
    ("cat\n" + "very " * 64 + "old dog\n", "at most 65 tokens", "found 66"),
    ("cat\n\x08\n", "names in plain words", "found '\\x08'"),
    ("cat\nKüche\n".encode("latin-1"), "UTF-8", "other bytes"),
    (b"\xff\xfec\x00a\x00t\x00\n\x00", "UTF-8", "other bytes")],
    ids=["empty", "comments alone", "one", "256", "twice", "synonym twice", "twice, spaced apart",
         "twice, in two forms of Unicode", "endless", "commas alone", "over-long", "unreadable",
         "Latin-1", "UTF-16"])
def test_unusable_class_file_is_refused_by_name(tmp_path, content, expected, found):
    """The error names the file, what was expected in it and what was found."""
    path = write_classes(tmp_path, content)
    with pytest.raises(ValueError) as error:
        words.read_classes(path)
    for part in (str(path), expected, found):
        assert part in str(error.value)


def test_missing_class_file_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"names\.txt: expected a text file.*found no such file"):
        words.read_classes(tmp_path / "names.txt")


def test_255_classes_are_allowed(tmp_path):
    """A label picture has 256 values, one of which means ignored."""
    assert len(words.read_classes(write_classes(tmp_path, "".join(f"word {i}\n" for i in range(255))))) == 255


def test_longest_allowed_name_fits_into_every_sentence(tmp_path):
    """A name of as many tokens as are allowed can be said in all 85 sentences and leaves room for the learned
    prompt."""
    name = " ".join(["very"] * 64 + ["old"])
    [(longest,), _] = words.read_classes(write_classes(tmp_path, f"{name}\ncat\n"))
    assert len(clip.encode(longest)) == 65
    # raises if one is too long
    clip.tokenize([template.format(longest) for template in words.QUERY_TEMPLATES])
    assert small_clip().prompt_room([longest]) >= 1


# ---------------------------------------------------------------------------------- names, colours, sentences

def test_voc_has_its_20_classes_in_order_and_its_official_colours():
    """Class i has the colour that VOC's rule gives to the label value i + 1."""
    found = words.vocabulary("voc")
    assert len(found) == len(set(found.names)) == 20
    assert found.names[0] == "airplane" and found.names[10] == "dining table" \
        and found.names[19] == "tv monitor"
    assert list(found.palette) == [voc_colour(value) for value in range(1, 21)]


def test_toyland_s_things_are_said_in_toyland_s_sentences():
    """Its small CLIP has read no others."""
    found, all_classes = words.vocabulary("toyland-things"), words.vocabulary("toyland")
    assert found.templates == all_classes.templates and found.names == all_classes.names[6:]
    assert found.palette == all_classes.palette[6:]


def test_toyland_has_16_classes_and_colours():
    found = words.vocabulary("toyland")
    assert len(found) == len(set(found.names)) == len(set(found.palette)) == 16


def test_85_query_templates_all_different_each_with_one_place_for_the_name():
    assert len(words.QUERY_TEMPLATES) == len(set(words.QUERY_TEMPLATES)) == 85
    assert all(template.count("{}") == 1 and template.format("cat").endswith(".")
               for template in words.QUERY_TEMPLATES)
    assert all(template == " ".join(template.split()) for template in words.QUERY_TEMPLATES)


def test_own_classes_get_colours_of_their_own(tmp_path):
    """Different colours, none black (that is ignored); a dataset's own names keep the official ones, whatever
    synonyms."""
    many = words.vocabulary_of("photos", tuple((f"word {i}",) for i in range(60)))
    assert len(set(many.palette)) == 60 and (0, 0, 0) not in many.palette
    assert all(0 <= channel <= 255 for colour in many.palette for channel in colour)
    same = words.vocabulary_of("voc", tuple((name, f"some {name}") for name in DATASETS["voc"].names))
    assert list(same.palette) == DATASETS["voc"].palette


def test_a_folder_needs_class_names():
    with pytest.raises(ValueError, match="--data photos: expected .* --classes FILE.*found no --classes"):
        words.vocabulary("photos")
