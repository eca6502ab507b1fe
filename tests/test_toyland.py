"""toyland/: a world that is the same on every machine, whose captions and labels say the truth about its
pictures; and the training of its two small networks.

    python -m pytest tests/test_toyland.py
"""

import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import clip
import data
import evaluate
from datasets import DATASETS, IGNORE, images, labels
from harness import files, runs
from helpers import SMALLEST, openai_state
from toyland import networks, pretrain, world

TINY_CLIP = networks.SMALL_CLIP | dict(embed_dim=16, vision_width=64, vision_layers=2, transformer_width=64,
                                       transformer_heads=1, transformer_layers=1)


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(world, "TRAIN_SCENES", 3)
    monkeypatch.setattr(world, "VAL_SCENES", 4)
    monkeypatch.setattr(world, "TEST_SCENES", 4)


def files_in(root) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------ scenes

def test_scene_is_always_the_same():
    """A function of split and number: however many were drawn before, whatever the global generators say."""
    image, truth = world.scene("val", 3)
    np.random.seed(1)
    world.scene("val", 4)
    again, truth_again = world.scene("val", 3)
    assert np.array_equal(image, again) and np.array_equal(truth, truth_again)
    assert image.shape == (96, 128, 3) and truth.shape == (96, 128) and image.dtype == truth.dtype == np.uint8


def test_scenes_differ_between_numbers_and_splits():
    images = [world.scene(split, number)[0] for split in ("train", "val", "test")
              for number in range(4)]
    assert len({image.tobytes() for image in images}) == 12


def test_every_class_occurs_in_few_scenes_and_every_pixel_has_one():
    """Things as well as stuffs; no value beyond the classes, nothing unlabelled."""
    seen = np.zeros(256, int)
    for number in range(60):
        seen += np.bincount(world.scene("val", number)[1].ravel(), minlength=256)
    assert len(world.CLASSES) == 16 and (seen[:16] > 200).all() and seen[16:].sum() == 0


def test_truth_lies_where_the_picture_shows_it():
    """A thing on a plain picture: colours change exactly where the label names it, up to smoothed edges."""
    for number, name in enumerate(world.THINGS):
        canvas = world.Canvas(96, 128)
        canvas.label.paste(255, (0, 0, 128, 96))
        canvas.thing(name, 60, 48, 50, np.random.default_rng(number))
        image, label = canvas.finish()
        painted = image.any(axis=-1)
        named = label == world.CLASSES.index(name)
        assert set(np.unique(label)) == {world.CLASSES.index(name), 255} and named.sum() > 200
        assert (painted & named).sum() / (painted | named).sum() > 0.8, name


def test_added_classes_are_drawn(monkeypatch):
    """A new stuff and a new thing occur in scenes, under the right number, once they are in the tables."""
    monkeypatch.setitem(world.STUFF, "snow", (250, 250, 255))
    monkeypatch.setitem(world.TEXTURES, "snow", lambda H, W, rng: np.full((H, W, 3), 250.0))
    monkeypatch.setitem(world.THINGS, "kite", ((0, 120, 120), ("sky",)))
    monkeypatch.setitem(world.DRAWINGS, "kite", world.sun)
    monkeypatch.setattr(world, "CLASSES", [*world.STUFF, *world.THINGS])
    seen = np.zeros(18, int)
    for number in range(40):
        seen += np.bincount(world.scene("train", number)[1].ravel(), minlength=18)
    assert world.CLASSES[6] == "snow" and world.CLASSES[17] == "kite" and (seen > 200).all()


# ------------------------------------------------------------------------------------------ captions

@pytest.fixture
def painted(monkeypatch):
    """The names of what is painted on a canvas, in order."""
    names = []
    stuff, thing = world.Canvas.stuff, world.Canvas.thing

    def stuff_and_note(canvas, name, top, bottom, *args):
        if bottom > top:
            names.append(name)
        stuff(canvas, name, top, bottom, *args)

    def thing_and_note(canvas, name, *args):
        names.append(name)
        thing(canvas, name, *args)

    monkeypatch.setattr(world.Canvas, "stuff", stuff_and_note)
    monkeypatch.setattr(world.Canvas, "thing", thing_and_note)
    return names


def test_caption_names_only_what_is_in_the_picture(painted):
    """All things are named; of stuffs behind things at most one, in about one caption of seven."""
    rng = np.random.default_rng(0)
    with_things = with_ground = 0
    for _ in range(400):
        painted.clear()
        picture, caption = world.captioned_picture(rng)
        named = caption.replace(" and the ", " ").replace(" on the ", " ").split()
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        assert set(named) <= set(painted) and len(set(named)) == len(named) > 0, (caption, painted)
        things = [name for name in painted if name in world.THINGS]
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
    pictures, captions = pretrain.draw_chunk((0, 500, 6))
    again, captions_again = pretrain.draw_chunk((0, 500, 6))
    other, _ = pretrain.draw_chunk((1, 500, 6))
    assert pictures.shape == (6, 64, 64, 3) and captions == captions_again and np.array_equal(pictures, again)
    assert not np.array_equal(pictures, other)


def test_pretraining_pictures_are_the_chunks_in_order():
    """Count pictures, also where the last chunk is smaller, each with its own caption."""
    pictures, captions = pretrain.pretraining_pictures(seed=0, count=503)
    assert pictures.shape == (503, 64, 64, 3) and len(captions) == 503
    last, last_captions = pretrain.draw_chunk((0, 500, 3))
    assert np.array_equal(pictures[500:], last) and captions[500:] == last_captions


# ------------------------------------------------------------------------------------ the dataset on disk

def test_drawn_dataset_holds_no_truth_of_training_scenes(tmp_path, few_scenes):
    """Labels of val and test alone: what trains could not read a label if it wanted to."""
    root = world.draw_dataset(tmp_path)
    assert root == tmp_path / "toyland"
    assert files_in(root) == sorted([*(f"images/train/000{i}.png" for i in range(3)),
                                     *(f"{kind}/{split}/000{i}.png" for kind in ("images", "labels")
                                       for split in ("val", "test") for i in range(4))])


def test_drawn_files_are_the_scenes(tmp_path, few_scenes):
    """Pixel by pixel, image and index label, found by datasets/ under their ids."""
    root = str(tmp_path)
    pictures = images.image_files("toyland", root, "val")
    truths = labels.true_label_files("toyland", root, "val", list(pictures))
    assert list(pictures) == list(truths) == [f"000{i}" for i in range(4)]
    assert list(images.training_images("toyland", root)) == [f"000{i}" for i in range(3)]
    image, truth = world.scene("val", 2)
    assert np.array_equal(np.asarray(images.read_image(pictures["0002"])), image)
    read_label = labels.LabelReader("toyland", 16)
    assert np.array_equal(read_label(truths["0002"], (96, 128)), truth)


def test_missing_file_is_drawn_again_and_others_are_kept(tmp_path, few_scenes):
    """A dataset that was half deleted, or whose drawing was interrupted, is completed."""
    root = world.draw_dataset(tmp_path)
    content = {name: (root / name).read_bytes() for name in files_in(root)}
    for name in ("images/train/0001.png", "labels/val/0003.png"):
        (root / name).unlink()
    kept = root / "images/train/0000.png"
    os.utime(kept, ns=(1, 1))
    world.draw_dataset(tmp_path)
    assert {name: (root / name).read_bytes() for name in files_in(root)} == content
    assert kept.stat().st_mtime_ns == 1


def test_scenes_of_another_world_are_drawn_anew(tmp_path, few_scenes, monkeypatch):
    """Who changes the drawing (exercise: add a class) gets new scenes, not those of yesterday."""
    root = world.draw_dataset(tmp_path)
    content = {name: (root / name).read_bytes() for name in files_in(root)}
    monkeypatch.setitem(world.TEXTURES, "sky", lambda H, W, rng: 255 - world.sky(H, W, rng))
    world.draw_dataset(tmp_path)
    changed = {name for name in files_in(root) if (root / name).read_bytes() != content[name]}
    assert any(name.startswith("images/train") for name in changed)
    assert any(name.startswith("images/val") for name in changed)
    assert not any(name.startswith("labels") for name in changed)           # the same shapes, other textures


def test_folder_of_two_splits_gains_the_third(tmp_path, few_scenes):
    """Data that was drawn before there was a split "test": what is there stays as it is."""
    root = world.draw_dataset(tmp_path)
    content = {name: (root / name).read_bytes() for name in files_in(root)}
    for kind in ("images", "labels"):
        shutil.rmtree(root / kind / "test")
    for name in files_in(root):
        os.utime(root / name, ns=(1, 1))
    world.draw_dataset(tmp_path)
    assert {name: (root / name).read_bytes() for name in files_in(root)} == content
    assert {name.split("/")[1] for name in content if (root / name).stat().st_mtime_ns != 1} == {"test"}


def test_folder_of_two_splits_of_another_world_is_drawn_anew(tmp_path, few_scenes, monkeypatch):
    """Its new third split alone would hide that the other two are old."""
    content = {name: (tmp_path / "new/toyland" / name).read_bytes()
               for name in files_in(world.draw_dataset(tmp_path / "new"))}
    with monkeypatch.context() as patch:
        patch.setitem(world.TEXTURES, "sky", lambda H, W, rng: 255 - world.sky(H, W, rng))
        root = world.draw_dataset(tmp_path / "old")
    for kind in ("images", "labels"):
        shutil.rmtree(root / kind / "test")
    world.draw_dataset(tmp_path / "old")
    assert {name: (root / name).read_bytes() for name in files_in(root)} == content


def test_both_class_lists_are_of_the_same_files(tmp_path, few_scenes):
    """The ten things keep name and colour; in a label file stuffs are ignored, and things count from 0."""
    root, things = str(tmp_path), DATASETS["toyland-things"]
    assert things.names == [*world.THINGS] and things.palette == world.PALETTE[6:]
    for split in ("train", "val", "test"):
        both = [images.image_files(name, root, split) for name in ("toyland", "toyland-things")]
        assert both[0] == both[1]
    truths = [labels.true_label_files(name, root, "test", ["0002"]) for name in ("toyland", "toyland-things")]
    assert truths[0] == truths[1] and "0002" in truths[0]
    found = labels.LabelReader("toyland-things", 10)(truths[0]["0002"], (96, 128))
    truth = world.scene("test", 2)[1].astype(int)
    assert (truth < 6).any() and np.array_equal(found, np.where(truth < 6, IGNORE, truth - 6))
    table = labels.lookup_table("toyland-things", 10)
    assert table[:17].tolist() == [IGNORE] * 6 + [*range(10)] + [-1] and table[IGNORE] == IGNORE


def test_what_is_said_of_stuff_changes_no_number_of_the_things(tmp_path, few_scenes):
    truth = torch.from_numpy(labels.lookup_table("toyland-things", 10)[world.scene("test", 2)[1]])
    said = torch.randint(10, truth.shape, generator=torch.Generator().manual_seed(0))
    before = evaluate.confusion_matrix(truth, said, 10)
    other = torch.where(truth == IGNORE, (said + 1) % 10, said)
    assert not torch.equal(other, said) and torch.equal(evaluate.confusion_matrix(truth, other, 10), before)
    other = torch.where(truth == IGNORE, said, (said + 1) % 10)
    assert not torch.equal(evaluate.confusion_matrix(truth, other, 10), before)


def test_interrupted_drawing_leaves_no_half_picture(tmp_path, few_scenes, monkeypatch):
    """Ctrl-C in the middle of a file: what has a name is whole."""
    def interrupted(self, file, *_args, **_how):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        world.draw_dataset(tmp_path)
    assert files_in(tmp_path) == []


def test_command_draws_the_dataset_and_an_overview(tmp_path, few_scenes, capsys):
    world.main(world.flags().parse_args(["--root", str(tmp_path)]))
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
    to_images = -np.mean([np.mean([log_share([row[k] for row in logits], i)
                                   for i in range(7) if caption[i] == k]) for k in range(3)])
    found = pretrain.caption_loss(images, texts, torch.tensor(caption), torch.tensor(scale))
    assert found.item() == pytest.approx((to_texts + to_images) / 2, rel=1e-5)


def test_caption_loss_of_different_captions_is_clips():
    """Where no two captions are equal it is CLIP's own symmetric cross-entropy."""
    torch.manual_seed(0)
    images, texts = F.normalize(torch.randn(4, 5), dim=-1), F.normalize(torch.randn(4, 5), dim=-1)
    logits, diagonal = 10 * images @ texts.T, torch.arange(4)
    expected = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
    assert torch.allclose(pretrain.caption_loss(images, texts, diagonal, torch.tensor(10.0)), expected)


@pytest.fixture(scope="module")
def small_clip():
    torch.manual_seed(0)
    return clip.CLIP(**TINY_CLIP).eval().requires_grad_(False)


def test_patch_dropout_of_nothing_is_encode_image(small_clip):
    """Up to rounding: encode_image runs the last block for the class token alone."""
    images = torch.randn(3, 3, 64, 64)
    whole = small_clip.encode_image(images)
    assert torch.allclose(pretrain.encode_some_patches(small_clip, images, dropout=0.0), whole, atol=1e-5)


def test_patch_dropout_keeps_the_class_token_and_a_share_of_the_patches(small_clip, monkeypatch):
    """65 % of 64 patches are dropped, others in every picture; the class token, which is read, never is."""
    seen = []
    monkeypatch.setattr(small_clip.visual.transformer, "forward", lambda x: seen.append(x) or x)
    images = torch.randn(5, 3, 64, 64)
    pretrain.encode_some_patches(small_clip, images, dropout=0.65)
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
    pictures = np.stack([world.scene("val", i)[0][:64, :64] for i in range(12)])
    torch.manual_seed(0)
    flipped = []
    for found, picture in zip(pretrain.to_batch(pictures), pictures):
        expected = data.to_tensor(Image.fromarray(picture))
        mirrored = torch.allclose(found, expected.flip(dims=(2,)), atol=1e-5)
        assert mirrored or torch.allclose(found, expected, atol=1e-5)
        flipped.append(mirrored)
    assert 0 < sum(flipped) < 12


def test_pretraining_follows_its_seed_and_its_shipped_file_is_a_clip(tmp_path, monkeypatch):
    """A few steps of the real loop; the file has zero rows for words that no caption used, and `small_clip`
    reads it."""
    monkeypatch.setattr(pretrain, "SMALL_CLIP", TINY_CLIP)
    monkeypatch.setattr(pretrain, "BATCH", 32)
    pictures, captions = pretrain.draw_chunk((0, 0, 64))
    model = pretrain.pretrain(pictures, captions, epochs=2, seed=0, out=tmp_path / "a")
    again = pretrain.pretrain(pictures, captions, epochs=2, seed=0, out=tmp_path / "b")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    files.save(tmp_path / "clip.pt", networks.weights_to_ship(model, captions))
    assert (tmp_path / "clip.pt").stat().st_size < 2_000_000            # the dense table alone takes 6 MB
    monkeypatch.setattr(networks, "CLIP_WEIGHTS", tmp_path / "clip.pt")
    loaded = networks.small_clip()
    texts = clip.tokenize(["the car and the tree.", "a photo of the sky."])
    assert torch.allclose(loaded.encode_text(texts), model.encode_text(texts), rtol=0.02, atol=0.02)
    table = loaded.token_embedding.weight
    assert table.shape == (49408, 64) and 10 < table.any(dim=1).sum() < 100


def test_rows_of_used_tokens_fill_the_table(tmp_path, monkeypatch):
    """The file holds some rows of the embedding table and says which: they get their places, others are zero.
    All other tensors are as in the file, whatever its precision; the model is in eval mode."""
    state = openai_state(**SMALLEST)
    rows = torch.randn(3, SMALLEST["text_width"])
    compact = state | {"token_embedding.weight": rows, "token_embedding.used": torch.tensor([7, 320, 49407])}
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in compact.items()}
    monkeypatch.setattr(networks, "CLIP_WEIGHTS", tmp_path / "clip.pt")
    with pytest.raises(FileNotFoundError):
        networks.small_clip()
    for content in (compact, half):
        torch.save(content, tmp_path / "clip.pt")
        model = networks.small_clip()
        table = torch.zeros(49408, SMALLEST["text_width"])
        table[7], table[320], table[49407] = content["token_embedding.weight"].float()
        expected = {name: tensor.float() for name, tensor in content.items()}
        del expected["token_embedding.used"]
        expected["token_embedding.weight"] = table
        found = model.state_dict()
        assert found.keys() == expected.keys() and not model.training
        assert all(found[name].dtype == torch.float32 and torch.equal(found[name], tensor)
                   for name, tensor in expected.items())


def test_shipped_files_are_of_this_world():
    """clip.pt has the sizes that networks.py names; resnet.pt has an output for every class."""
    shapes = {name: tensor.shape for name, tensor in clip.CLIP(**networks.SMALL_CLIP).state_dict().items()}
    found = networks.small_clip()
    assert {name: tensor.shape for name, tensor in found.state_dict().items()} == shapes
    assert all(tensor.isfinite().all() for tensor in found.state_dict().values())
    words = clip.tokenize(world.CLASSES)[:, 1].long()
    assert found.token_embedding.weight[words].any(dim=1).all()         # every class name was learned
    assert networks.small_resnet().fc.out_features == len(world.CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [0, 2, 3, 5])
def test_stopped_pretraining_goes_on_to_the_same_bits(tmp_path, monkeypatch, stop):
    """Ctrl-C in the first step, within an epoch, at its end and in the last step: order, flips, templates,
    dropped patches and the schedule go on as if nothing had happened, for CLIP and for the ResNet."""
    monkeypatch.setattr(pretrain, "SMALL_CLIP", TINY_CLIP)
    monkeypatch.setattr(pretrain, "BATCH", 16)
    pictures, captions = pretrain.draw_chunk((0, 0, 48))
    done = runs.Training.done

    def done_and_stop(self, **losses):
        if self.step == stop:
            self.ask_to_stop()
        done(self, **losses)

    for train in (pretrain.pretrain, pretrain.pretrain_resnet):
        whole = train(pictures, captions, 2, 0, tmp_path / "whole")
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(runs.Training, "done", done_and_stop)
            train(pictures, captions, 2, 0, tmp_path / "broken")
        stage = "pretrain" if train is pretrain.pretrain else "pretrain_resnet"
        folder = runs.run_folder(tmp_path / "broken", "toyland", stage)
        assert (folder / "unfinished/state.pt").exists() and not (folder / "checkpoint.pt").exists()
        torch.manual_seed(99)
        found = train(pictures, captions, 2, 0, tmp_path / "broken", resume=True)
        assert (folder / "checkpoint.pt").exists() and not (folder / "unfinished").exists()
        assert all(torch.equal(tensor, found.state_dict()[name])
                   for name, tensor in whole.state_dict().items())
        with pytest.raises(ValueError, match="another"):
            train(1 + pictures, captions, 2, 0, tmp_path / "broken", resume=True)


# ------------------------------------------------------------------------------------------ the small ResNet

@pytest.mark.parametrize("height, width", [(64, 64), (96, 128), (100, 75)])
def test_small_resnet_has_output_stride_8(height, width):
    """32, 64, 128, 128 channels at strides 4, 8, 8, 8: dilation in place of the last two strides."""
    resnet = networks.small_resnet(pretrained=False).eval()
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(torch.randn(1, 3, height, width)))))
    for layer, channels, stride in ((resnet.layer1, 32, 4), (resnet.layer2, 64, 8), (resnet.layer3, 128, 8),
                                    (resnet.layer4, 128, 8)):
        x = layer(x)
        assert x.shape == (1, channels, -(-height // stride), -(-width // stride))
    assert resnet.fc.in_features == 128 and resnet.fc.out_features == 16
    layers = resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4
    assert [layer[-1].conv2.dilation for layer in layers] == [(1, 1), (1, 1), (2, 2), (4, 4)]


def test_small_resnet_reads_its_half_precision_weights(tmp_path, monkeypatch):
    """Every tensor, the counters of BatchNorm included; a missing file is an error, not a fresh start."""
    torch.manual_seed(0)
    expected = networks.small_resnet(pretrained=False).state_dict()
    monkeypatch.setattr(networks, "RESNET_WEIGHTS", tmp_path / "resnet.pt")
    with pytest.raises(FileNotFoundError):
        networks.small_resnet()
    torch.save({name: tensor.half() if tensor.is_floating_point() else tensor
                for name, tensor in expected.items()}, tmp_path / "resnet.pt")
    found = networks.small_resnet().state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == tensor.dtype and torch.allclose(found[name], tensor, atol=1e-3)
               for name, tensor in expected.items())


def test_resnet_of_another_world_is_refused(monkeypatch):
    """Who adds a class and forgets to train again is told so, not shown a mismatch of shapes."""
    monkeypatch.setattr(networks, "CLASSES", [*world.CLASSES, "kite"])
    known = len(world.CLASSES)
    with pytest.raises(ValueError, match=f"{known + 1} classes, found {known}.*python toyland/pretrain.py"):
        networks.small_resnet()


def test_resnet_learns_the_words_of_the_captions(tmp_path, monkeypatch):
    """The targets are the names in the caption and nothing else; the same seed gives the same weights."""
    targets = []
    loss = F.binary_cross_entropy_with_logits
    monkeypatch.setattr(pretrain.F, "binary_cross_entropy_with_logits",
                        lambda x, y: targets.append(y) or loss(x, y))
    monkeypatch.setattr(pretrain, "BATCH", 4)
    pictures, _ = pretrain.draw_chunk((0, 0, 4))
    captions = ["car and the tree on the grass", "sky", "bus", "sky and the sun"]
    resnet = pretrain.pretrain_resnet(pictures, captions, epochs=1, seed=0, out=tmp_path / "a")
    named = [[world.CLASSES[k] for k in row.nonzero().flatten().tolist()] for row in targets[0]]
    assert named == [["grass", "tree", "car"], ["sky"], ["bus"], ["sky", "sun"]]
    again = pretrain.pretrain_resnet(pictures, captions, epochs=1, seed=0, out=tmp_path / "b")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in resnet.state_dict().items())
