"""paper/figures.py: what is handed to matplotlib, number by number, and the files that the command writes.

    python -m pytest tests/test_figures.py

No picture is compared with another: fonts and versions differ. The arrays behind the lines, cells and heat
maps do not.
"""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

import data
import evaluate
import rectify
from helpers import photo, refusal, run, write_photos, write_voc_tree
from paper import figures, run as paper_run, scores

STAGES = ["vanilla", "maskclip", "rectify", "distill"]
COUNTS = torch.tensor([4, 0, 9, 2])
CURVES = {stage: torch.tensor([0.5, torch.nan, 0.4, 0.1 * i], dtype=torch.float64)
          for i, stage in enumerate(STAGES)}
HAND = torch.tensor([[8, 2, 0], [0, 0, 0], [1, 0, 3]])


# ------------------------------------------------------------------------------------------ figure 1

def test_distance_figure_has_a_line_a_stage_and_a_bar_a_bin():
    """mIoU in percent at the bins' middles, gaps where no object is, each stage's two numbers in the
    legend."""
    axes, behind = figures.distance_figure(CURVES, COUNTS).axes
    assert len(axes.lines) == 4
    for line, text, (stage, curve) in zip(axes.lines, axes.get_legend().get_texts(), CURVES.items()):
        assert np.allclose(line.get_xdata(), [0.125, 0.375, 0.625, 0.875])
        assert np.allclose(line.get_ydata(), 100 * curve.numpy(), equal_nan=True)
        said = (f"{evaluate.STAGES[stage]}: space preference {scores.space_preference(curve):.2f}, slope "
                f"{scores.space_slope(curve, COUNTS):.2f}")
        assert text.get_text() == said.replace("-", "−") and "nan" not in said
    assert [bar.get_height() for bar in behind.patches] == COUNTS.tolist()
    assert "half diagonals" in axes.get_xlabel() and axes.get_ylabel() == "mIoU (percent)"
    assert "objects" in behind.get_ylabel()
    assert axes.get_zorder() > behind.get_zorder() and axes.get_xlim() == (0, 1) and axes.get_ylim()[0] == 0


def test_lines_are_told_apart_without_colour():
    """Another marker and another dash for every stage; and colours that differ in brightness from the white
    of the page."""
    assert set(figures.LINES) == set(evaluate.STAGES)
    for part in (0, 1, 2):
        assert len({style[part] for style in figures.LINES.values()}) == 4
    for colour, *_ in figures.LINES.values():
        assert np.dot(to_rgb(colour), (0.2126, 0.7152, 0.0722)) < 0.72


def test_confusion_figure_shows_the_shares_of_rows_side_by_side():
    """In percent, on one scale from 0 to 100; a class that the truth lacks is an empty row; class names on
    both axes."""
    other = torch.tensor([[5, 5, 0], [0, 9, 0], [0, 4, 0]])
    figure = figures.confusion_figure({"maskclip": HAND, "rectify": other}, ["a", "b", "c"])
    left, right, bar = figure.axes
    for axes, confusion in ((left, HAND), (right, other)):
        [picture] = axes.images
        expected = 100 * confusion.numpy() / np.maximum(1, confusion.numpy().sum(axis=1, keepdims=True))
        assert np.allclose(picture.get_array().filled(0), expected) and picture.get_clim() == (0, 100)
        assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b", "c"]
        assert axes.get_xlabel() == "predicted class"
    assert np.ma.getmaskarray(left.images[0].get_array())[1].all()
    assert "MaskCLIP, class preference" in left.get_title()
    assert f"{scores.class_preference(other):.2f}" in right.get_title()
    assert left.get_ylabel() == "true class" and "percent" in bar.get_ylabel()


def test_many_classes_are_drawn_without_their_names():
    """150 names would be a grey stripe."""
    left, *_ = figures.confusion_figure({"maskclip": torch.eye(150).long()},
                                        [f"class {i}" for i in range(150)]).axes
    assert left.images[0].get_array().shape == (150, 150)
    assert not any("class" in text.get_text() for text in left.get_xticklabels())


# ------------------------------------------------------------------------------------------ figure 3

POINTS = {"t": [[0.1, 44], [0, 31.5], [0.05, 46]], "r": [[0.5, 40], [0.25, 46]], "whole image": 33.0}


def written_points(folder, content):
    path = Path(folder, "points.json")
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_hypothesis_figure_shows_the_points_in_order_and_the_level_of_the_old_rule(tmp_path):
    """t in percent of windows, r as it is; the whole-image rule is a level line in both."""
    left, right = figures.hypothesis_figure(figures.read_points(written_points(tmp_path, POINTS))).axes
    assert np.allclose(left.lines[0].get_xydata(), [[0, 31.5], [5, 46], [10, 44]])
    assert np.allclose(right.lines[0].get_xydata(), [[0.25, 46], [0.5, 40]])
    for axes in (left, right):
        assert set(axes.lines[1].get_ydata()) == {33.0}
    assert "percent of an image's windows" in left.get_xlabel() and "window ratio r" in right.get_xlabel()
    assert left.get_ylabel() == "mIoU (percent)"


def test_points_of_one_kind_and_without_the_old_rule_are_enough(tmp_path):
    points = figures.read_points(written_points(tmp_path, {"r": [[0.25, 46]]}))
    [axes] = figures.hypothesis_figure(points).axes
    assert len(axes.lines) == 1 and "window ratio r" in axes.get_xlabel()


@pytest.mark.parametrize("content", [
    "", "[]", "{}", "7", '{"t": []}', '{"t": [1, 2]}', '{"t": [[1]]}', '{"t": [["a", 2]]}',
    '{"t": [[NaN, 2]]}', '{"r": [[1, 2]], "whole image": "x"}', '{"whole image": 3}'])
def test_points_of_another_form_are_refused(tmp_path, content):
    path = written_points(tmp_path, content)
    with pytest.raises(ValueError, match=f"--points {path}: expected .* found something else"):
        figures.read_points(path)


def test_points_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError,
                       match="expected a JSON file of measured points, found no such file"):
        figures.read_points(tmp_path / "points.json")


# ------------------------------------------------------------------------------------------ figure 4

def test_heat_figure_shows_each_map_and_one_range_a_column():
    """The image beside its four maps; equal values have equal colours in every row of a column."""
    generator = torch.Generator().manual_seed(0)
    rows = [(photo(40, 56, seed=i), f"class {i}", {kind: (1 + i) * torch.randn(5, 7, generator=generator)
                                                   for kind in figures.MAPS}) for i in range(3)]
    figure = figures.heat_figure(rows)
    panels = np.array(figure.axes[:20]).reshape(4, 5)
    for number, (picture, name, maps) in enumerate(rows):
        assert np.array_equal(panels[number, 0].images[0].get_array(), np.asarray(picture))
        assert panels[number, 0].get_ylabel() == name
        for column, kind in enumerate(figures.MAPS, start=1):
            [drawn] = panels[number, column].images
            assert np.allclose(drawn.get_array(), maps[kind].numpy()) and drawn.get_extent() == [0, 56, 40, 0]
            together = torch.cat([maps[kind] for *_, maps in rows])
            assert drawn.get_clim() == pytest.approx((together.min().item(), together.max().item()))
    for column, title in enumerate(figures.MAPS.values(), start=1):
        assert panels[0, column].get_title() == title
        # the colour bar
        assert panels[3, column].get_xlim() == pytest.approx(panels[0, column].images[0].get_clim())


@pytest.mark.parametrize("before, after, expected",
                         [([0, 0, 1, 2], [0, 0, 1, 2], 0), ([0, 0, 0, 1], [0, 2, 2, 2], 2),
                                                     ([3, 3, 3, 0], [0, 0, 1, 0], 3)])
def test_class_that_changes_most_is_the_one_whose_area_does(before, after, expected):
    assert figures.most_changed_class(torch.tensor([before]), torch.tensor([after])) == expected


def test_pairs_name_an_image_and_a_class():
    found = figures.parse_pairs(["val/0:car", "a:b:wet road"], ["val/0", "a:b"], ["car", "wet road"])
    assert found == [("val/0", 0), ("a:b", 1)]
    for wrong, which in (("val/1:car", "image"), ("val/0:bus", "class"), ("car", "image"), ("", "image")):
        with pytest.raises(ValueError, match=f"expected ID:CLASS, .*; found another {which}"):
            figures.parse_pairs([wrong], ["val/0"], ["car"])


# ------------------------------------------------------------------------------------------ files

def noise(height, width):
    file = io.BytesIO()
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(file, format="PNG")
    return file.getvalue()


def test_small_pictures_stay_as_they_are_and_large_ones_become_small_enough():
    """Noise is the worst a PNG can hold: first its colours go, then its size."""
    assert figures.small_enough(noise(50, 60), 300_000) == noise(50, 60)
    found = figures.small_enough(noise(600, 800), 300_000)
    assert len(found) <= 300_000
    with Image.open(io.BytesIO(found)) as picture:
        assert 300 < picture.height < 600
        assert picture.width / picture.height == pytest.approx(800 / 600, abs=0.01)
    with Image.open(io.BytesIO(figures.small_enough(noise(400, 500), 300_000))) as picture:
        assert picture.size == (500, 400) and picture.mode == "P"               # 256 colours were enough


# ------------------------------------------------------------------------------------------ the command

@pytest.fixture
def voc(trained_voc):
    return trained_voc


ALL = ["figure1_confusion.png", "figure1_distance.png", "figure3_hypothesis.png", "figure4_logits.png",
       "figure5_results.png"]


@pytest.mark.slow
def test_every_figure_of_the_newest_run_is_a_picture_of_readme_width(voc, capsys):
    """Five files of less than 300 kB; figure 3 from the points that it is given; nothing else is written."""
    paths = run(figures, "--points", written_points(voc, POINTS))
    said = capsys.readouterr().out
    assert sorted(os.listdir("runs/voc/figures")) == ALL == sorted(path.name for path in paths)
    for path in paths:
        assert 3_000 < path.stat().st_size < 300_000 and f"Wrote {path}" in said
        with Image.open(path) as picture:
            assert picture.format == "PNG" and picture.height > 200
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 20
            assert picture.width == 830 or path.name == "figure5_results.png" and picture.width > 830


def test_figures_show_what_scores_measures(voc, monkeypatch):
    """The curves and matrices handed to the drawing are those of scores.py, the maps those of the stage."""
    seen = {}
    for name in ("distance_figure", "confusion_figure", "heat_figure"):
        draw = getattr(figures, name)
        monkeypatch.setattr(figures, name, lambda *args, name=name, draw=draw:
                            seen.setdefault(name, args) and draw(*args))
    run(figures)
    written = run(scores)
    curves, counts, _ = seen["distance_figure"]
    assert list(curves) == STAGES and counts.tolist() == written["maskclip"]["curve"]["objects"]
    for stage, curve in curves.items():
        assert [scores.rounded(100 * value, 2) for value in curve.tolist()] == written[stage]["curve"]["miou"]
    confusions, names, _ = seen["confusion_figure"]
    assert list(confusions) == ["maskclip", "rectify"] and len(names) == 20
    for stage, confusion in confusions.items():
        assert scores.rounded(scores.class_preference(confusion)) == written[stage]["class_preference"]
    [rows] = seen["heat_figure"]
    # both validation images
    assert len(rows) == 2 and all(set(maps) == set(figures.MAPS) for *_, maps in rows)
    for _, name, maps in rows:
        assert name in names and torch.allclose(maps["rectified"], maps["query"] - maps["bias"])


def test_maps_are_those_that_the_stage_computes(voc):
    """M_o is what evaluate.py predicts with, M_q is MaskCLIP's, M_b is the same for every picture."""
    setup, query, *_ = scores.open_measured(figures.flags().parse_args(["--device", "cpu"]))
    picture = photo(40, 56, seed=5)
    found, other = (figures.logit_maps(setup, query, one) for one in (picture, photo(40, 56, seed=6)))
    image = data.to_tensor(data.short_side_to(picture, 32, 8))[None]
    predictors = evaluate.predictors(setup, query, ["maskclip", "rectify"])
    with torch.no_grad():
        logits = evaluate.logits_of_all(setup, predictors, image)
        assert torch.allclose(found["decoded"], logits["rectify"][0], atol=1e-5)
        assert torch.allclose(found["query"], logits["maskclip"][0], atol=1e-5)
    assert torch.equal(found["bias"], other["bias"]) and not torch.allclose(found["query"], other["query"])


def test_figure_5_shows_what_comes_after_vanilla_clip(voc, monkeypatch):
    """Image, MaskCLIP, rectified, distilled, truth."""
    seen, picture_sheet = [], evaluate.picture_sheet
    monkeypatch.setattr(evaluate, "picture_sheet",
                        lambda *args, **more: seen.append((args, more)) or picture_sheet(*args, **more))
    run(figures, "--only", "5")
    [(args, more)] = seen
    assert list(args[1]) == ["MaskCLIP", "ReCLIP++ rectified", "ReCLIP++ distilled"]
    assert len(args[2]) == 2 and more["height"] > 144
    assert os.listdir("runs/voc/figures") == ["figure5_results.png"]


def test_every_file_is_made_small_enough(voc, monkeypatch):
    monkeypatch.setattr(figures, "LARGEST", 20_000)
    assert all(path.stat().st_size <= 20_000 for path in run(figures, "--only", "4", "5"))


def test_chosen_classes_on_chosen_images_are_drawn(voc, monkeypatch, capsys):
    seen, heat_figure = [], figures.heat_figure
    monkeypatch.setattr(figures, "heat_figure", lambda rows: seen.append(rows) or heat_figure(rows))
    run(figures, "--only", "4", "--show", "2007_000042:cat", "2007_000042:dog", "2007_000033:cat")
    assert [name for _, name, _ in seen[0]] == ["cat", "dog", "cat"]
    first, second, third = (maps["decoded"] for *_, maps in seen[0])
    assert not torch.allclose(first, second) and not torch.allclose(first, third)
    assert "found another class" in refusal(capsys, figures, "--only", "4", "--show", "2007_000042:unicorn")


def test_figures_that_cannot_be_drawn_are_left_out_by_name(place, tiny_clip, capsys):
    """Without labels no figure 1, without a rectification no figure 4, without points no figure 3: it says
    why."""
    write_photos(place / "photos", "a.jpg", "b.png", "in the sun/ü.webp")
    Path("names.txt").write_text("cat, kitty\nsofa\nwall\n")
    own = ["--data", "photos", "--classes", "names.txt", "--clip", tiny_clip]
    [path] = run(figures, *own)
    said = capsys.readouterr().out
    assert path == Path("runs/photos/figures/figure5_results.png") and path.exists()
    for number, reason in ((1, "no labels"), (3, "no --points"), (4, "no checkpoint")):
        assert f"Figure {number} is left out: {reason}" in said
    run(rectify, *own)
    assert [path.name for path in run(figures)] == ["figure4_logits.png", "figure5_results.png"]


def test_steps_of_another_system_are_not_drawn_as_reclip_plus_plus(place, tiny_clip, capsys):
    """Figure 4 shows Eq. 2 to 4. Figures 1 and 5 are drawn, with the system's name."""
    write_voc_tree(place / "data")
    run(paper_run, "no-bias", "--data", "voc", "--clip", tiny_clip, "--stage", "rectify")
    names = [path.name for path in run(figures)]
    assert names == ["figure1_distance.png", "figure1_confusion.png", "figure5_results.png"]
    assert "Figure 4 is left out: runs/voc/rectify is of no-bias, by other steps." in capsys.readouterr().out


def test_a_folder_where_a_figure_should_be_is_refused_before_anything_is_drawn(voc, capsys):
    Path("runs/voc/figures/figure4_logits.png").mkdir(parents=True)
    assert "found a folder" in refusal(capsys, figures)
    assert os.listdir("runs/voc/figures") == ["figure4_logits.png"]
