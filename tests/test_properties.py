"""What holds for any input: measures, label values, class files, texts, sizes, batches and files, on inputs
that hypothesis makes up. The same inputs every time, so that a failure is seen by everyone.

    python -m pytest tests/test_properties.py

    C classes · H,W pixels · h,w patches
"""

import math
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

import clip
import data
import evaluate
import rectify
from clip.tokenizer import END, START, VOCABULARY, byte_letters, vocabulary
from datasets import IGNORE, labels as ground_truth, words
from harness import files, runs
from harness.machine import seed_of
from helpers import write_label

any_input = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all inputs of a test: every one overwrites what the one before left."""
    return tmp_path_factory.mktemp("properties")


# ------------------------------------------------------------------------------------------ measures

@st.composite
def labelled(draw):
    """(C, true_label, predicted): from no pixel on, some ignored, some classes in neither."""
    C = draw(st.integers(1, 6))
    pixel = st.tuples(st.sampled_from([*range(C), IGNORE]), st.integers(0, C - 1))
    pixels = torch.tensor(draw(st.lists(pixel, max_size=40)), dtype=torch.long).reshape(-1, 2)
    return C, pixels[:, 0], pixels[:, 1]


@any_input
@given(labelled(), st.data())
def test_confusion_matrix_adds_up_over_any_split_and_order_of_the_pixels(case, more):
    """Pixels in any order, cut anywhere into two parts: the parts' matrices sum up to that of all."""
    C, true_label, predicted = case
    order = torch.tensor(more.draw(st.permutations(range(len(predicted)))), dtype=torch.long)
    cut = more.draw(st.integers(0, len(order)))
    parts = [evaluate.confusion_matrix(true_label[part], predicted[part], C)
             for part in (order[:cut], order[cut:])]
    assert torch.equal(parts[0] + parts[1], evaluate.confusion_matrix(true_label, predicted, C))


@any_input
@given(labelled(), st.data())
def test_renaming_classes_renames_rows_and_columns_and_leaves_the_mean(case, more):
    C, true_label, predicted = case
    order = torch.tensor(more.draw(st.permutations(range(C))))              # class i is called order[i]
    before = evaluate.confusion_matrix(true_label, predicted, C)
    renamed = torch.where(true_label == IGNORE, IGNORE, order[true_label.clamp(max=C - 1)])
    after = evaluate.confusion_matrix(renamed, order[predicted], C)
    assert torch.equal(after[order][:, order], before)
    assert torch.allclose(evaluate.class_iou(after)[order], evaluate.class_iou(before), equal_nan=True)
    if before.any():
        means = [evaluate.measures(confusion, list(map(str, range(C)))) for confusion in (before, after)]
        for name in ("miou", "miou_absent_zero", "pixel_accuracy"):
            assert means[0][name] == pytest.approx(means[1][name], abs=0.011)                # of two decimals


@any_input
@given(labelled(), st.data())
def test_ignored_pixels_never_count(case, more):
    """Whatever is predicted there, and also if they are not there at all."""
    C, true_label, predicted = case
    ignored = true_label == IGNORE
    other = predicted.clone()
    other[ignored] = torch.tensor(more.draw(st.lists(st.integers(0, C - 1), min_size=int(ignored.sum()),
                                                     max_size=int(ignored.sum()))), dtype=torch.long)
    found = evaluate.confusion_matrix(true_label, predicted, C)
    assert found.sum() == (~ignored).sum()
    assert torch.equal(found, evaluate.confusion_matrix(true_label, other, C))
    assert torch.equal(found, evaluate.confusion_matrix(true_label[~ignored], predicted[~ignored], C))


@any_input
@given(labelled())
def test_measures_equal_those_of_sets_of_pixels(case):
    """IoU in [0, 1] from the sets themselves, none for a class in neither; means and the share of right
    pixels follow."""
    C, true_label, predicted = case
    counted = [i for i, value in enumerate(true_label.tolist()) if value != IGNORE]
    confusion = evaluate.confusion_matrix(true_label, predicted, C)
    truth = [{i for i in counted if true_label[i] == k} for k in range(C)]
    said = [{i for i in counted if predicted[i] == k} for k in range(C)]
    assert confusion.tolist() == [[len(true & called) for called in said] for true in truth]
    ious = [len(true & called) / len(true | called) if true | called else math.nan for true,
            called in zip(truth, said)]
    assert evaluate.class_iou(confusion).tolist() == pytest.approx(ious, nan_ok=True)
    assert all(0 <= iou <= 1 for iou in ious if not math.isnan(iou))
    assume(counted)
    found = evaluate.measures(confusion, list(map(str, range(C))))
    occurring = [iou for iou in ious if not math.isnan(iou)]
    assert found["miou"] == pytest.approx(100 * sum(occurring) / len(occurring), abs=0.0051)
    assert found["miou_absent_zero"] == pytest.approx(100 * sum(occurring) / C, abs=0.0051)
    assert found["miou_absent_zero"] <= found["miou"]
    assert found["pixel_accuracy"] == pytest.approx(100 * (confusion.trace() / confusion.sum()).item(),
                                                    abs=0.0051)


@any_input
@given(labelled())
def test_a_perfect_prediction_is_100(case):
    C, true_label, _ = case
    assume((true_label != IGNORE).any())
    perfect = true_label.masked_fill(true_label == IGNORE, 0)
    found = evaluate.measures(evaluate.confusion_matrix(true_label, perfect, C), list(map(str, range(C))))
    assert found["miou"] == found["pixel_accuracy"] == 100
    assert set(found["per_class_iou"].values()) <= {100, None}


# ------------------------------------------------------------------------------------------ label values

@pytest.fixture(scope="module")
def one_value_labels(folder):
    """A label of one pixel for each of the 256 values."""
    for value in range(256):
        write_label(folder / "values" / f"{value}.png", np.array([[value]]))
    return folder / "values"


def value_as_read(path, read_label) -> int | None:
    """The class that the only pixel of a label gets; None if it is refused by naming file and value."""
    try:
        return read_label(path, size=(1, 1)).item()
    except ValueError as error:
        assert str(path) in str(error) and f"found [{path.stem}]" in str(error)
        return None


def test_every_value_of_voc_is_a_class_ignored_or_refused_by_name(one_value_labels):
    """Background and border are ignored, 1..20 are the 20 classes in their order, all others are refused."""
    read_label = ground_truth.LabelReader("voc", 20)
    found = [value_as_read(one_value_labels / f"{value}.png", read_label) for value in range(256)]
    assert found == [IGNORE, *range(20), *[None] * 234, IGNORE]


def test_every_value_of_a_folder_is_a_class_ignored_or_refused_by_name(one_value_labels):
    """For every number of classes from 2 to 255: the whole table, and the files on both sides of its
    edges."""
    for classes in range(2, 256):
        read_label = ground_truth.LabelReader("photos", classes)
        assert read_label.table.tolist() == [*range(classes), *[-1] * (255 - classes), IGNORE]
        for value in {0, classes - 1, classes, 254, 255}:
            expected = value if value < classes or value == IGNORE else None
            assert value_as_read(one_value_labels / f"{value}.png", read_label) == expected, (classes, value)


@any_input
@given(st.integers(2, 255), st.integers(1, 9), st.integers(1, 9), st.sampled_from(["P", "L"]),
       st.integers(0, 2 ** 32 - 1))
def test_a_written_label_is_read_as_it_was(folder, classes, height, width, mode, seed):
    """As an index picture with a palette or in grey; few classes make a PNG of 1, 2 or 4 bits a pixel."""
    expected = np.random.default_rng(seed).choice([*range(classes), IGNORE], (height, width))
    path = folder / "label.png"
    if mode == "P":
        write_label(path, expected)
    else:
        Image.fromarray(expected.astype(np.uint8)).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
    found = ground_truth.LabelReader("photos", classes)(path, size=(height, width))
    assert found.dtype == np.int64 and np.array_equal(found, expected)


# ------------------------------------------------------------------------------------------ class files

letters = st.sampled_from("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 -'éßÅж日")
names = st.text(letters, min_size=1, max_size=10).map(str.strip).filter(clip.encode)
# Where every line begins with a number, or with YAML's "- ", that is no part of a name: test_words.py.
vocabularies = st.lists(st.lists(names, min_size=1, max_size=3), min_size=2, max_size=6).filter(
    lambda synonyms: len({name.lower() for one in synonyms for name in one}) == sum(map(len, synonyms))
    and not all(one[0][0].isdigit()
                for one in synonyms) and not any(one[0].startswith("- ") for one in synonyms))
blanks = st.text(st.sampled_from(" \t\u00a0\u3000"), max_size=3)
line_ends = st.sampled_from(["\n", "\r\n", "\r"])
comments = st.tuples(blanks, st.text(letters, max_size=8)).map(lambda parts: "{}#{}, cat".format(*parts))


@any_input
@given(vocabularies, st.data())
def test_names_come_back_stripped_and_in_order_however_the_file_is_written(folder, synonyms, more):
    """White space, loose commas, comments, empty lines, line ends of three systems, a byte order mark."""
    written = more.draw(st.sampled_from(["", "\ufeff"]))
    for one in synonyms:
        for line in more.draw(st.lists(blanks | comments, max_size=2)):
            written += line + more.draw(line_ends)
        parts = [more.draw(blanks) + name + more.draw(blanks) for name in one]
        if more.draw(st.booleans()):
            parts.insert(more.draw(st.integers(0, len(parts))), more.draw(blanks))
        written += ",".join(parts) + more.draw(line_ends)
    path = folder / "names.txt"
    path.write_bytes(written.removesuffix(more.draw(st.sampled_from(["", "\n"]))).encode())
    assert words.read_classes(path) == tuple(map(tuple, synonyms))


@any_input
@given(vocabularies, st.data())
def test_a_name_that_stands_twice_is_refused_in_any_letter_case(synonyms, more):
    """As a class or as a synonym, before or after the first."""
    name = more.draw(st.sampled_from([name for one in synonyms for name in one]))
    again = more.draw(st.sampled_from([change(name)
                                       for change in (str, str.lower, str.upper, str.title, str.swapcase)
                                       if change(name).lower() == name.lower()]))
    lines = [", ".join(one) for one in synonyms]
    place = more.draw(st.integers(0, len(lines) - 1))
    if more.draw(st.booleans()):
        lines.insert(place, again)
    else:
        lines[place] += f", {again}"
    with pytest.raises(ValueError) as error:
        words.parse_classes(lines, source="--classes words")
    for part in ("--classes words", "expected every name once", "found ", "at class "):
        assert part in str(error.value)


@any_input
@given(st.one_of(st.binary(max_size=60),
                 st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
                 st.lists(st.sampled_from(["cat", "Cat", "dog", ",", "#", "\n", "\r", " ", "\x00", "\ufeff",
                                           "\u2028"]),
                          max_size=12).map(lambda parts: "".join(parts).encode())))
def test_any_file_gives_two_or_more_classes_or_an_error_that_says_what_was_found(folder, content):
    path = folder / "any.txt"
    path.write_bytes(content)
    try:
        synonyms = words.read_classes(path)
    except ValueError as error:
        assert all(part in str(error) for part in (str(path), "expected", "found")), str(error)
        return
    every = [name for one in synonyms for name in one]
    assert 2 <= len(synonyms) <= 255 and all(synonyms)
    assert all(name and name == name.strip() and clip.encode(name) for name in every)
    assert len({name.lower() for name in every}) == len(every)


@settings(any_input, max_examples=30)
@given(st.integers(58, 66), st.text(st.sampled_from("!?.,;:'\"&<>()-*%#@/…。’😀é"), max_size=4), st.booleans())
def test_an_accepted_name_fits_into_every_sentence(count, marks, first):
    """Also at the limit, and also with punctuation that might melt with the sentence's own."""
    name = (marks + " very" * count if first else "very " * count + marks).strip().replace(",", "")
    try:
        words.tokens_of_name(name, source="--classes")
    except ValueError as error:
        assert f"found {len(clip.encode(name))}" in str(error) and len(clip.encode(name)) > 65
        return
    longest = sorted(words.QUERY_TEMPLATES, key=lambda template: len(clip.encode(template)))[-6:]
    assert clip.tokenize([template.format(name) for template in longest]).shape == (6, 77)


# ------------------------------------------------------------------------------------------ texts

any_text = st.one_of(st.text(st.characters(exclude_categories=()), max_size=60),     # lone surrogates and all
                     st.lists(st.sampled_from(["cat", "DOG", "&amp;", "&lt", "Ã©", "<|endoftext|>", "'s", "1",
                                               " ", "\n",
                                               "ﬁ"]), max_size=12).map("".join))
spaces = st.sampled_from([" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000"])


@settings(any_input, max_examples=100)
@given(any_text, st.integers(2, 90))
def test_any_text_is_framed_cut_at_the_right_place_or_refused(text, length):
    """Start, ids of the vocabulary, end, zeros; what is too long is refused by quoting it, or keeps start and
    end."""
    ids = clip.encode(text)
    assert all(0 <= i < VOCABULARY for i in ids)
    kept = ids[:length - 2]
    row = clip.tokenize(text, context_length=length, truncate=True)[0].tolist()
    assert row == [START, *kept, END] + [0] * (length - len(kept) - 2)
    if len(ids) > length - 2:
        with pytest.raises(ValueError, match=f"fit in {length} tokens.*found {len(ids) + 2} in "):
            clip.tokenize(text, context_length=length)
    else:
        assert clip.tokenize(text, context_length=length)[0].tolist() == row


@any_input
@given(st.lists(st.text(st.characters(codec="ascii", exclude_characters="&", exclude_categories=("Cc", "Zs")),
                        min_size=1,
                        max_size=8), max_size=6), st.data())
def test_white_space_and_letter_case_do_not_matter(plain_words, more):
    """Words are encoded one by one, whatever stands between them and however large they are written."""
    plain = " ".join(plain_words)
    odd = "".join(more.draw(st.sampled_from([word.upper(), word.title(), word])) + more.draw(spaces)
                  for word in plain_words)
    assert clip.encode(more.draw(spaces) + odd) == clip.encode(plain)


def decode(ids: list[int]) -> str:
    """The text of token ids, with a space behind every word."""
    tokens = {i: token for token, i in vocabulary()[0].items()}
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    text = b"".join(bytes(byte_of[letter] for letter in tokens[i].removesuffix("</w>"))
                    + b" " * (tokens[i].endswith("</w>") or i in (START, END)) for i in ids)
    return text.decode("utf-8")


@settings(any_input, max_examples=100)
@given(any_text)
def test_what_was_decoded_is_encoded_to_the_same_ids(text):
    """Cleaning up, lower-casing and cutting into words are done once: their result stays as it is."""
    ids = clip.encode(text)
    assert clip.encode(decode(ids)) == ids


# ------------------------------------------------------------------------------------------ sizes and grids

pixels = st.integers(1, 120)
WHITE = ((1 - torch.tensor(clip.MEAN)) / torch.tensor(clip.STD))[:, None, None]


@any_input
@given(pixels, pixels, st.integers(1, 48))
def test_the_short_side_gets_its_size_and_the_long_side_its_share(width, height, size):
    """Down to one pixel, up to panoramas of 1 : 120; lying stays lying."""
    found = data.short_side_to(Image.new("RGB", (width, height)), size)
    assert min(found.size) == size
    assert found.width == pytest.approx(size * width / min(width, height), abs=1)
    assert found.height == pytest.approx(size * height / min(width, height), abs=1)
    assert data.to_tensor(found).shape == (3, found.height, found.width)


@any_input
@given(pixels, pixels, st.integers(2, 24), st.tuples(st.integers(1, 40), st.integers(1, 40)),
       st.sampled_from([(1.0, 1.0), (0.5, 2.0)]), st.booleans(), st.integers(0, 2 ** 32))
def test_an_augmented_image_always_has_the_crops_size(width, height, short_side, crop, scale, distort, seed):
    transform = data.augmentation(short_side, crop, scale, distort)
    with data.random_state(seed):
        found = transform(Image.new("RGB", (width, height), (200, 90, 10))).as_subclass(torch.Tensor)
    assert found.shape == (3, *crop) and found.dtype == torch.float32 and found.isfinite().all()


@any_input
@given(pixels, pixels, st.integers(1, 24), st.tuples(st.integers(1, 40), st.integers(1, 40)),
       st.integers(0, 2 ** 32))
def test_padding_is_exactly_zero_and_costs_no_pixel_of_the_image(width, height, short_side, crop, seed):
    """A white image: as much of it as fits into the crop, in one piece, and zeros around it."""
    image = Image.new("RGB", (width, height), "white")
    resized = data.short_side_to(image, short_side)
    with data.random_state(seed):
        found = data.augmentation(short_side, crop, (1.0, 1.0),
                                  distort=False)(image).as_subclass(torch.Tensor)
    rows, columns = (found != 0).any(dim=0).nonzero(as_tuple=True)
    inside = found[:, rows.min():rows.max() + 1, columns.min():columns.max() + 1]
    assert inside.shape[1:] == (min(crop[0], resized.height), min(crop[1], resized.width))
    assert torch.allclose(inside, WHITE.expand_as(inside), atol=1e-5)
    assert (found != 0).sum() == inside.numel()


@pytest.fixture(scope="module")
def model():
    """The least CLIP that is one: patches of 4 pixels on a grid of 4 × 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return clip.CLIP(embed_dim=6, image_resolution=16, vision_layers=2, vision_width=64,
                         vision_patch_size=4,
                         context_length=77, vocab_size=8, transformer_width=64, transformer_heads=1,
                         transformer_layers=1)


@any_input
@given(st.integers(1, 6) | st.just(40), st.integers(1, 6) | st.just(40))            # often 4, CLIP's own
def test_positions_fit_every_grid(model, h, w):
    """CLIP's own on its own grid; on any other finite ones that spread no farther than bicubic overshoots."""
    own = model.visual.positional_embedding[1:].T.unflatten(dim=1, sizes=(4, 4))
    found = model.visual.patch_positions(h, w)
    assert found.shape == (64, h, w) and found.isfinite().all()
    assert (h, w) != (4, 4) or torch.equal(found, own)
    assert found.abs().max() <= 2 * own.abs().max()


@any_input
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(clip.DENSE_PATHS), st.integers(0, 2 ** 32))
def test_dense_features_have_a_unit_vector_for_every_begun_patch(model, height, width, path, seed):
    """⌈H/4⌉ × ⌈W/4⌉ of them, those of the image with its last patches filled up with zeros."""
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found = model.encode_dense(image, path)
        filled = model.encode_dense(F.pad(image, (0, -width % 4, 0, -height % 4)), path)
    assert found.shape == (1, 6, math.ceil(height / 4), math.ceil(width / 4))
    assert torch.allclose(found.norm(dim=1), torch.ones(found.shape[2:]), atol=1e-5)
    assert torch.equal(found, filled)


@any_input
@given(st.integers(1, 60), st.integers(1, 60),
       st.integers(1, 12).map(lambda parts: 1 / parts) | st.floats(0.08, 1.0))
def test_windows_lie_inside_the_image_and_cover_all_of_it(height, width, ratio):
    """(2/r − 1)² rectangles of r times the image's size, though never less than a pixel: no pixel has no
    vote."""
    number = torch.arange(float(height * width)).view(1, height, width)    # every pixel knows where it stands
    found = rectify.windows(number, ratio)
    tall, wide = max(1, round(height * ratio)), max(1, round(width * ratio))
    places = 1 if ratio == 1 else max(2, round(2 / ratio) - 1)
    assert found.shape == (places ** 2, 1, tall, wide)
    offsets = torch.arange(tall)[:, None] * width + torch.arange(wide)
    assert torch.equal(found[:, 0], found[:, 0, :1, :1] + offsets)
    assert len(found.unique()) == height * width


@any_input
@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 8),
       st.tuples(st.integers(1, 40), st.integers(1, 40)),
       st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([1.0, 100.0]), st.integers(0, 2 ** 32))
def test_every_pixel_is_predicted_as_a_class(classes, h, w, size, denoising, scale, seed):
    """Whatever the grid and the size; on a grid of that very size it is the best class of every patch."""
    logits = torch.randn(1, classes, h, w, generator=torch.Generator().manual_seed(seed))
    found = evaluate.predict(logits, size, denoising, scale)
    assert found.shape == size and found.dtype == torch.uint8
    assert set(found.unique().tolist()) <= set(range(classes))
    assert torch.equal(evaluate.predict(logits, (h, w)).long(), logits[0].argmax(dim=0))


# ------------------------------------------------------------------------------------------ batches and seeds

@any_input
@given(st.integers(1, 30), st.integers(1, 8), st.integers(1, 4), st.integers(0, 2 ** 32))
def test_every_epoch_is_another_permutation_of_the_images(images, batch_size, epochs, seed):
    """No image twice; fewer than a batch are left out; a folder smaller than a batch is one batch."""
    steps = epochs * data.steps_per_epoch(images, batch_size)
    batches = list(data.Batches(images, batch_size, first_step=0, steps=steps, seed=seed))
    assert len(batches) == steps and {len(batch) for batch in batches} == {min(batch_size, images)}
    orders = [[index for batch in batches for when, index in batch if when == epoch]
              for epoch in range(epochs)]
    # few images may well come in one order twice
    assert images < 12 or len(set(map(tuple, orders))) == epochs
    for order in orders:
        assert len(order) == max(min(batch_size, images), images - images % batch_size)
        assert len(set(order)) == len(order) and set(order) <= set(range(images))


@any_input
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 20), st.integers(0, 2 ** 32), st.data())
def test_a_resumed_run_sees_the_batches_that_were_left(images, batch_size, steps, seed, more):
    """From any step on, also the last: exactly what a run from the beginning would have seen."""
    first = more.draw(st.integers(0, steps))
    whole = data.Batches(images, batch_size, first_step=0, steps=steps, seed=seed)
    rest = data.Batches(images, batch_size, first_step=first, steps=steps, seed=seed)
    assert list(rest) == list(whole)[first:] and len(rest) == steps - first


parts = st.recursive(st.one_of(st.integers(), st.text(max_size=8), st.floats(allow_nan=False), st.none()),
                     lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=5)


@any_input
@given(st.lists(parts, max_size=3), st.lists(parts, max_size=3))
def test_seeds_have_63_bits_and_differ_where_their_parts_do(some, others):
    """torch's generators take 63 bits, signed; and "1" is not 1, nor are (a, b) and ((a, b),) the same."""
    seed = seed_of(*some)
    assert 0 <= seed < 2 ** 63 and seed == seed_of(*some)
    torch.Generator().manual_seed(seed)
    assert (seed == seed_of(*others)) == (repr(some) == repr(others))
    assert seed != seed_of(tuple(some)) and seed != seed_of(*some, None)
    assert not some or seed != seed_of(str(some[0]) + " ", *some[1:])


# ------------------------------------------------------------------------------------------ files

TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]
tensors = st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(TYPES),
                    st.integers(0, 2 ** 32)).map(
    lambda made: (100 * torch.randn(made[0],
                                    generator=torch.Generator().manual_seed(made[2]))).abs().to(made[1]))
contents = st.recursive(
    st.one_of(tensors, st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=8)),
    lambda inner: st.one_of(st.dictionaries(st.one_of(st.text(max_size=5), st.integers()), inner, max_size=4),
                            st.lists(inner, max_size=3)), max_leaves=12)


def bits(content):
    """Something that is equal where the contents are the same bits, NaN and −0 included, and the same
    types."""
    if isinstance(content, torch.Tensor):
        raw = content.contiguous().flatten().view(torch.uint8).tolist()
        return str(content.dtype), tuple(content.shape), raw
    if isinstance(content, dict):
        return "dict", [(key, bits(value)) for key, value in content.items()]
    if isinstance(content, list):
        return "list", [bits(value) for value in content]
    return type(content).__name__, struct.pack("d", content) if isinstance(content, float) else content


@any_input
@given(st.dictionaries(st.text(max_size=5), contents, max_size=4), st.text(max_size=8))
def test_a_checkpoint_comes_back_bit_for_bit(folder, content, stage):
    """Whatever is nested in it, and over whatever stood there before; it is read as the stage it was saved as
    alone."""
    content, path = content | {"stage": stage, "settings": {},
                               "weights": {}}, folder / "files" / "checkpoint.pt"
    files.save(path, content)
    found = runs.load(path, stage, needs={})
    assert found.pop("path") == path and bits(found) == bits(content)
    with pytest.raises(ValueError, match="expected a checkpoint of the stage"):
        runs.load(path, stage + "?", needs={})
    assert [file.name for file in path.parent.iterdir()] == ["checkpoint.pt"]


@any_input
@given(st.lists(st.binary(max_size=30), max_size=4), st.lists(st.binary(max_size=30), max_size=4),
       st.booleans(), st.data())
def test_a_file_is_the_old_one_or_the_new_one_whole(folder, old, new, flush, more):
    """Written in any pieces, and broken off behind any of them: nothing in between, nothing left beside
    it."""
    path = folder / "whole" / "a.bin"
    files.write_atomically(path, lambda file: [file.write(piece) for piece in old], flush)
    assert path.read_bytes() == b"".join(old)
    pieces = more.draw(st.integers(0, len(new)))

    def broken_off(file):
        file.writelines(new[:pieces])
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        files.write_atomically(path, broken_off, flush)
    assert path.read_bytes() == b"".join(old)
    files.write_atomically(path, lambda file: file.writelines(new), flush)
    assert path.read_bytes() == b"".join(new)
    assert [file.name for file in path.parent.iterdir()] == ["a.bin"]
