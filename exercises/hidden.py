"""The inputs of the hidden tests: other shapes, edges, gradients. What is right is what the project's own
functions return for them (grade.py); no result stands here. Not in a hand-out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from exercises.probes import numbers, unit


@dataclass
class Case:
    function: str
    title: str                      # what is special about it: part of the reason where it fails
    arguments: dict
    gradients: list[str] = field(default_factory=list)


def masks_of(B: int, C: int, h: int, w: int, seed: int = 0) -> torch.Tensor:
    return F.one_hot(numbers(B, C, h, w, seed=seed).argmax(dim=1), C).permute(0, 3, 1, 2).float()


def uniform(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def cases(seed: int = 0) -> list[Case]:
    """All cases, for one seed of their numbers."""
    s = 1000 * seed
    found = []

    def case(function: str, title: str, gradients=(), **arguments) -> None:
        found.append(Case(function, title, arguments, list(gradients)))

    values, dense = "clip/model.py:Attention.values", "clip/model.py:VisionTransformer.dense"
    case(values, "two images of five tokens", ["x"], seed=s, x=numbers(2, 5, 128, seed=s))
    case(values, "one token", seed=s + 1, x=numbers(1, 1, 128, seed=s + 1))
    case(values, "large numbers", seed=s, x=100 * numbers(1, 3, 128, seed=s + 2))
    for path in ("value", "residual", "vanilla"):
        case(dense, f"path {path}, two images of 12 patches", ["x"], seed=s, x=numbers(2, 13, 128, seed=s),
             path=path)
        case(dense, f"path {path}, a single patch", seed=s + 1, x=numbers(1, 2, 128, seed=s), path=path)

    function = "rectify.py:query_features"
    two = ["a photo of the {}.", "{}"]
    case(function, "one class, one template", seed=s, synonyms=[["cat"]], templates=["the {}"])
    case(function, "synonyms of several lengths", seed=s,
         synonyms=[["cat", "kitten", "a very small and very young cat"], ["chest of drawers"]], templates=two)
    case(function, "many classes", seed=s + 1, synonyms=[[f"thing number {i}"] for i in range(9)],
         templates=two)
    function = "rectify.py:query_logits"
    case(function, "three images, not square", ["features", "query"],
         features=unit(3, 6, 4, 5, dim=1, seed=s),
         query=unit(7, 6, seed=s))
    case(function, "one class, one patch", features=unit(1, 3, 1, 1, dim=1, seed=s), query=unit(1, 3, seed=s))
    case(function, "as many classes as channels", features=unit(2, 5, 5, 5, dim=1, seed=s),
         query=unit(5, 5, seed=s))

    function = "clip/model.py:CLIP.encode_prompt"
    case(function, "names of one to three tokens", ["prompt"], seed=s, prompt=numbers(9, 64, seed=s),
         names=["cat", "potted plant", "chest of drawers", "sky"])
    case(function, "one vector, one class", ["prompt"], seed=s, prompt=numbers(1, 64, seed=s), names=["sky"])
    case(function, "the longest that fits", seed=s, prompt=numbers(73, 64, seed=s),
         names=["potted plant", "cat"])
    case(function, "one vector too many: ValueError", seed=s, prompt=numbers(74, 64, seed=s),
         names=["cat", "potted plant"])
    case(function, "many classes: the prefix is seen once", seed=s + 1, prompt=numbers(60, 64, seed=s),
         names=["cat", "dog", "sky", "sand", "road", "wall", "grass", "water"])
    case(function, "the same name twice", seed=s, prompt=numbers(4, 64, seed=s), names=["cat", "cat"])
    function = "rectify.py:reference_features"
    case(function, "rows of several lengths", ["prompt", "features"],
         features=numbers(4, 6, seed=s) * torch.tensor([[1.0], [3.0], [0.1], [9.0]]),
         prompt=numbers(3, 5, seed=s),
         names=["cat", "dog", "sky", "sand"])
    case(function, "one class", features=numbers(1, 6, seed=s), prompt=numbers(3, 5, seed=s), names=["cat"])
    function = "rectify.py:bias_logits"
    for title, E, D, C, h, w in (("a grid that is not square", 5, 4, 3, 2, 6), ("one place", 3, 2, 4, 1, 1),
                                 ("as many classes as channels", 4, 4, 4, 4, 4)):
        case(function, title, ["positions", "weight", "bias", "reference"],
             positions=numbers(E, h, w, seed=s),
             weight=numbers(D, E, 1, 1, seed=s + 1), bias=numbers(D, seed=s + 2),
             reference=numbers(C, D, seed=s + 3))

    function = "rectify.py:subtract_bias"
    case(function, "three images, not square", ["query", "bias"], query=numbers(3, 4, 2, 5, seed=s),
         bias=numbers(4, 2, 5, seed=s + 1))
    case(function, "as many images as classes", query=numbers(3, 3, 3, 3, seed=s),
         bias=numbers(3, 3, 3, seed=s + 1))
    function = "rectify.py:Decoder.forward"
    for title, training in (("in training", True), ("at test", False)):
        case(function, f"{title}, not square", ["features", "logits", "weight"],
             features=numbers(2, 4, 5, 7, seed=s), logits=numbers(2, 3, 5, 7, seed=s + 1),
             weight=0.2 * numbers(3, 7, 5, 5, seed=s + 2), training=training)
    case(function, "as many classes as features", features=numbers(2, 3, 4, 4, seed=s),
         logits=numbers(2, 3, 4, 4, seed=s + 1), weight=0.2 * numbers(3, 6, 5, 5, seed=s + 2), training=False)

    function = "rectify.py:rectified_masks"
    case(function, "two images, not square", ["decoded"], decoded=numbers(2, 4, 3, 5, seed=s), scale=2.0,
         uniform=uniform(2, 4, 3, 5, seed=s))
    case(function, "scale 100", ["decoded"], decoded=numbers(1, 6, 4, 4, seed=s), scale=100.0,
         uniform=uniform(1, 6, 4, 4, seed=s))
    case(function, "as many images as classes", ["decoded"], decoded=numbers(3, 3, 3, 3, seed=s), scale=0.7,
         uniform=uniform(3, 3, 3, 3, seed=s))
    case(function, "zeros in uniform", ["decoded"], decoded=numbers(1, 3, 2, 2, seed=s), scale=1.0,
         uniform=torch.tensor([0.0, 0.5]).repeat(6).view(1, 3, 2, 2))
    case(function, "one class", decoded=numbers(1, 1, 2, 3, seed=s), scale=1.0,
         uniform=uniform(1, 1, 2, 3, seed=s))

    function = "rectify.py:windows"
    for title, H, W, ratio in (("10 × 14 by 1/2", 10, 14, 0.5), ("25 × 31 by 1/4", 25, 31, 0.25),
                               ("60 × 36 by 1/6", 60, 36, 1 / 6), ("ratio 1", 5, 7, 1.0),
                               ("one of three sides too small", 3, 30, 0.25),
                               ("a ratio of 0.7", 20, 30, 0.7)):
        case(function, title, image=numbers(3, H, W, seed=s), ratio=ratio)
    function = "rectify.py:window_votes"
    case(function, "nine windows of several lengths",
         window_features=numbers(9, 6, seed=s) * torch.arange(1, 10)[:, None], query=unit(4, 6, seed=s + 1))
    case(function, "two by three images", window_features=numbers(2, 3, 16, 5, seed=s),
         query=unit(7, 5, seed=s + 1))
    case(function, "as many windows as classes", window_features=numbers(4, 4, 4, seed=s),
         query=unit(4, 4, seed=s))
    function = "rectify.py:multi_label_hypothesis"
    shares = numbers(6, 5, seed=s).softmax(dim=1)
    for threshold in (0.0, 0.07, 0.25, 0.9):
        case(function, f"six images, threshold {threshold}", votes=shares, threshold=threshold)
    case(function, "classes without a vote, threshold 0",
         votes=torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]),
         threshold=0.0)
    case(function, "shares equal to the threshold",
         votes=torch.tensor([[0.25, 0.25, 0.5], [0.25] * 2 + [0.5]]),
         threshold=0.25)

    function = "rectify.py:contrastive_loss"
    hypothesis = torch.tensor([[True, False, True, False], [False, False, False, True], [True] * 4])
    case(function, "three images with 2, 1 and 4 classes", ["features", "masks", "query"],
         features=unit(3, 6, 3, 5, dim=1, seed=s), masks=masks_of(3, 4, 3, 5, seed=s),
         query=unit(4, 6, seed=s),
         hypothesis=hypothesis, scale=12.0)
    case(function, "soft masks", ["features", "masks"], features=unit(2, 5, 2, 4, dim=1, seed=s),
         masks=numbers(2, 3, 2, 4, seed=s).softmax(dim=1), query=unit(3, 5, seed=s),
         hypothesis=torch.ones(2, 3, dtype=torch.bool), scale=100.0)
    case(function, "empty masks", ["masks"], features=unit(1, 4, 2, 2, dim=1, seed=s),
         masks=torch.zeros(1, 3, 2, 2),
         query=unit(3, 4, seed=s), hypothesis=torch.tensor([[True, True, False]]), scale=20.0)
    case(function, "as many images as classes as channels", features=unit(3, 3, 3, 3, dim=1, seed=s),
         masks=masks_of(3, 3, 3, 3, seed=s), query=unit(3, 3, seed=s), hypothesis=hypothesis[:, :3],
         scale=5.0)

    function = "rectify.py:train_step"
    case(function, "three images, not square", sizes=[3, 4, 5, 2, 6], seed=s, recipe={})
    case(function, "another recipe", sizes=[1, 2, 3, 4, 3], seed=s + 1,
         recipe=dict(mask_scale=100.0, loss_scale=7.0, vote_threshold=0.5))

    function = "distill.py:mask_loss"
    for title, B, C, h, w in (("two images, not square", 2, 5, 3, 4), ("one place", 1, 3, 1, 1),
                              ("as many images as classes", 3, 3, 3, 3)):
        case(function, title, ["student_logits"], student_logits=3 * numbers(B, C, h, w, seed=s),
             pseudo_label=numbers(B, C, h, w, seed=s + 1).argmax(dim=1))
    function = "distill.py:feature_loss"
    case(function, "the same grid", ["student_features"], student_features=unit(2, 4, 3, 5, dim=1, seed=s),
         teacher_features=unit(2, 4, 3, 5, dim=1, seed=s + 1))
    case(function, "a finer teacher", ["student_features"], student_features=unit(2, 4, 3, 5, dim=1, seed=s),
         teacher_features=unit(2, 4, 7, 6, dim=1, seed=s + 1))
    case(function, "a coarser teacher", ["student_features"],
         student_features=unit(1, 3, 6, 8, dim=1, seed=s),
         teacher_features=unit(1, 3, 2, 3, dim=1, seed=s + 1))
    case("distill.py:text_loss", "other arguments in another order would show",
         ["features", "masks", "query"],
         features=numbers(2, 4, 3, 5, seed=s), masks=numbers(2, 3, 3, 5, seed=s), query=numbers(3, 4, seed=s),
         hypothesis=numbers(2, 3, seed=s) > 0, scale=12.0)
    function = "distill.py:total_loss"
    for alpha, beta in ((0.5, 0.25), (0.0, 2.0), (3.0, 0.0)):
        case(function, f"α = {alpha}, β = {beta}", ["mask", "feature", "text"], mask=torch.tensor(1.5),
             feature=torch.tensor(0.25), text=torch.tensor(2.5), alpha=alpha, beta=beta)

    function = "evaluate.py:confusion_matrix"
    truth = numbers(5, 7, 6, seed=s).argmax(dim=-1)
    ignored = torch.where(numbers(5, 7, seed=s + 2) > 0.5, torch.tensor(255), truth)
    said = numbers(5, 7, 6, seed=s + 1).argmax(dim=-1)
    case(function, "nothing ignored", true_label=truth, predicted=said, classes=6)
    case(function, "some pixels ignored", true_label=ignored, predicted=said, classes=6)
    case(function, "more classes than occur", true_label=ignored, predicted=said, classes=9)
    case(function, "all pixels ignored", true_label=torch.full((2, 3), 255), predicted=said[:2, :3],
         classes=6)
    case(function, "bytes: 16 · 15 fits, 20 · 19 does not",
         true_label=torch.tensor([[19, 18], [255, 3]], dtype=torch.uint8),
         predicted=torch.tensor([[19, 1], [2, 17]], dtype=torch.uint8), classes=20)
    function = "evaluate.py:class_iou"
    matrix = (10 * numbers(5, 5, seed=s).abs()).long()
    case(function, "five classes", confusion=matrix)
    one_absent = matrix.clone()
    one_absent[2], one_absent[:, 2] = 0, 0
    case(function, "a class in neither truth nor prediction", confusion=one_absent)
    case(function, "large counts", confusion=matrix * 10 ** 9)
    return found
