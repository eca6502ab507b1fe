"""CLIP-S4 (paper/clip_s4.py): every loss against a slow loop, views and segments, whole runs in small.

    python -m pytest tests/test_clip_s4.py           # seconds; `-m slow` is among them: runs of the script

    V views · P pixels of all views · S segments · C known classes · U unknown · D joint dimension
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from helpers import VOC_BASE, random, refusal, relative, run, unit, write_voc_tree
from harness import runs
from paper import clip_s4, reproduce
from paper.reported import CLIP_S4, CLIP_S4_TEXT
from test_reproduce import in_this_process

RECIPE = clip_s4.Recipe(backbone="small", regions=(2, 3), clusters=(2, 2), view=(48, 64), unknown=5)
P, S, C, U, D = 40, 9, 3, 5, 8


# ---------------------------------------------------------------------------- the losses

def test_contrastive_loss_is_the_formula():
    """Pixel by pixel, segment by segment, with plain exponentials."""
    z, v = unit(P, D), unit(S, D, seed=1)
    of_segment = torch.arange(S) % 4                            # regions 0 to 3, two or three segments each
    of_pixel = torch.arange(P) % 4
    total = 0.0
    for p in range(P):
        own = everything = 0.0
        for s in range(S):
            term = math.exp(16 * sum(z[p, d].item() * v[s, d].item() for d in range(D)))
            everything += term
            own += term if of_segment[s] == of_pixel[p] else 0.0
        total += -math.log(own / everything)
    found = clip_s4.contrastive_loss(z, v, of_pixel, of_segment, 16.0)
    assert relative(found, torch.tensor(total / P)) < 1e-5


def test_contrastive_loss_is_finite_at_any_scale_and_nothing_to_a_lone_region():
    z, v = unit(P, D).requires_grad_(), unit(S, D, seed=1)
    loss = clip_s4.contrastive_loss(z, v, torch.arange(P) % 2, torch.arange(S) % 2, 1e4)
    loss.backward()
    assert loss.isfinite() and z.grad.isfinite().all() and z.grad.any()
    one = torch.zeros(P).long(), torch.zeros(S).long()          # all are positives: no other region is there
    assert clip_s4.contrastive_loss(z, v, *one, 16.0).abs() < 1e-5


def test_embedding_loss_is_the_formula():
    v, c = unit(S, D), unit(S, D, seed=1)
    expected = sum(1 - F.cosine_similarity(v[s], c[s], dim=0) for s in range(S)) / S
    assert relative(clip_s4.embedding_loss(v, c), expected) < 1e-5


def test_semantic_loss_is_the_cross_entropy_against_the_nearest_prototype():
    v, c, prototypes = unit(S, D), unit(S, D, seed=1), unit(C + U, D, seed=2)
    total = 0.0
    for s in range(S):
        to_clip = [float(c[s] @ prototype) for prototype in prototypes]
        logits = [100 * float(v[s] @ prototype) for prototype in prototypes]
        highest = max(logits)
        partition = highest + math.log(sum(math.exp(logit - highest) for logit in logits))
        total += partition - logits[to_clip.index(max(to_clip))]
    pseudo_label = clip_s4.nearest_prototype(c, prototypes)
    found = clip_s4.semantic_loss(v, prototypes, pseudo_label, 100.0)
    assert relative(found, torch.tensor(total / S)) < 1e-5


# ---------------------------------------------------------------------------- prototypes

def test_known_prototypes_are_means_of_the_segments_most_like_the_words():
    segments, query = unit(30, D), unit(C, D, seed=1)
    found = clip_s4.known_prototypes(segments, query, most_similar=4)
    for k in range(C):
        best = sorted(segments, key=lambda segment: -float(segment @ query[k]))[:4]
        assert relative(found[k], F.normalize(sum(best), dim=0)) < 1e-5
    few = clip_s4.known_prototypes(segments[:2], query, most_similar=4)     # fewer segments than m: all
    assert relative(few, F.normalize(segments[:2].mean(dim=0), dim=0).expand(C, D)) < 1e-5


def test_unknown_prototypes_are_pulled_to_their_segments_and_known_ones_stay():
    prototypes, c = unit(C + U, D), unit(S, D, seed=1)
    pseudo_label = torch.tensor([0, 0, 1, 4, 4, 4, 6, 7, 7])    # two known classes; 4, 6, 7; nobody is 3 or 5
    found = clip_s4.pulled(prototypes, c, pseudo_label, known=C, rate=0.3)
    for k in range(C + U):
        own = [c[s] for s in range(S) if pseudo_label[s] == k]
        expected = prototypes[k]
        if k >= C and own:
            expected = F.normalize(0.7 * expected + 0.3 * F.normalize(sum(own), dim=0), dim=0)
        assert relative(found[k], expected) < 1e-5
    assert torch.equal(found[[0, 1, 2, 3, 5]], prototypes[[0, 1, 2, 3, 5]])


# ---------------------------------------------------------------------------- regions, views, segments

def test_spherical_kmeans_is_the_loop():
    vectors, (rows, columns) = random(2, 5, 6, 8), (2, 2)
    found = clip_s4.spherical_kmeans(vectors, (rows, columns), iterations=4)
    for image, nearest in zip(vectors, found):
        blocks = [image[:, 3 * i:3 * i + 3, 4 * j:4 * j + 4].flatten(1).mean(dim=1)
                  for i in range(rows) for j in range(columns)]
        points = F.normalize(image.flatten(1), dim=0).T                                     # (48, 5)
        for _ in range(4):
            best = [max(range(4), key=lambda n: float(F.cosine_similarity(point, blocks[n], dim=0)))
                    for point in points]
            for n in range(4):
                own = [point for point, choice in zip(points, best) if choice == n]
                blocks[n] = sum(own, torch.zeros(5))
        assert nearest.flatten().tolist() == best


def test_regions_follow_colours_and_no_two_images_share_one():
    """Left and right half in two colours that lie far apart: no region has places of both."""
    images = torch.zeros(2, 3, 48, 64)
    images[:, :, :, 24:] = 2.0
    regions = clip_s4.regions_of(images, replace(RECIPE, region_colour=4.0))                # (2, 12, 16)
    left, right = regions[:, :, :6].unique().tolist(), regions[:, :, 6:].unique().tolist()
    assert not set(left) & set(right)
    assert not set(regions[0].flatten().tolist()) & set(regions[1].flatten().tolist())
    flat = clip_s4.regions_of(images[:1] * 0, RECIPE)[0]        # one colour: the grid itself, 2 × 3 blocks
    assert flat[0, 0] == flat[5, 4] and len({int(flat[y, x]) for y in (2, 9) for x in (2, 8, 13)}) == 6


def test_segments_are_clusters_split_by_regions():
    """Two places are of one segment where view, cluster and region are equal."""
    z, regions = unit(2, D, 6, 8, dim=1), torch.arange(2 * 48).view(2, 6, 8) % 3
    segments = clip_s4.segments_of(z, regions, RECIPE)
    vectors = torch.cat([z, RECIPE.cluster_place * clip_s4.place(z)], dim=1)
    cluster = clip_s4.spherical_kmeans(vectors, RECIPE.clusters, RECIPE.iterations)
    whose = {(v, int(cluster[v, y, x]), int(regions[v, y, x])): int(segments[v, y, x])
             for v in range(2) for y in range(6) for x in range(8)}
    assert all(whose[v, int(cluster[v, y, x]), int(regions[v, y, x])] == segments[v, y, x]
               for v in range(2) for y in range(6) for x in range(8))
    assert sorted(whose.values()) == list(range(len(whose)))      # none is left out


def test_segment_means_are_means_of_length_one():
    z, segments = unit(P, D), torch.arange(P) % S
    found = clip_s4.segment_means(z, segments)
    for s in range(S):
        assert relative(found[s], F.normalize(sum(z[p] for p in range(P) if segments[p] == s), dim=0)) < 1e-5


def test_views_cut_out_and_flip_maps_of_every_grid_alike():
    """A map that holds its own place: what comes through a view is the place that the view's matrix names."""
    noise = torch.Generator().manual_seed(0)
    views = clip_s4.draw_views(16, (0.5, 0.85), noise)
    assert {float(one) for one in views[:, 0, 0].sign()} == {-1.0, 1.0}                     # some are flipped
    for size in ((40, 64), (10, 16)):
        y, x = ((torch.arange(side) + 0.5) * 2 / side - 1 for side in size)     # centres of the map's cells
        maps = torch.stack(torch.meshgrid(y, x, indexing="ij")).expand(16, 2, *size)
        found = clip_s4.seen_through(views, maps, (6, 9))                                   # (16, 2, 6, 9)
        for v in range(16):
            for i in range(6):
                for j in range(9):
                    seen = torch.tensor([(j + 0.5) * 2 / 9 - 1, (i + 0.5) * 2 / 6 - 1, 1.0])    # x, y, 1
                    X, Y = (views[v] @ seen).tolist()
                    assert -1 <= X <= 1 and -1 <= Y <= 1, "a view leaves its image"
                    limit = 1 - 1 / size[1], 1 - 1 / size[0]            # beyond the last centre: its value
                    assert abs(found[v, 1, i, j] - max(-limit[0], min(limit[0], X))) < 1e-4
                    assert abs(found[v, 0, i, j] - max(-limit[1], min(limit[1], Y))) < 1e-4


def test_colours_change_and_nothing_else():
    images, noise = random(4, 3, 8, 8), torch.Generator().manual_seed(0)
    assert torch.equal(clip_s4.recoloured(images, 0.0, noise), images)
    other = clip_s4.recoloured(images, 0.4, noise)
    for image, one in zip(images, other):                       # a line per channel, of one slope
        slopes = [(one[k] - one[k].mean()) / (image[k] - image[k].mean()) for k in range(3)]
        assert relative(torch.stack(slopes), slopes[0].mean().expand(3, 8, 8)) < 1e-3
    assert len({round(float((one - image).mean()), 4) for image, one in zip(images, other)}) == 4


# ---------------------------------------------------------------------------- a step, a run

def test_every_loss_reaches_the_network_and_prototypes_keep_their_length():
    torch.manual_seed(0)
    model = clip_s4.Embedder("small", unit(C + U, D), pretrained=False).train()
    before, images = model.prototypes.clone(), random(2, 3, 64, 96)
    features = F.normalize(random(2, D, 8, 12, seed=1), dim=1)
    losses = clip_s4.train_step(model, features, images, C, RECIPE, torch.Generator().manual_seed(1))
    weighed = RECIPE.contrast_weight * losses["contrast"] + losses["embedding"] \
        + RECIPE.semantic_weight * losses["semantic"]
    assert relative(losses["loss"], weighed) < 1e-6
    for name in ("contrast", "embedding", "semantic"):
        model.zero_grad()
        losses[name].backward(retain_graph=True)
        assert all(parameter.grad.any() for parameter in model.aspp.parameters()), name
    assert torch.equal(model.prototypes[:C], before[:C]) and not torch.equal(model.prototypes, before)
    assert relative(model.prototypes.norm(dim=1), torch.ones(C + U)) < 1e-5
    assert not model.prototypes.requires_grad


def test_a_pixel_has_the_region_and_the_clip_feature_of_its_place_in_the_image(monkeypatch):
    """In both views, whatever was cut out and flipped."""
    model = clip_s4.Embedder("small", unit(C + U, 2), pretrained=False).eval()
    images, given = random(2, 3, 64, 96), {}
    regions = clip_s4.regions_of(images, RECIPE)                                            # (2, 16, 24)
    x = torch.linspace(-0.9, 0.9, 12).expand(2, 1, 8, 12)                   # "CLIP" sees where a patch lies
    features = F.normalize(torch.cat([x, torch.ones_like(x)], dim=1), dim=1)
    split, mean = clip_s4.segments_of, clip_s4.segment_means

    def kept(name, function):
        def called(first, *others):
            given.setdefault(name, []).append((first, *others))
            return function(first, *others)
        monkeypatch.setattr(clip_s4, function.__name__, called)

    kept("split", split)
    kept("mean", mean)
    clip_s4.train_step(model, features, images, C, RECIPE, torch.Generator().manual_seed(1))
    views = clip_s4.draw_views(4, RECIPE.view_scale, torch.Generator().manual_seed(1))
    [(_, of_pixels, _)], [_, (seen, _)] = given["split"], given["mean"]             # (4, 6, 8), (P, D)
    seen = seen.view(4, 6, 8, 2)
    for v in range(4):
        for i in range(6):
            for j in range(8):
                X, Y = (views[v] @ torch.tensor([(j + 0.5) / 4 - 1, (i + 0.5) / 3 - 1, 1.0])).tolist()
                place = int((Y + 1) * 8 + 0.001), int((X + 1) * 12 + 0.001)
                near = int((Y + 1) * 8 - 0.001), int((X + 1) * 12 - 0.001)
                assert of_pixels[v, i, j] in (regions[v % 2][place], regions[v % 2][near])
                expected = max(-0.9, min(0.9, X * 0.9 * 12 / 11))
                assert abs(seen[v, i, j, 0] / seen[v, i, j, 1] - expected) < 0.05


@pytest.fixture
def voc(place, tiny_clip):
    write_voc_tree(place / "data")
    return ["--data", "voc", "--clip", tiny_clip]


def weights(out: str = "runs") -> dict[str, torch.Tensor]:
    return runs.load(Path(out, "voc/clip_s4/checkpoint.pt"), "clip_s4")["weights"]


@pytest.mark.slow
def test_run_measures_text_and_prototypes_and_goes_on_to_the_same_bits(voc, capsys, monkeypatch):
    run(clip_s4, *voc)
    said, numbers = capsys.readouterr().out, json.loads(Path("runs/voc/clip_s4/metrics.json").read_text())
    for row, value in (("CLIP-S4 by prototype", numbers["miou"]), ("CLIP-S4 by text", numbers["miou_text"])):
        assert f"{row:22}{value:7.1f}" in said
    assert "MaskCLIP" in said and Path("runs/voc/clip_s4/preview.png").exists()
    done = runs.Training.done

    def stopped(training, **losses):
        done(training, **losses)
        if training.step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs.Training, "done", stopped)
        run(clip_s4, *voc, "--out", "again")
    assert not Path("again/voc/clip_s4/checkpoint.pt").exists()
    run(clip_s4, *voc, "--out", "again", "--resume")
    expected, found = weights(), weights("again")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "resume" not in refusal(capsys, clip_s4, *voc, "--out", "again", "--resume", "--epochs", "3")


@pytest.mark.slow
def test_labels_change_no_weight(voc):
    run(clip_s4, *voc)
    shutil.rmtree(Path("data", VOC_BASE, "SegmentationClass"))
    run(clip_s4, *voc, "--out", "without")
    assert not Path("without/voc/clip_s4/metrics.json").exists()
    expected, found = weights(), weights("without")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_reproduction_trains_it_once_and_reads_both_numbers(voc, monkeypatch):
    monkeypatch.setattr(reproduce, "start", in_this_process)
    args = reproduce.flags().parse_args([*map(str, voc), "--device", "cpu", "--jobs", "1"])
    made, cells = reproduce.Reproduction(args), [CLIP_S4, CLIP_S4_TEXT]
    made.open()
    jobs = made.missing(cells, seeds=2)
    assert jobs == [reproduce.Job("clip-s4", "clip_s4", seed) for seed in (0, 1)]
    assert made.values(cells, 2) == {} and made.run(jobs) == [] and made.missing(cells, 2) == []
    numbers = [json.loads((made.folder(job) / "clip_s4/metrics.json").read_text()) for job in jobs]
    assert made.values(cells, 2) == {CLIP_S4: [one["miou"] for one in numbers],
                                     CLIP_S4_TEXT: [one["miou_text"] for one in numbers]}
    (made.folder(jobs[1]) / "clip_s4/checkpoint.pt").unlink()
    assert made.missing(cells, 2) == jobs[1:]
