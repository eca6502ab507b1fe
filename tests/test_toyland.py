"""toyland.py: a world that is the same on every machine, whose captions and labels say the truth about its pictures.

    python -m pytest tests/test_toyland.py
"""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import data
import ground_truth
import runs
import toyland

TINY_CLIP = toyland.SMALL_CLIP | dict(embed_dim=16, vision_width=64, vision_layers=2, transformer_width=64,
                                      transformer_heads=1, transformer_layers=1)


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(toyland, "TRAIN_SCENES", 3)
    monkeypatch.setattr(toyland, "VAL_SCENES", 4)


def files_in(root) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------ scenes

def test_scene_is_always_the_same():
    """A function of split and number: however many were drawn before, whatever the global generators say."""
    image, truth = toyland.scene("val", 3)
    np.random.seed(1)
    toyland.scene("val", 4)
    again, truth_again = toyland.scene("val", 3)
    assert np.array_equal(image, again) and np.array_equal(truth, truth_again)
    assert image.shape == (96, 128, 3) and truth.shape == (96, 128) and image.dtype == truth.dtype == np.uint8


def test_scenes_differ_between_numbers_and_splits():
    images = [toyland.scene(split, number)[0] for split in ("train", "val") for number in range(4)]
    assert len({image.tobytes() for image in images}) == 8


def test_every_class_occurs_in_few_scenes_and_every_pixel_has_one():
    """Things as well as stuffs; no value beyond the classes, nothing unlabelled."""
    seen = np.zeros(256, int)
    for number in range(60):
        seen += np.bincount(toyland.scene("val", number)[1].ravel(), minlength=256)
    assert len(toyland.CLASSES) == 16 and (seen[:16] > 200).all() and seen[16:].sum() == 0


def test_truth_lies_where_the_picture_shows_it():
    """A thing painted on a plain picture: colours change exactly where the label names it (up to smoothed edges)."""
    for number, name in enumerate(toyland.THINGS):
        canvas = toyland.Canvas(96, 128)
        canvas.label.paste(255, (0, 0, 128, 96))
        canvas.thing(name, 60, 48, 50, np.random.default_rng(number))
        image, label = canvas.finish()
        painted = image.any(axis=-1)
        named = label == toyland.CLASSES.index(name)
        assert set(np.unique(label)) == {toyland.CLASSES.index(name), 255} and named.sum() > 200
        assert (painted & named).sum() / (painted | named).sum() > 0.8, name


# ------------------------------------------------------------------------------------------ captions

@pytest.fixture
def painted(monkeypatch):
    """The names of what is painted on a canvas, in order."""
    names = []
    stuff, thing = toyland.Canvas.stuff, toyland.Canvas.thing

    def stuff_and_note(canvas, name, top, bottom, *args):
        if bottom > top:
            names.append(name)
        stuff(canvas, name, top, bottom, *args)

    def thing_and_note(canvas, name, *args):
        names.append(name)
        thing(canvas, name, *args)

    monkeypatch.setattr(toyland.Canvas, "stuff", stuff_and_note)
    monkeypatch.setattr(toyland.Canvas, "thing", thing_and_note)
    return names


def test_caption_names_only_what_is_in_the_picture(painted):
    """All things are named; of stuffs behind things at most one, in about one caption of seven."""
    rng = np.random.default_rng(0)
    with_things = with_ground = 0
    for _ in range(400):
        painted.clear()
        picture, caption = toyland.captioned_picture(rng)
        named = caption.replace(" and the ", " ").replace(" on the ", " ").split()
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        assert set(named) <= set(painted) and len(set(named)) == len(named) > 0, (caption, painted)
        things = [name for name in painted if name in toyland.THINGS]
        assert set(things) <= set(named)
        if things:
            with_things += 1
            with_ground += len(named) > len(things)
            assert len(named) <= len(things) + 1
        else:
            assert set(named) == set(painted)
    assert 220 < with_things < 300 and 0.08 < with_ground / with_things < 0.25


def test_captioned_pictures_follow_the_seed():
    """The same seed, the same pictures, however they are spread over processes; another seed, others."""
    pictures, captions = toyland.draw_chunk((0, 500, 6))
    again, captions_again = toyland.draw_chunk((0, 500, 6))
    other, _ = toyland.draw_chunk((1, 500, 6))
    assert pictures.shape == (6, 64, 64, 3) and captions == captions_again and np.array_equal(pictures, again)
    assert not np.array_equal(pictures, other)


def test_pretraining_pictures_are_the_chunks_in_order():
    """Count pictures, also where the last chunk is smaller, each with its own caption."""
    pictures, captions = toyland.pretraining_pictures(seed=0, count=503)
    assert pictures.shape == (503, 64, 64, 3) and len(captions) == 503
    last, last_captions = toyland.draw_chunk((0, 500, 3))
    assert np.array_equal(pictures[500:], last) and captions[500:] == last_captions


# ------------------------------------------------------------------------------------------ the dataset on disk

def test_drawn_dataset_holds_no_truth_of_training_scenes(tmp_path, few_scenes):
    """Labels of validation scenes alone: what trains could not read a label if it wanted to."""
    root = toyland.draw_dataset(tmp_path)
    assert root == tmp_path / "toyland"
    assert files_in(root) == [*(f"images/train/000{i}.png" for i in range(3)), *(f"images/val/000{i}.png" for i in range(4)),
                              *(f"labels/val/000{i}.png" for i in range(4))]


def test_drawn_files_are_the_scenes(tmp_path, few_scenes):
    """Pixel by pixel, image and index label, found by data.py under their ids."""
    images = data.validation_images("toyland", str(tmp_path))
    labels = ground_truth.true_label_files("toyland", str(tmp_path), list(images))
    assert list(images) == list(labels) == [f"val/000{i}" for i in range(4)]
    assert list(data.training_images("toyland", str(tmp_path))) == [f"train/000{i}" for i in range(3)]
    image, truth = toyland.scene("val", 2)
    assert np.array_equal(np.asarray(data.read_image(images["val/0002"])), image)
    assert np.array_equal(ground_truth.read_label(labels["val/0002"], ground_truth.lookup_table("toyland", 16), (96, 128)), truth)


def test_missing_file_is_drawn_again_and_others_are_kept(tmp_path, few_scenes):
    """A dataset that was half deleted, or whose drawing was interrupted, is completed."""
    root = toyland.draw_dataset(tmp_path)
    content = {name: (root / name).read_bytes() for name in files_in(root)}
    for name in ("images/train/0001.png", "labels/val/0003.png"):
        (root / name).unlink()
    kept = root / "images/train/0000.png"
    os.utime(kept, ns=(1, 1))
    toyland.draw_dataset(tmp_path)
    assert {name: (root / name).read_bytes() for name in files_in(root)} == content
    assert kept.stat().st_mtime_ns == 1


def test_scenes_of_another_world_are_drawn_anew(tmp_path, few_scenes, monkeypatch):
    """Who changes the drawing (exercise: add a class) gets new scenes, not those of yesterday."""
    root = toyland.draw_dataset(tmp_path)
    content = {name: (root / name).read_bytes() for name in files_in(root)}
    monkeypatch.setitem(toyland.TEXTURES, "sky", lambda H, W, rng: 255 - toyland.sky(H, W, rng))
    toyland.draw_dataset(tmp_path)
    changed = {name for name in files_in(root) if (root / name).read_bytes() != content[name]}
    assert any(name.startswith("images/train") for name in changed) and any(name.startswith("images/val") for name in changed)
    assert not any(name.startswith("labels") for name in changed)               # the same shapes, other textures


def test_interrupted_drawing_leaves_no_half_picture(tmp_path, few_scenes, monkeypatch):
    """Ctrl-C in the middle of a file: what has a name is whole."""
    def interrupted(self, file, *_args, **_how):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        toyland.draw_dataset(tmp_path)
    assert files_in(tmp_path) == []


def test_command_draws_the_dataset_and_an_overview(tmp_path, few_scenes, capsys):
    toyland.main(toyland.flags().parse_args(["--root", str(tmp_path)]))
    with Image.open(tmp_path / "toyland/overview.png") as page:
        assert page.size == (768, 4 * 64 + 4 * 96)
    assert "Next: python rectify.py" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------ the small CLIP

def test_caption_loss_equals_a_loop():
    """Each picture finds its caption; each caption finds its pictures, which share one vote."""
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(7, 5), dim=-1), F.normalize(torch.randn(3, 5), dim=-1)
    caption, scale = [0, 2, 2, 1, 0, 2, 2], 7.0
    logits = [[scale * float(image @ text) for text in texts] for image in images]

    def log_share(values, i):
        return values[i] - np.log(np.sum(np.exp(values)))

    to_texts = -np.mean([log_share(logits[i], caption[i]) for i in range(7)])
    to_images = -np.mean([np.mean([log_share([row[k] for row in logits], i) for i in range(7) if caption[i] == k])
                          for k in range(3)])
    found = toyland.caption_loss(images, texts, torch.tensor(caption), torch.tensor(scale))
    assert found.item() == pytest.approx((to_texts + to_images) / 2, rel=1e-5)


def test_caption_loss_of_different_captions_is_clips():
    """Where no two captions are equal it is CLIP's own symmetric cross-entropy."""
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(4, 5), dim=-1), F.normalize(torch.randn(4, 5), dim=-1)
    logits, diagonal = 10 * images @ texts.T, torch.arange(4)
    expected = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
    assert torch.allclose(toyland.caption_loss(images, texts, diagonal, torch.tensor(10.0)), expected)


@pytest.fixture(scope="module")
def small_clip():
    torch.manual_seed(0)
    return clip.CLIP(**TINY_CLIP).eval().requires_grad_(False)


def test_patch_dropout_of_nothing_is_encode_image(small_clip):
    """Up to rounding: encode_image runs the last block for the class token alone."""
    images = torch.randn(3, 3, 64, 64)
    whole = small_clip.encode_image(images)
    assert torch.allclose(toyland.encode_some_patches(small_clip, images, dropout=0.0), whole, atol=1e-5)


def test_patch_dropout_keeps_the_class_token_and_a_share_of_the_patches(small_clip, monkeypatch):
    """65 % of 64 patches are dropped, others in every picture; the class token, which is read, never is."""
    seen = []
    monkeypatch.setattr(small_clip.visual.transformer, "forward", lambda x: seen.append(x) or x)
    images = torch.randn(5, 3, 64, 64)
    toyland.encode_some_patches(small_clip, images, dropout=0.65)
    whole, [kept] = small_clip.visual.embed(images), seen
    assert kept.shape == (5, 1 + round(64 * 0.35), 64)
    assert torch.equal(kept[:, 0], whole[:, 0])
    chosen = []
    for some, every in zip(kept, whole):
        places = [(every == token).all(dim=-1).nonzero().flatten().tolist() for token in some]
        assert all(len(place) == 1 for place in places)
        chosen.append(sorted(place for [place] in places))
        assert len(set(chosen[-1])) == len(chosen[-1])                          # no patch twice
    assert len({tuple(places) for places in chosen}) == 5


def test_batch_is_normalised_as_for_clip_and_flipped_by_chance():
    """The numbers that data.to_tensor gives for the same picture, or its mirror image; both occur."""
    pictures = np.stack([toyland.scene("val", i)[0][:64, :64] for i in range(12)])
    torch.manual_seed(0)
    flipped = []
    for found, picture in zip(toyland.to_batch(pictures), pictures):
        expected = data.to_tensor(Image.fromarray(picture))
        mirrored = torch.allclose(found, expected.flip(dims=(2,)), atol=1e-5)
        assert mirrored or torch.allclose(found, expected, atol=1e-5)
        flipped.append(mirrored)
    assert 0 < sum(flipped) < 12


def test_pretraining_follows_its_seed_and_its_shipped_file_is_a_clip(tmp_path, monkeypatch):
    """A few steps of the real loop; the file has zero rows for words that no caption used and loads by path."""
    monkeypatch.setattr(toyland, "SMALL_CLIP", TINY_CLIP)
    monkeypatch.setattr(toyland, "BATCH", 32)
    pictures, captions = toyland.draw_chunk((0, 0, 64))
    model = toyland.pretrain(pictures, captions, epochs=2, seed=0, out=tmp_path / "a")
    again = toyland.pretrain(pictures, captions, epochs=2, seed=0, out=tmp_path / "b")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    runs.save(tmp_path / "toyland.pt", toyland.weights_to_ship(model, captions))
    assert (tmp_path / "toyland.pt").stat().st_size < 2_000_000                # the dense table alone would take 6 MB
    loaded, _ = clip.load(tmp_path / "toyland.pt", device="cpu")
    texts = clip.tokenize(["the car and the tree.", "a photo of the sky."])
    assert torch.allclose(loaded.encode_text(texts), model.encode_text(texts), rtol=0.02, atol=0.02)
    table = loaded.token_embedding.weight
    assert table.shape == (49408, 64) and 10 < table.any(dim=1).sum() < 100


@pytest.mark.slow
@pytest.mark.parametrize("stop", [0, 2, 3, 5])
def test_stopped_pretraining_goes_on_to_the_same_bits(tmp_path, monkeypatch, stop):
    """Ctrl-C in the first step, within an epoch, at its end and in the last step: order, flips, templates, patches that are
    left out and the schedule continue as if nothing had been, for CLIP and for the ResNet."""
    monkeypatch.setattr(toyland, "SMALL_CLIP", TINY_CLIP)
    monkeypatch.setattr(toyland, "BATCH", 16)
    pictures, captions = toyland.draw_chunk((0, 0, 48))
    done = runs.Training.done

    def done_and_stop(self, step, *rest):
        if step == stop:
            self.ask_to_stop()
        done(self, step, *rest)

    for train in (toyland.pretrain, toyland.pretrain_resnet):
        whole = train(pictures, captions, 2, 0, tmp_path / "whole")
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(runs.Training, "done", done_and_stop)
            train(pictures, captions, 2, 0, tmp_path / "broken")
        torch.manual_seed(99)
        found = train(pictures, captions, 2, 0, tmp_path / "broken", resume=True)
        assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in whole.state_dict().items())
        with pytest.raises(ValueError, match="another"):
            train(1 + pictures, captions, 2, 0, tmp_path / "broken", resume=True)


# ------------------------------------------------------------------------------------------ the small ResNet

@pytest.mark.parametrize("height, width", [(64, 64), (96, 128), (100, 75)])
def test_small_resnet_has_output_stride_8(height, width):
    """32, 64, 128, 128 channels at strides 4, 8, 8, 8: dilation in place of the last two strides."""
    resnet = toyland.small_resnet(pretrained=False).eval()
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(torch.randn(1, 3, height, width)))))
    for layer, channels, stride in ((resnet.layer1, 32, 4), (resnet.layer2, 64, 8), (resnet.layer3, 128, 8),
                                    (resnet.layer4, 128, 8)):
        x = layer(x)
        assert x.shape == (1, channels, -(-height // stride), -(-width // stride))
    assert resnet.fc.in_features == 128 and resnet.fc.out_features == 16
    dilations = [layer[-1].conv2.dilation for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)]
    assert dilations == [(1, 1), (1, 1), (2, 2), (4, 4)]


def test_small_resnet_reads_its_half_precision_weights(tmp_path, monkeypatch):
    """Every tensor, the counters of BatchNorm included; a missing file is an error, not a fresh start."""
    torch.manual_seed(0)
    expected = toyland.small_resnet(pretrained=False).state_dict()
    monkeypatch.setattr(toyland, "RESNET_WEIGHTS", tmp_path / "resnet.pt")
    with pytest.raises(FileNotFoundError):
        toyland.small_resnet()
    torch.save({name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in expected.items()},
               tmp_path / "resnet.pt")
    found = toyland.small_resnet().state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == tensor.dtype and torch.allclose(found[name], tensor, atol=1e-3)
               for name, tensor in expected.items())


def test_resnet_learns_the_words_of_the_captions(tmp_path, monkeypatch):
    """The targets are the names in the caption and nothing else; the same seed gives the same weights."""
    targets = []
    loss = F.binary_cross_entropy_with_logits
    monkeypatch.setattr(toyland.F, "binary_cross_entropy_with_logits", lambda x, y: targets.append(y) or loss(x, y))
    monkeypatch.setattr(toyland, "BATCH", 4)
    pictures, _ = toyland.draw_chunk((0, 0, 4))
    captions = ["car and the tree on the grass", "sky", "bus", "sky and the sun"]
    resnet = toyland.pretrain_resnet(pictures, captions, epochs=1, seed=0, out=tmp_path / "a")
    named = [[toyland.CLASSES[k] for k in row.nonzero().flatten().tolist()] for row in targets[0]]
    assert named == [["grass", "tree", "car"], ["sky"], ["bus"], ["sky", "sun"]]
    again = toyland.pretrain_resnet(pictures, captions, epochs=1, seed=0, out=tmp_path / "b")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in resnet.state_dict().items())
