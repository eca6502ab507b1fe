"""What our steps cost, beside a plain implementation of the same steps (plain.py), measured in one run.

    python benchmarks/benchmark.py                     every row, ViT-B/16 with random weights: 20 minutes
    python benchmarks/benchmark.py --only rectify-voc  one row
    python benchmarks/benchmark.py --growth            how time grows with classes, pixels, number of images
    python benchmarks/benchmark.py --memory            peak memory of large images and of training batches
    python benchmarks/benchmark.py --quick             tiny sizes: whether it runs, not how fast

Plain and ours alternate, with a matrix product in between as the measure of the machine: whatever else runs
on it slows all three. Medians are shown, and the ratio is what counts. Prints tables, writes JSON (--out),
reads nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # modules are named from the project's folder
os.environ.setdefault("TQDM_DISABLE", "1")  # bars would be timed with the steps

from harness import errors
from harness import flags as common

ROWS = ("rectify-voc", "rectify-ade", "rectify-voc-batch", "rectify-ade-batch", "rectify-voc-cached",
        "rectify-ade-cached", "evaluate-voc", "evaluate-ade", "windows", "query", "dense-224", "dense-512",
        "distill", "loader")


def flags() -> argparse.ArgumentParser:
    parser = common.plain_parser(__doc__)
    what = parser.add_argument_group("what to measure")
    what.add_argument("--only", nargs="+", choices=ROWS, metavar="NAME", default=list(ROWS),
                      help=f"of {', '.join(ROWS)} (default: all)")
    what.add_argument("--growth", action="store_true",
                      help="time against classes, image size, images (ours alone)")
    what.add_argument("--memory", action="store_true",
                      help="peak memory of large images and of batches (ours alone)")
    what.add_argument("--quick", action="store_true",
                      help="tiny sizes: the numbers mean nothing, the program runs")
    how = parser.add_argument_group("how")
    how.add_argument("--repeats", type=common.whole(1), metavar="N", default=3,
                     help="timings of which the median is shown (default: 3)")
    how.add_argument("--batch", type=common.whole(1), metavar="N",
                     help="images per step of `distill` and `dense-…` (default: 1; on a GPU 16)")
    how.add_argument("--threads", type=common.whole(1), metavar="N",
                     help="torch's on the CPU (default: torch's choice)")
    how.add_argument("--device", metavar="D", help="cpu, cuda, … (default: the GPU if there is one)")
    how.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                     help="bf16 is autocast (default: fp32)")
    how.add_argument("--out", type=common.path, metavar="FILE",
                     help="write everything that was measured as JSON (default: print alone)")
    how.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import multiprocessing
import platform
import shlex
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import clip
import data
import distill
import evaluate
import rectify
from benchmarks import plain
from clip.tokenizer import vocabulary
from datasets import words
from harness import files, machine, runs

# ------------------------------------------------------------------------------------------ sizes


@dataclass(frozen=True)
class Case:
    """One dataset's sizes: training crop, a validation image at the recipe's short side, its label."""
    classes: int
    crop: int
    image: tuple[int, int]
    label: tuple[int, int]


@dataclass(frozen=True)
class Sizes:
    clip: dict
    voc: Case
    ade: Case
    dense: tuple[int, int]
    backbone: str
    distill_crop: int
    batch: int                              # images of a step in the rows named -batch and -cached
    product: int                            # side of the square matrices that measure the machine
    voc_images: int = 1464                  # of VOC 2012's train.txt
    ade_images: int = 20210


REAL = Sizes(
    clip=dict(embed_dim=512, image_resolution=224, vision_layers=12, vision_width=768, vision_patch_size=16,
              context_length=77, vocab_size=49408, transformer_width=512, transformer_heads=8,
              transformer_layers=12),
    # VOC's pictures are mostly 500×375; ADE's mostly 683×512, which the recipe leaves as they are.
    voc=Case(20, 336, (336, 448), (375, 500)), ade=Case(150, 512, (512, 683), (512, 683)),
    dense=(224, 512), backbone="resnet50", distill_crop=512, batch=16, product=2048)
QUICK = Sizes(
    clip=dict(embed_dim=24, image_resolution=32, vision_layers=2, vision_width=64, vision_patch_size=8,
              context_length=77, vocab_size=49408, transformer_width=64, transformer_heads=1,
              transformer_layers=1),
    voc=Case(3, 32, (32, 40), (37, 50)), ade=Case(5, 40, (40, 56), (40, 56)),
    dense=(32, 40), backbone="small", distill_crop=64, batch=2, product=64)


def class_names(count: int) -> list[str]:
    """Names as long as ADE20K's: four of five have one token, 2 % have three, the others two."""
    ids, _ = vocabulary()
    found = [token.removesuffix("</w>") for token in ids if token.endswith("</w>") and len(token) > 8
             and token[:-4].isalpha() and token.isascii()]
    found = iter(word for word in found if len(clip.encode(word)) == 1)
    return [" ".join(next(found) for _ in range(3 if i % 50 == 49 else 2 if i % 5 == 4 else 1))
            for i in range(count)]


# ------------------------------------------------------------------------------------------ what is measured


class Bench:
    """The machine and the weights of a run: settings in, models out, each made when it is first asked for."""

    def __init__(self, settings: dict):
        self.settings, self.precision = settings, settings["precision"]
        self.device = torch.device(settings["device"])
        self.sizes = QUICK if settings["quick"] else REAL
        self.batch = settings["batch"]
        self.workers = machine.workers_of(None, self.device)        # as many as the scripts take
        self.folder = tempfile.TemporaryDirectory(prefix="benchmark-")
        torch.set_num_threads(settings["threads"])
        torch.manual_seed(0)

    @cached_property
    def model(self) -> clip.CLIP:
        model = clip.CLIP(**self.sizes.clip).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():    # where an initialisation leaves memory as it was
            if not parameter.isfinite().all():
                torch.nn.init.normal_(parameter, std=0.02)
        return model.to(self.device)

    @cached_property
    def plain_model(self) -> plain.CLIP:
        return plain.CLIP(self.model)

    def query(self, classes: int) -> Tensor:
        return F.normalize(torch.randn(classes, self.model.visual.proj.shape[1], device=self.device), dim=-1)

    def images(self, batch: int, height: int, width: int) -> Tensor:
        return torch.randn(batch, 3, height, width, device=self.device)

    def votes(self, batch: int, classes: int) -> Tensor:
        """Votes that put a tenth of the classes into every image, with the threshold of `recipe`."""
        count = max(1, classes // 10)
        return ((torch.arange(classes, device=self.device) < count).float() / count).expand(batch, -1)

    def recipe(self, names: list[str]) -> rectify.Recipe:
        room = self.model.prompt_room(names)                # as in rectify.main: the longest name decides
        return rectify.Recipe(prompt_length=min(rectify.Recipe.prompt_length, room), vote_threshold=0.0)

    def autocast(self):
        return machine.autocast(self.device, self.precision)

    def setup(self, names: list[str], photos: int = 1) -> data.Setup:
        """What a script works on: a folder of photos, these classes, this CLIP."""
        colours = tuple(words.distinct_colours(len(names)))
        vocabulary = words.Vocabulary(tuple((name,) for name in names), colours, ("a {}.",))
        args = argparse.Namespace(out=tempfile.mkdtemp(dir=self.folder.name), cache=None,
                                  precision=self.precision, workers=self.workers, skip_broken=False, seed=0)
        return data.Setup(self.photos(photos), "data", vocabulary, self.model, "random", args, "all")

    def rectified(self, names: list[str], recipe: rectify.Recipe, rectifier: rectify.Rectifier) -> data.Setup:
        """The same with a checkpoint of stage 1 on disk."""
        setup = self.setup(names)
        files.save(setup.folder("rectify") / "checkpoint.pt",
                   {"stage": "rectify", "settings": runs.plain(setup.settings(rectify.System(), recipe)),
                    "weights": rectifier.state_dict()})
        return setup

    def photos(self, count: int, height: int = 375, width: int = 500) -> str:
        """JPEG files in a folder: soft blobs with grain, which decode as slowly as photographs."""
        folder, rng = Path(tempfile.mkdtemp(dir=self.folder.name)), np.random.default_rng(0)
        for number in range(count):
            coarse = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
            image = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC),
                               dtype=np.int16)
            image = (image + rng.integers(-12, 13, image.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / f"{number:04}.jpg", quality=90)
        return str(folder)


@dataclass(frozen=True)
class Sides:
    """The same work twice, `units` units each; `plain_units` where the plain side does fewer."""
    plain: Callable[[], object]
    ours: Callable[[], object]
    units: int
    unit: str                                               # in the plural
    plain_units: int | None = None

    def units_of(self, side: str) -> int:
        return self.plain_units or self.units if side == "plain" else self.units


def training(bench: Bench, module: torch.nn.Module,
             loss_of: Callable[[torch.Generator], Tensor]) -> Callable[[], float]:
    """One whole step around a loss: forward, backward, SGD, and the loss read as the log does."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9, weight_decay=5e-4)
    noise = torch.Generator(bench.device)

    def step() -> float:
        noise.manual_seed(0)
        with bench.autocast():
            loss = loss_of(noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def rectification(bench: Bench, case: Case, batch: int = 1, plain_batch: int | None = None,
                  cached: bool = False) -> Sides:
    """A step of stage 1, of `batch` images, on the plain side of `plain_batch`. `cached`: our Z is stored."""
    names, model = class_names(case.classes), bench.model
    recipe, query = bench.recipe(names), bench.query(case.classes)
    images, votes = bench.images(batch, case.crop, case.crop), bench.votes(batch, case.classes)
    few, stored = plain_batch or batch, None
    plains, own = (rectify.Rectifier(model, case.classes, recipe.prompt_length).to(bench.device).train()
                   for _ in range(2))
    if cached:                                              # as data.StoredFeatures: a batch holds Z already
        grid = case.crop // model.visual.patch_size
        stored = torch.randn(batch, query.shape[1], grid, grid, device=bench.device)
        stored = F.normalize(stored, dim=1).half()

    def loss_of(noise: torch.Generator) -> Tensor:          # the body of the loop in rectify.main
        features = own.encode(model, images, recipe.dense_path) if stored is None else stored.float()
        return rectify.train_step(own, model, features, votes, query, names, recipe, noise)

    return Sides(
        training(bench, plains, lambda noise: plain.rectify_step(
            plains, bench.plain_model, images[:few], votes[:few], query, names, recipe, noise)),
        training(bench, own, loss_of), batch, "images", plain_batch)


def hypotheses(bench: Bench, images: int | None = None, ratio: float | None = None) -> Sides:
    """Windows of JPEG files through the global encoder: the recipe's on a GPU, 25 of one image on a CPU."""
    on_gpu = bench.device.type == "cuda"
    setup = bench.setup(class_names(bench.sizes.ade.classes), images or (16 if on_gpu else 1))
    photos = setup.training_images
    ratio = ratio or (rectify.Recipe.window_ratio if on_gpu else 1 / 3)
    plain_model = bench.plain_model             # made here: neither time nor memory of it is the call's
    query, short_side = bench.query(bench.sizes.ade.classes), bench.sizes.ade.crop
    recipe = rectify.Recipe(window_ratio=ratio, short_side=short_side)

    def slow() -> object:
        with bench.autocast():
            return plain.count_votes(plain_model, query, photos, short_side, ratio)

    def ours() -> object:
        return rectify.count_votes(setup, query, recipe)

    return Sides(slow, ours, len(photos) * (round(2 / ratio) - 1) ** 2, "windows")


def dense_features(bench: Bench, size: int) -> Sides:
    """Dense features of a batch of square images."""
    images, path = bench.images(bench.batch, size, size), rectify.Recipe.dense_path

    def side(model) -> Callable[[], Tensor]:
        def features() -> Tensor:
            with torch.no_grad(), bench.autocast():
                return model.encode_dense(images, path)
        return features

    return Sides(side(bench.plain_model), side(bench.model), bench.batch, "images")


def distillation(bench: Bench, batch: int) -> Sides:
    """A step of stage 2, the teacher's part included, with VOC's classes."""
    classes, crop, model = bench.sizes.voc.classes, bench.sizes.distill_crop, bench.model
    names, query = class_names(classes), bench.query(classes)
    teacher_recipe, recipe = bench.recipe(names), distill.Recipe(backbone=bench.sizes.backbone)
    rectifier = rectify.Rectifier(model, classes, teacher_recipe.prompt_length).to(bench.device)
    rectifier.eval().requires_grad_(False)
    setup = bench.setup(names)
    images, votes = bench.images(batch, crop, crop), bench.votes(batch, classes)
    with torch.no_grad():
        reference = rectify.reference_features(model, rectifier.prompt, names)

    def student() -> distill.Student:
        return distill.build_student(setup, rectifier, query, recipe, distill.System(),
                                     pretrained=False).train()

    plains, own = student(), student()

    def loss_of(noise: torch.Generator) -> Tensor:
        taught = distill.teach(rectifier, model, images, query, reference, teacher_recipe.dense_path)
        return distill.train_step(own, *taught, images, votes, teacher_recipe, recipe, noise)["loss"]

    return Sides(
        training(bench, plains.network, lambda noise: plain.distill_step(
            plains, rectifier, bench.plain_model, images, votes, query, names, teacher_recipe, recipe,
            noise)),
        training(bench, own.network, loss_of), batch, "images")


def evaluation(bench: Bench, case: Case, images: int = 1, anew: bool = False) -> Sides:
    """Images of one size, from pixels to confusion matrices of vanilla CLIP, MaskCLIP, the rectified CLIP.

    Ours keeps the bias map of a grid; with `anew` the predictors are made within the time that is measured.
    """
    names, query = class_names(case.classes), bench.query(case.classes)
    recipe = bench.recipe(names)
    rectifier = rectify.Rectifier(bench.model, case.classes, recipe.prompt_length).to(bench.device)
    rectifier.eval().requires_grad_(False)
    setup = bench.rectified(names, recipe, rectifier)
    image, true_label = torch.randn(3, *case.image), torch.randint(0, case.classes, case.label)
    stages = ["vanilla", "maskclip", "rectify"]
    ready = None if anew else evaluate.predictors(setup, query, stages)

    def slow() -> object:
        confusion = {stage: np.zeros((case.classes, case.classes), dtype=np.int64) for stage in stages}
        for _ in range(images):
            with bench.autocast():
                found = plain.evaluate_image(rectifier, bench.plain_model, image[None].to(bench.device),
                                             true_label, query, names, recipe.dense_path)
            for stage in stages:
                confusion[stage] += found[stage][1]
        return confusion

    @torch.no_grad()
    def ours() -> object:                                   # the body of evaluate.measure
        found = ready or evaluate.predictors(setup, query, stages)
        confusion = {stage: torch.zeros(case.classes, case.classes, dtype=torch.int64, device=bench.device)
                     for stage in stages}
        for _ in range(images):
            pixels, truth = image[None].to(bench.device), true_label.to(bench.device)
            with bench.autocast():
                logits = evaluate.logits_of_all(setup, found, pixels)
            for stage in stages:
                predicted = evaluate.predict(logits[stage], tuple(truth.shape))
                confusion[stage] += evaluate.confusion_matrix(truth, predicted, case.classes)
        return {stage: matrix.cpu() for stage, matrix in confusion.items()}

    return Sides(slow, ours, images, "images")


def queries(bench: Bench, classes: int = 1) -> Sides:
    """W_q of a class: 85 sentences."""
    asked = words.Vocabulary(tuple((name,) for name in class_names(classes)), ((0, 0, 0),) * classes,
                             tuple(words.QUERY_TEMPLATES))
    model, plain_model = bench.model, bench.plain_model
    return Sides(lambda: plain.query_features(plain_model, asked),
                 lambda: rectify.query_features(model, asked),
                 classes, "classes")


def row(bench: Bench, name: str) -> tuple[Callable[..., Sides], tuple]:
    """What a row of the table measures: a function above and its arguments."""
    sizes = bench.sizes
    return {"rectify-voc": (rectification, (sizes.voc,)), "rectify-ade": (rectification, (sizes.ade,)),
            "rectify-voc-batch": (rectification, (sizes.voc, sizes.batch, 1)),
            "rectify-ade-batch": (rectification, (sizes.ade, sizes.batch, 1)),
            "rectify-voc-cached": (rectification, (sizes.voc, sizes.batch, 1, True)),
            "rectify-ade-cached": (rectification, (sizes.ade, sizes.batch, 1, True)),
            "windows": (hypotheses, ()),
            "dense-224": (dense_features, (sizes.dense[0],)),
            "dense-512": (dense_features, (sizes.dense[1],)),
            "distill": (distillation, (bench.batch,)),
            "evaluate-voc": (evaluation, (sizes.voc,)), "evaluate-ade": (evaluation, (sizes.ade,)),
            "query": (queries, ())}[name]


# ------------------------------------------------------------------------------------------ time


def seconds(device: torch.device, call: Callable[[], object]) -> float:
    """How long a call takes; on a GPU until its last kernel has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def flop_of(call: Callable[[], object]) -> int:
    """Floating-point operations of a call's matrix products and convolutions, backward included.

    torch's counter does not look inside fused kernels of every kind, so both attentions are run written out.
    Masked products count in full, as they are for a kernel that does not skip them.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops()


def matrix_product(bench: Bench) -> tuple[Callable[[], object], int]:
    """The machine's measure: square matrix products in the run's type, and their FLOP."""
    side, dtype = bench.sizes.product, torch.bfloat16 if bench.precision == "bf16" else torch.float32
    left, right = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
    count = 64 if bench.device.type == "cuda" else 2        # enough that starting a kernel does not count
    return lambda: [left @ right for _ in range(count)], count * 2 * side ** 3


def compare(bench: Bench, name: str, repeats: int) -> dict:
    """One row: plain, ours and the matrix product in turn, after a run of each to count FLOP and warm up."""
    function, arguments = row(bench, name)
    sides = function(bench, *arguments)
    product, product_flop = matrix_product(bench)
    calls = {"plain": sides.plain, "ours": sides.ours, "product": product}
    flop = {side: flop_of(calls[side]) for side in ("plain", "ours")}
    product()
    if bench.device.type == "cuda":                 # the counted runs went another way through attention
        sides.plain(), sides.ours()
    times = {side: [] for side in calls}
    for _ in range(repeats):
        for side, call in calls.items():
            times[side].append(seconds(bench.device, call))
    rate = product_flop / statistics.median(times["product"])
    found = {"unit": sides.unit, "product_flop_per_second": rate}
    for side in ("plain", "ours"):
        median, units = statistics.median(times[side]), sides.units_of(side)
        found[side] = {"units": units, "seconds_per_unit": median / units, "seconds": median,
                       "all_seconds": times[side],
                       "flop": flop[side], "share_of_product_rate": flop[side] / median / rate}
    return found | {"ratio": found["plain"]["seconds_per_unit"] / found["ours"]["seconds_per_unit"]}


def loader(bench: Bench, repeats: int) -> dict:
    """Stage 1's steps fed from JPEG files by the training loader, against the same steps on a ready batch.

    Their quotient is the device's utilisation: 1 when decoding hides behind the step.
    """
    sizes, steps = bench.sizes, (64 if bench.device.type == "cuda" else 4) * repeats
    names, model, case = class_names(sizes.voc.classes), bench.model, sizes.voc
    recipe, query, votes = bench.recipe(names), bench.query(case.classes), bench.votes(1, case.classes)
    rectifier = rectify.Rectifier(model, case.classes, recipe.prompt_length).to(bench.device).train()
    photos = bench.setup(names, 32).training_images
    transform = data.augmentation(case.crop, (case.crop, case.crop), recipe.scale, recipe.distort)
    current: list[Tensor] = [bench.images(1, case.crop, case.crop)]
    step = training(bench, rectifier, lambda noise: rectify.train_step(
        rectifier, model, rectifier.encode(model, current[0], recipe.dense_path), votes, query, names,
        recipe, noise))

    def pass_over(use: Callable[[Tensor], object]) -> float:
        """Seconds per batch from the first one on: the start of the workers is paid once an epoch."""
        dataset = data.TrainingImages(photos, transform, seed=0)
        batches = iter(data.training_batches(dataset, batch_size=1, first_step=0, steps=steps + 1, seed=0,
                                             workers=bench.workers))
        use(next(batches)[0])
        return seconds(bench.device, lambda: [use(batch) for batch, _ in batches]) / steps

    def train(batch: Tensor) -> None:
        current[0] = batch.to(bench.device)
        step()

    alone = pass_over(lambda batch: None)
    fed = pass_over(train)
    ready = seconds(bench.device, lambda: [step() for _ in range(steps)]) / steps
    return {"seconds_per_image_loader_alone": alone, "seconds_per_step_batch_ready": ready,
            "seconds_per_step_from_files": fed, "utilisation": ready / fed, "workers": bench.workers,
            "steps": steps}


# ------------------------------------------------------------------------------------------ memory


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (the highest since the last reset) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def peak_memory(settings: dict, function: Callable[..., Sides], arguments: tuple,
                side: str) -> dict[str, int]:
    """Peak memory of a call. `growth`: above what lay there before; `total`: of the process, set-up included.

    On a CPU this runs in a process of its own (see `in_own_process`): memory that an earlier call freed would
    be used again without being seen. Linux keeps the highest resident size since a reset, which misses no
    moment as sampling would, and which getrusage cannot reset. On a GPU it is torch's own count, and the
    process's memory does not matter.
    """
    bench = Bench(settings)
    call = getattr(function(bench, *arguments), side)
    if bench.device.type == "cuda":
        torch.cuda.synchronize(bench.device)
        torch.cuda.reset_peak_memory_stats(bench.device)
        before = torch.cuda.memory_allocated(bench.device)
        call()
        highest = torch.cuda.max_memory_allocated(bench.device)
        return {"growth": highest - before, "total": highest}
    set_up = resident("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")           # resets VmHWM to the present size
    before = resident("VmRSS")
    call()
    highest = resident("VmHWM")
    return {"growth": highest - before, "total": max(highest, set_up)}


def in_own_process(function: Callable, *arguments):
    """`function(*arguments)` in a fresh process, forked from a server that has imported torch, no more.

    Raises MemoryError when the system ended it, as it does with a process that asks for more than there is.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision"])    # once, not in every process
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(sender, function, arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise MemoryError(f"the process measuring {arguments[1].__name__} ended with exit code "
                          f"{process.exitcode}") from None
    finally:
        process.join()


def answer(sender, function: Callable, arguments: tuple) -> None:
    sender.send(function(*arguments))


def peak(bench: Bench, function: Callable[..., Sides], arguments: tuple,
         side: str = "ours") -> dict[str, int] | None:
    """`peak_memory` where it can be told: on a GPU, and on a CPU under Linux; None elsewhere."""
    if bench.device.type == "cuda":
        return peak_memory(bench.settings, function, arguments, side)
    if not Path("/proc/self/clear_refs").exists():
        return None
    return in_own_process(peak_memory, bench.settings, function, arguments, side)


def memory(bench: Bench) -> dict[str, dict]:
    """Peak memory of what is large: a wide image with ADE's classes at two short sides; training by batch."""
    voc, ade = bench.sizes.voc, bench.sizes.ade
    height, width = (1024, 2048) if bench.sizes is REAL else (64, 128)
    jobs = {f"evaluate {width}×{height}, {ade.classes} classes, short side {side}":
            (evaluation, (replace(ade, image=(side, side * width // height), label=(height, width)),))
            for side in (height // 2, height)}
    jobs |= {f"rectify {voc.crop}, batch {batch}": (rectification, (voc, batch)) for batch in (1, 4, 16)}
    jobs |= {f"distill {bench.sizes.distill_crop}, batch {batch}": (distillation, (batch,))
             for batch in (1, 4)}
    found = {}
    for title, job in jobs.items():
        found[title] = peak(bench, *job)
        total = f"{found[title]['total'] / 2 ** 20:8.0f}" if found[title] else ""
        print(f"{title:52}{megabytes(found[title]):>8}{total}", flush=True)
    return found


# ------------------------------------------------------------------------------------------ growth


def growth(bench: Bench, repeats: int) -> list[dict]:
    """Our time at three points along each axis; the FLOP, which say what to expect; a sentence why."""
    voc, real = bench.sizes.voc, bench.sizes is REAL
    classes, sizes, counts = ((20, 60, 150), (224, 336, 512), (10, 20, 40)) if real \
        else ((3, 6, 9), (32, 40, 48), (1, 2, 3))
    square = replace(voc, image=(voc.crop, voc.crop), label=(voc.crop, voc.crop))
    small = replace(voc, image=(bench.sizes.dense[0],) * 2, label=(bench.sizes.dense[0],) * 2)

    def at(size: int) -> Case:
        return replace(voc, crop=size, image=(size, size), label=(size, size))

    axes = [
        ("rectification step", "classes", classes, lambda C: rectification(bench, replace(voc, classes=C)),
         "image tower and shared prefix are paid once, a class adds its few own tokens, and the decoder "
         "grows with C · (D + C)"),
        ("evaluation of an image", "classes", classes,
         lambda C: evaluation(bench, replace(square, classes=C)),
         "no text tower runs; what grows is the decoder, with C · (D + C), and up-sampling and argmax, with "
         "C"),
        ("query features", "classes", (1, 2, 4), lambda C: queries(bench, C),
         "every class has 85 sentences of its own"),
        ("rectification step", "image side", sizes, lambda size: rectification(bench, at(size)),
         "the text tower does not see the image; the rest is linear in patches but for attention, which is "
         "quadratic"),
        ("dense features", "image side", sizes, lambda size: dense_features(bench, size),
         "linear in patches, that is quadratic in the side, plus the attention scores, quadratic in patches"),
        ("evaluation", "images", counts, lambda count: evaluation(bench, small, count, anew=True),
         "every image costs the same; the text tower and the bias map are paid once, in front"),
        ("hypotheses, one window", "images", counts, lambda count: hypotheses(bench, count, ratio=1.0),
         "every window is one pass of the image tower, and windows of several images share a batch")]
    found = []
    for what, axis, points, make, why in axes:
        calls = [make(point).ours for point in points]
        flop = [flop_of(call) for call in calls]            # counts and warms up
        times = [[] for _ in points]
        for _ in range(repeats):                            # in turn, so that a slow moment meets all points
            for call, kept in zip(calls, times):
                kept.append(seconds(bench.device, call))
        medians = [statistics.median(kept) for kept in times]
        found.append({"what": what, "axis": axis, "points": list(points), "seconds": medians, "flop": flop,
                      "sentence": f"{points[-1] / points[0]:.3g} times the {axis} take "
                                  f"{medians[-1] / medians[0]:.2f} times as long ({flop[-1] / flop[0]:.2f} "
                                  f"times the FLOP): {why}."})
    return found


# ------------------------------------------------------------------------------------------ the run


def chip(device: torch.device) -> str:
    """The name of the GPU, or of the CPU where the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def projections(rows: dict[str, dict], sizes: Sizes) -> dict[str, dict[str, float]]:
    """Hours of whole stages, from the measured steps: what a run takes of the device."""
    found, recipe = {}, rectify.Recipe()

    def project(title: str, name: str, units: int) -> None:
        if name in rows:
            found[title] = {side: rows[name][side]["seconds_per_unit"] * units / 3600
                            for side in ("plain", "ours")}

    seen, windows = sizes.voc_images * recipe.epochs, (round(2 / recipe.window_ratio) - 1) ** 2
    whole = f"VOC rectification, {sizes.voc_images} images × {recipe.epochs} epochs"
    project(f"{whole}, an image a step", "rectify-voc", seen)
    project(f"{whole}, {sizes.batch} images a step (plain: one)", "rectify-voc-batch", seen)
    project(f"{whole}, the same from stored features, which a first pass makes", "rectify-voc-cached", seen)
    project(f"ADE hypotheses, {sizes.ade_images} images × {windows} windows", "windows",
            windows * sizes.ade_images)
    return found


def megabytes(memory: dict[str, int] | None) -> str:
    return "–" if memory is None else f"{memory['growth'] / 2 ** 20:.0f}"


def print_row(name: str, found: dict) -> None:
    slow, ours = found["plain"], found["ours"]
    print(f"{name:18}{slow['seconds_per_unit']:10.4f}{ours['seconds_per_unit']:10.4f}{found['ratio']:8.2f}"
          f"{1 / ours['seconds_per_unit']:12.2f} {found['unit'] + '/s':10}"
          f"{megabytes(slow['memory']):>8}{megabytes(ours['memory']):>8}"
          f"{slow['share_of_product_rate']:9.0%}{ours['share_of_product_rate']:7.0%}", flush=True)


def main(args: argparse.Namespace) -> dict:
    """Measure what the flags ask for, print it, write it, return it."""
    device = machine.device_of(args.device)
    settings = {"device": str(device), "precision": args.precision, "quick": args.quick,
                "threads": args.threads or torch.get_num_threads(),
                "batch": args.batch or (16 if device.type == "cuda" and not args.quick else 1)}
    bench = Bench(settings)
    header = {"versions": machine.versions(), "chip": chip(device), **settings, "repeats": args.repeats,
              "command": shlex.join(["python", f"benchmarks/{Path(__file__).name}", *sys.argv[1:]])}
    for title, value in header.items():
        print(f"{title:>10}  {value}")
    content = dict(header)
    if args.growth:
        print("\nOur time in seconds")
        content["growth"] = growth(bench, args.repeats)
        for found in content["growth"]:
            print(f"  {found['what']}: " + ", ".join(f"{time:.3f} at {point}" for point, time
                                                     in zip(found["points"], found["seconds"]))
                  + f" {found['axis']}.\n"
                  f"      {found['sentence']}")
    if args.memory:
        print(f"\n{'Our peak memory, MiB':52}{'growth':>8}{'total':>8}")
        content["memory"] = memory(bench)
    if not args.growth and not args.memory:
        print(f"\n{'':18}{'seconds a unit':>20}{'':20}{'':11}{'peak MiB':>16}{'of products':>16}\n"
              f"{'':18}{'plain':>10}{'ours':>10}{'ratio':>8}{'ours':>12} {'':10}{'plain':>8}{'ours':>8}"
              f"{'plain':>9}{'ours':>7}")
        content["rows"] = {}
        for name in (name for name in ROWS if name in args.only and name != "loader"):
            found = content["rows"][name] = compare(bench, name, args.repeats)
            for side in ("plain", "ours"):
                found[side]["memory"] = peak(bench, *row(bench, name), side)
            print_row(name, found)
        rates = [found["product_flop_per_second"] for found in content["rows"].values()]
        if rates:
            content["product_flop_per_second"] = statistics.median(rates)
            print(f"\nMatrix products of {bench.sizes.product}×{bench.sizes.product}: "
                  f"{statistics.median(rates) / 1e9:.0f} GFLOP/s, of which the last columns are shares")
        content["projections"] = projections(content["rows"], bench.sizes)
        for title, hours in content["projections"].items():
            print(f"{title}: {hours['plain']:.1f} hours plain, {hours['ours']:.1f} ours")
        if "loader" in args.only:
            found = content["loader"] = loader(bench, args.repeats)
            print(f"Loader, {found['workers']} workers: {1 / found['seconds_per_image_loader_alone']:.0f} "
                  f"images/s alone; a VOC step takes {found['seconds_per_step_batch_ready']:.4f} s on a "
                  f"ready batch, {found['seconds_per_step_from_files']:.4f} s from JPEG files: utilisation "
                  f"{found['utilisation']:.0%}")
    bench.folder.cleanup()
    if args.out is not None:
        files.write_json(Path(args.out), content)
        print(f"Wrote {args.out}")
    return content


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
