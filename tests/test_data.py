"""data.py: images become tensors and batches, which depend on the seed and the step alone.

    python -m pytest tests/test_data.py          # lists and files: test_images.py, class lists: test_words.py
"""

import inspect
import os
import signal

import pytest
import torch
from PIL import Image

import data
import evaluate
from datasets import images as image_files
from helpers import photo, write_photos


# ------------------------------------------------------------------------------------------ image → tensor

def test_tensor_is_normalised_with_clips_mean_and_std():
    """(v / 255 − mean) / std per channel, in float32, as a plain tensor."""
    tensor = data.to_tensor(Image.new("RGB", (3, 2), (255, 0, 128)))
    assert type(tensor) is torch.Tensor and tensor.shape == (3, 2, 3) and tensor.dtype == torch.float32
    expected = [(1 - 0.48145466) / 0.26862954, (0 - 0.4578275) / 0.26130258,
                (128 / 255 - 0.40821073) / 0.27577711]
    assert torch.allclose(tensor[:, 0, 0], torch.tensor(expected), atol=1e-6)


@pytest.mark.parametrize("size, expected", [((56, 40), (28, 20)), ((40, 56), (20, 28)), ((10, 10), (20, 20))])
def test_short_side_is_resized_and_the_shape_kept(size, expected):
    assert data.short_side_to(Image.new("RGB", size), 20).size == expected


@pytest.mark.parametrize("size, expected",
                         [((500, 375), (448, 336)), ((500, 332), (512, 336)), ((500, 334), (496, 336)),
                                            ((1, 1), (336, 336)), ((500, 1), (2048, 16)),
                          ((3000, 500), (2016, 336)),
                                            ((3000, 400), (2048, 272))])
def test_image_is_resized_to_whole_patches(size, expected):
    """(width, height) for a short side of 336 and patches of 16; a panorama's long side is 2048 at most."""
    assert data.short_side_to(Image.new("RGB", size), 336, multiple=16).size == expected


@pytest.mark.parametrize("size", [(200, 30), (30, 200), (64, 64), (16, 12)])
@pytest.mark.parametrize("crop", [(48, 48), (32, 64)])
def test_augmented_image_has_the_size_of_the_crop(size, crop):
    """Whatever the image's size and shape; height before width."""
    torch.manual_seed(0)
    for _ in range(4):
        image = data.augmentation(40, crop, (0.5, 2.0), distort=True)(photo(*size))
        assert tuple(image.shape) == (3, *crop) and image.dtype == torch.float32 and image.isfinite().all()


def test_what_a_crop_lacks_is_zero_after_normalisation():
    """Zero is CLIP's mean colour: a white image in a larger crop has white places and places of exactly 0."""
    torch.manual_seed(0)
    image = data.augmentation(16, (40, 40), (1.0, 1.0), distort=False)(Image.new("RGB", (16, 16), "white"))
    white = data.to_tensor(Image.new("RGB", (1, 1), "white"))
    filled = (image == 0).all(dim=0)
    assert 0 < filled.sum() < 40 * 40
    assert torch.allclose(image[:, ~filled], white.view(3, 1).expand(3, int((~filled).sum())), atol=1e-5)


def test_augmentation_flips_scales_and_crops():
    """A few draws of one image: different pictures, some of them mirrored when nothing else may change."""
    image = photo(32, 32)
    torch.manual_seed(0)
    draws = [data.augmentation(32, (24, 24), (0.5, 2.0), distort=True)(image) for _ in range(8)]
    assert len({draw.sum().item() for draw in draws}) == 8
    shares = [(data.augmentation(16, (64, 64), (0.5, 2.0), distort=False)(image) != 0).float().mean()
              for _ in range(16)]
    # of the crop's area: (ratio · 16 / 64)²
    assert min(shares) < 0.5 ** 2 / 16 * 3 and max(shares) > 1.5 ** 2 / 16
    flip_only = data.augmentation(32, (32, 32), (1.0, 1.0), distort=False)
    seen = {tuple(flip_only(image).flatten().tolist()) for _ in range(16)}
    whole = data.to_tensor(image)
    assert seen == {tuple(whole.flatten().tolist()), tuple(whole.flip(dims=(2,)).flatten().tolist())}


# ------------------------------------------------------------------------------------------ training images

@pytest.fixture
def seven(tmp_path):
    return image_files.images_in(write_photos(tmp_path / "seven", *(f"{letter}.png" for letter in "abcdefg")))


def batches_of(images, first_step=0, steps=9, seed=0, workers=0, batch_size=2):
    """All batches as (pixels, rows), with an augmentation that is random in every way."""
    transform = data.augmentation(24, (24, 24), (0.5, 2.0), distort=True)
    dataset = data.TrainingImages(images, transform, seed)
    return list(data.training_batches(dataset, batch_size=batch_size, first_step=first_step, steps=steps,
                                      seed=seed,
                                      workers=workers))


def assert_same_batches(found, expected):
    assert len(found) == len(expected) and len(expected) > 0
    for (images, rows), (expected_images, expected_rows) in zip(found, expected):
        assert torch.equal(rows, expected_rows) and torch.equal(images, expected_images)


def test_training_images_have_no_way_to_a_label(seven):
    """It is handed image paths, a transform and a seed, and gives an image and its row. Nothing else is
    there."""
    assert list(inspect.signature(data.TrainingImages).parameters) == ["images", "transform", "seed"]
    dataset = data.TrainingImages(seven, data.augmentation(24, (24, 24), (1.0, 1.0), distort=False), seed=0)
    item = dataset[0, 1]
    assert len(dataset) == 7 and len(item) == 2 and item[1] == 1
    assert item[0].shape == (3, 24, 24) and type(item[0]) is torch.Tensor
    assert dataset.paths == list(seven.values()) and not isinstance(dataset, evaluate.LabelledImages)


def test_same_seed_same_batches_other_seed_others(seven):
    assert_same_batches(batches_of(seven), batches_of(seven))
    others = batches_of(seven, seed=1)
    assert any(not torch.equal(rows, other) for (_, rows), (_, other) in zip(batches_of(seven), others))


def test_batches_do_not_depend_on_the_number_of_workers(seven):
    assert_same_batches(batches_of(seven, steps=4, workers=2), batches_of(seven, steps=4))


@pytest.mark.parametrize("first_step", [1, 3, 4, 8])
def test_resumed_batches_are_those_of_the_uninterrupted_run(seven, first_step):
    """Also in the middle of an epoch (three steps each here)."""
    assert_same_batches(batches_of(seven, first_step=first_step), batches_of(seven)[first_step:])


def test_every_epoch_is_a_fresh_permutation():
    """Each image at most once an epoch, a last batch that is not full is dropped, and orders differ between
    epochs."""
    per_epoch = data.steps_per_epoch(7, 2)
    assert per_epoch == 3
    batches = list(data.Batches(7, 2, first_step=0, steps=4 * per_epoch, seed=0))
    orders = []
    for epoch in range(4):
        items = [item for batch in batches[epoch * per_epoch:(epoch + 1) * per_epoch] for item in batch]
        assert [number for number, _ in items] == [epoch] * 6
        orders.append([index for _, index in items])
        assert len(set(orders[-1])) == 6 and set(orders[-1]) <= set(range(7))
    assert len({tuple(order) for order in orders}) == 4
    whole = [index for batch in data.Batches(6, 2, 0, 3, seed=0) for _, index in batch]
    assert sorted(whole) == list(range(6))


def test_fewer_images_than_a_batch_make_one_batch_an_epoch(seven):
    assert data.steps_per_epoch(7, 16) == 1
    found = batches_of(seven, steps=2, batch_size=16)
    assert [sorted(rows.tolist()) for _, rows in found] == [list(range(7))] * 2


def test_an_image_looks_different_in_every_epoch(seven):
    """The augmentation is a function of (seed, epoch, index), not of the index alone."""
    dataset = data.TrainingImages(seven, data.augmentation(24, (24, 24), (0.5, 2.0), distort=True), seed=0)
    assert torch.equal(dataset[0, 1][0],
                       dataset[0, 1][0]) and not torch.equal(dataset[0, 1][0], dataset[1, 1][0])


def test_drawing_an_augmentation_leaves_the_global_generator_alone(seven):
    """Otherwise whatever else draws from it would depend on the number of images that were read."""
    dataset = data.TrainingImages(seven, data.augmentation(24, (24, 24), (0.5, 2.0), distort=True), seed=0)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    dataset[0, 0]
    assert torch.equal(torch.rand(3), expected)


def test_ctrl_c_does_not_kill_the_processes_that_decode(seven):
    """A terminal sends it to every process; were the decoders to die, the step could not end and nothing be
    saved."""
    transform = data.augmentation(24, (24, 24), (1.0, 1.0), distort=False)
    batches = iter(data.training_batches(data.TrainingImages(seven, transform, seed=0), batch_size=1,
                                         first_step=0, steps=40, seed=0,
                                      workers=1))
    next(batches)
    for worker in batches._workers:
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 39 and all(worker.exitcode in (0, None) for worker in batches._workers)
