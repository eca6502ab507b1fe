"""Train Toyland's small CLIP from captions alone, and the small ResNet; writes clip.pt and resnet.pt.

    python toyland/pretrain.py                 22 minutes on one core, and the shipped bits. --resume goes on

    B images · T tokens · U different captions in a batch
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # modules are named from the project's folder

from harness import errors, flags as common


def flags() -> argparse.ArgumentParser:
    parser = common.plain_parser(__doc__)
    parser.add_argument("--pictures", type=common.whole(1), metavar="N", default=60_000,
                        help="captioned pictures to draw (default: 60000)")
    parser.add_argument("--epochs", type=common.whole(1), metavar="N", default=7,
                        help="passes over them (default: 7)")
    parser.add_argument("--seed", type=common.whole(0), metavar="N", default=0,
                        help="of the captioned pictures and the training (default: 0)")
    parser.add_argument("--weights", type=common.path, metavar="DIR", default=str(Path(__file__).parent),
                        help="where the two files are written (default: this folder)")
    parser.add_argument("--out", type=common.path, metavar="DIR", default="runs",
                        help="the training keeps its state in DIR/toyland/ (default: runs)")
    parser.add_argument("--resume", action="store_true",
                        help="continue an unfinished training where it was saved last")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import functools
import hashlib
import os
import threading
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import clip
from clip import MEAN, STD
from harness import files, machine, runs
from toyland.networks import SMALL_CLIP, SmallResNet, small_resnet, weights_to_ship
from toyland.world import CLASSES, PICTURE, TEMPLATES, captioned_picture

BATCH = 256
LEARNING_RATE = 1e-3                        # AdamW, cosine to zero after a short warm-up
WEIGHT_DECAY = 0.1
# FLIP (Li et al. 2023) drops random patches to train faster. Here there is another reason: when the one
# telling patch (a wheel) is often missing, the rest of the car must say "car" too.
PATCH_DROPOUT = 0.65
WHOLE_PICTURES = 0.1                        # the last share of the steps sees all patches, as later use does
RESNET_EPOCHS = 2


def pretraining_pictures(seed: int, count: int) -> tuple[np.ndarray, list[str]]:
    """`count` captioned pictures, (count, 64, 64, 3) uint8, and what their captions name."""
    chunks = [(seed, chunk, min(500, count - chunk)) for chunk in range(0, count, 500)]
    pictures, captions = np.empty((count, PICTURE, PICTURE, 3), np.uint8), []
    loader = torch.utils.data.DataLoader(chunks, batch_size=None, collate_fn=draw_chunk,
                                         num_workers=os.cpu_count() or 1,
                                         worker_init_fn=functools.partial(end_with, os.getpid()))
    for images, texts in tqdm(loader, desc="drawing", unit="×500"):
        pictures[len(captions):len(captions) + len(texts)] = images
        captions.extend(texts)
    return pictures, captions


def end_with(parent: int, _worker: int) -> None:
    """End this process when `parent` was killed. torch's own watch would not: a worker that has drawn more
    than a pipe holds waits for a reader forever."""
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def draw_chunk(chunk: tuple[int, int, int]) -> tuple[np.ndarray, list[str]]:
    seed, first, count = chunk
    rng = np.random.default_rng([3, seed, first])
    pictures, captions = zip(*(captioned_picture(rng) for _ in range(count)))
    return np.stack(pictures), list(captions)


def to_batch(pictures: np.ndarray) -> Tensor:
    """uint8 pictures (B, 64, 64, 3) → normalised tensor (B, 3, 64, 64), each flipped with probability ½."""
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    flip = torch.rand(len(images)) < 0.5
    images[flip] = images[flip].flip(dims=(3,))
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def encode_some_patches(model, images: Tensor, dropout: float) -> Tensor:
    """`encode_image` on a random subset of the patches (FLIP, Sec. 3.1): (B, 3, H, W) → (B, D)."""
    x = model.visual.embed(images)                                              # (B, 1 + n, E)
    if dropout > 0:
        B, n = len(x), x.shape[1] - 1
        keep = 1 + torch.rand(B, n).argsort(dim=1)[:, :round(n * (1 - dropout))]
        keep = torch.cat([torch.zeros(B, 1, dtype=torch.long), keep], dim=1)    # the class token always stays
        x = x.gather(dim=1, index=keep[..., None].expand(-1, -1, x.shape[2]))
    return model.visual.pool(model.visual.transformer(x))


def caption_loss(image_features: Tensor, text_features: Tensor, caption: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric contrastive loss where equal captions count as one.

    image_features (B, D) and text_features (U, D) have unit length; caption (B,) in 0..U-1 is the row of each
    image's text; scale is exp(logit_scale). Toyland says few different things, so many captions in a batch of
    256 are the same. CLIP's own loss would push a picture away from its caption whenever another picture has
    the same one.
    """
    logits = scale * image_features @ text_features.T                           # (B, U)
    images_to_texts = F.cross_entropy(logits, caption)
    owners = F.one_hot(caption, len(text_features)).T.float()                   # (U, B)
    owners = owners / owners.sum(dim=1, keepdim=True)
    texts_to_images = -(owners * logits.T.log_softmax(dim=1)).sum(dim=1).mean()
    return (images_to_texts + texts_to_images) / 2


class Draws:
    """All chance in a pre-training: the order of the pictures, NumPy's generator, and torch's own.

    Its state can be saved: a resumed training draws what an uninterrupted one would have drawn.
    """

    def __init__(self, pictures: int, *seed: int):
        self.pictures, self.rng, self.order = pictures, np.random.default_rng(seed), np.arange(pictures)
        self.per_epoch = pictures // BATCH

    def batch(self, step: int) -> np.ndarray:
        """The numbers of a step's pictures, (BATCH,), sorted. Every epoch has a new order."""
        if step % self.per_epoch == 0:
            self.order = self.rng.permutation(self.pictures)
        return np.sort(self.order[step % self.per_epoch * BATCH:][:BATCH])

    def state_dict(self) -> dict:
        return {"order": torch.from_numpy(self.order), "numpy": self.rng.bit_generator.state,
                "torch": torch.get_rng_state()}

    def load_state_dict(self, state: dict) -> None:
        self.order, self.rng.bit_generator.state = state["order"].numpy(), state["numpy"]
        torch.set_rng_state(state["torch"])


def training_of(model, optimizer, schedule, draws: Draws, stage: str, pictures: np.ndarray, epochs: int,
                seed: int, out: str, resume: bool) -> runs.Training:
    """The frame of a pre-training: header, bar, saving, resuming. A run on other pictures is refused."""
    settings = {"epochs": epochs, "seed": seed, "pictures": len(pictures), "batch": BATCH,
                "drawn": hashlib.sha256(pictures.data).hexdigest()[:16]}
    return runs.Training(runs.run_folder(out, "toyland", stage), stage, settings,
                         {"stage": stage, "versions": machine.versions(), **settings}, model, optimizer,
                         steps=epochs * draws.per_epoch, steps_per_epoch=draws.per_epoch, resume=resume,
                         also={"schedule": schedule, "draws": draws})


def pretrain(pictures: np.ndarray, captions: list[str], epochs: int, seed: int, out: str = "runs",
             resume: bool = False) -> clip.CLIP:
    """The small CLIP, from captioned pictures alone. The order of pictures and templates follows the seed."""
    torch.manual_seed(seed)
    draws = Draws(len(pictures), 4, seed)
    model = clip.CLIP(**SMALL_CLIP)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98),
                                  weight_decay=WEIGHT_DECAY)
    steps = epochs * draws.per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps,
                                                   pct_start=0.05, cycle_momentum=False)
    with training_of(model, optimizer, schedule, draws, "pretrain", pictures, epochs, seed, out,
                     resume) as training:
        for step in range(training.first_step, steps):
            chosen = draws.batch(step)
            images = to_batch(pictures[chosen])
            unique, caption = np.unique([captions[i] for i in chosen], return_inverse=True)
            texts = [TEMPLATES[draws.rng.integers(len(TEMPLATES))].format(named) for named in unique]
            dropout = PATCH_DROPOUT if step < (1 - WHOLE_PICTURES) * steps else 0.0
            image_features = F.normalize(encode_some_patches(model, images, dropout), dim=-1)
            text_features = F.normalize(model.encode_text(clip.tokenize(texts)), dim=-1)
            loss = caption_loss(image_features, text_features, torch.from_numpy(caption),
                                model.logit_scale.exp())
            training.descend(loss, None, texts)
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=np.log(100))                       # CLIP, Sec. 2.5
            training.done(loss=loss, scale=model.logit_scale.exp())
    return model.eval()


def pretrain_resnet(pictures: np.ndarray, captions: list[str], epochs: int, seed: int, out: str = "runs",
                    resume: bool = False) -> SmallResNet:
    """Train the small ResNet to say which classes a picture's caption names: one yes or no per class."""
    torch.manual_seed(seed)
    draws = Draws(len(pictures), 5, seed)
    words = [caption.replace(" and the ", " ").replace(" on the ", " ").split() for caption in captions]
    named = torch.tensor([[name in said for name in CLASSES] for said in words]).float()
    resnet = small_resnet(pretrained=False)
    optimizer = torch.optim.SGD(resnet.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    steps = epochs * draws.per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, cycle_momentum=False)
    with training_of(resnet, optimizer, schedule, draws, "pretrain_resnet", pictures, epochs, seed, out,
                     resume) as training:
        for step in range(training.first_step, steps):
            chosen = draws.batch(step)
            loss = F.binary_cross_entropy_with_logits(resnet(to_batch(pictures[chosen])), named[chosen])
            training.descend(loss, None, [captions[i] for i in chosen])
            schedule.step()
            training.done(loss=loss)
    return resnet.eval()


# ------------------------------------------------------------------------------------------ the command


def main(args: argparse.Namespace) -> None:
    if args.pictures < BATCH:
        raise ValueError(f"--pictures: expected at least {BATCH}, one batch; found {args.pictures}.")
    started = time.monotonic()
    torch.set_num_threads(1)                    # so that every bit is the same for any number of cores
    pictures, captions = pretraining_pictures(args.seed, args.pictures)
    model = pretrain(pictures, captions, args.epochs, args.seed, args.out, args.resume)
    resnet = pretrain_resnet(pictures, captions, RESNET_EPOCHS, args.seed, args.out, args.resume)
    folder = Path(args.weights)
    files.save(folder / "clip.pt", weights_to_ship(model, captions))
    files.save(folder / "resnet.pt", {name: tensor.half() if tensor.is_floating_point() else tensor
                                      for name, tensor in resnet.state_dict().items()})
    print(f"Wrote {folder}/clip.pt and resnet.pt after {(time.monotonic() - started) / 60:.0f} minutes. "
          f"{machine.versions()}, one thread.")


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
