"""What a run works on, for all scripts alike: images, words, and the frozen CLIP, as the flags or a checkpoint name them.

No equation stands here. `open_world` makes a World; a checkpoint remembers what `described` says of it, and is refused where
that no longer fits.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

import clip
import data
import runs


@dataclass
class World:
    """What a run works on: images, words and the frozen CLIP. Made by `open_world`, shared by all scripts."""
    name: str                               # toyland, that of a public dataset, or a folder's path
    root: str
    vocabulary: data.Vocabulary
    clip_name: str
    clip_model: clip.CLIP
    fingerprint: str                        # of CLIP's weights
    device: torch.device
    precision: str
    workers: int
    out: str
    skip_broken: bool = False
    skipped: list[str] = field(default_factory=list)       # ids of images that cannot be read, left out if asked
    shared_cache: str | None = None         # --cache

    def folder(self, stage: str) -> Path:
        return runs.stage_folder(self.out, self.name, stage)

    @property
    def cache(self) -> Path:
        """Where query, hypotheses and features are kept that another run would have to make again."""
        return Path(self.shared_cache) if self.shared_cache else self.folder("cache")

    @functools.cached_property
    def training_images(self) -> dict[str, Path]:
        """id → path; without those that cannot be read if `--skip-broken` says so."""
        return self.without_broken(data.training_images(self.name, self.root))

    @functools.cached_property
    def validation_images(self) -> dict[str, Path]:
        if runs.is_folder(self.name):                   # a folder of your own has one set of images
            return self.training_images
        return self.without_broken(data.validation_images(self.name, self.root))

    def without_broken(self, images: dict[str, Path]) -> dict[str, Path]:
        if not self.skip_broken:
            return images
        good, broken = data.readable(images)
        self.skipped = list(broken)
        print(f"--skip-broken: {len(broken)} of {len(images)} images are left out.")
        for reason in broken.values():
            print(f"  {reason}")
        if not good:
            raise ValueError(f"--data {self.name}: expected images, found none of {len(images)} that can be read.")
        return good

    def described(self) -> dict:
        """What a checkpoint remembers of its world, and `open_world` reads back."""
        return {"data": self.name, "root": self.root, "synonyms": [list(names) for names in self.vocabulary.synonyms],
                "clip_name": self.clip_name, "clip": self.fingerprint}

    def settings(self, recipe, seed: int) -> dict:
        """What the weights of a training depend on: a checkpoint holds it, and a run with other settings is not resumed."""
        return {"world": self.described(), "recipe": asdict(recipe), "seed": seed, "precision": self.precision,
                "images": list(self.training_images)}

    def header(self, stage: str, recipe, seed: int) -> dict:
        """What a training prints before it starts and keeps as recipe.json."""
        return {"stage": stage, "data": self.name, "images": len(self.training_images), "skipped": self.skipped,
                "classes": len(self.vocabulary), "clip": f"{self.clip_name} ({self.fingerprint})",
                "device": str(self.device), "precision": self.precision, "seed": seed, "versions": runs.versions(),
                "recipe": asdict(recipe)}

    def refuse_misfit(self, checkpoint: dict) -> None:
        """Raise ValueError when a checkpoint was made for another class list or another CLIP."""
        path = self.folder(checkpoint["stage"]) / "checkpoint.pt"
        for what, (expected, found) in self.misfits(checkpoint).items():
            runs.refuse_unless(path, what, expected, found)

    def misfits(self, checkpoint: dict) -> dict[str, tuple]:
        """What a checkpoint was made for that is another here: "class list" or "CLIP" → (expected, found)."""
        expected, found = self.described(), checkpoint["settings"]["world"]
        return {what: (expected[part], found[part]) for part, what in (("synonyms", "class list"), ("clip", "CLIP"))
                if expected[part] != found[part]}


def open_world(args: argparse.Namespace, checkpoint: dict | None = None,
               vocabulary: data.Vocabulary | None = None) -> World:
    """The world that the flags name; what they leave open is as in `checkpoint`, else Toyland.

    `vocabulary` replaces the flags' classes. Raises ValueError or FileNotFoundError, also when the class list or CLIP's
    weights are not those of the checkpoint.
    """
    known = checkpoint["settings"]["world"] if checkpoint else {}
    default = "toyland" if vocabulary is None else "photo"          # a user's own words are not Toyland's
    name = getattr(args, "data", known.get("data", default))
    if vocabulary is None and known and not hasattr(args, "classes"):
        vocabulary = data.vocabulary_of(name, tuple(tuple(names) for names in known["synonyms"]))
    if vocabulary is None:
        vocabulary = data.vocabulary(name, getattr(args, "classes", None))
    device = runs.device_of(args)
    clip_name = getattr(args, "clip", known.get("clip_name", "toyland" if name == "toyland" else "ViT-B/16"))
    root = getattr(args, "root", known.get("root", "data"))
    if args.download:
        data.download(name, root)
    model, _ = clip.load(clip_name, device)
    if (words := model.token_embedding.num_embeddings) != clip.VOCABULARY:
        raise ValueError(f"--clip {clip_name}: expected CLIP's vocabulary of {clip.VOCABULARY} tokens, found {words}.")
    model.requires_grad_(False)                                     # frozen for ever: no gradient is even recorded
    if args.compile:
        for block in model.visual.transformer.resblocks:
            block.compile()
    world = World(name, root, vocabulary, clip_name, model, clip.fingerprint(model), device, args.precision,
                  runs.workers_of(args, device), args.out, args.skip_broken, shared_cache=getattr(args, "cache", None))
    if known:
        refuse_another_folder(world)
        world.refuse_misfit(checkpoint)
    return world


def refuse_another_folder(world: World) -> None:
    """Raise ValueError when the run folder holds what was trained on another folder of images with the same name."""
    for stage in ("rectify", "distill"):
        path = world.folder(stage) / "checkpoint.pt"
        if not path.exists():
            continue
        if runs.is_folder(world.name):
            data.refuse_missing_folder(Path(world.name))
        content = runs.load(path, stage)
        with runs.reading(path):
            known = content["settings"]["world"]["data"]
            expected, found = (str(Path(name).resolve()) if runs.is_folder(name) else name for name in (world.name, known))
        if runs.is_folder(world.name) or runs.is_folder(known):     # public datasets have their own names (or were renamed)
            runs.refuse_unless(path, "folder of images", expected=expected, found=found)


def recipe_for(world: World, args: argparse.Namespace, recipes: dict):
    """The dataset's recipe, with what the flags say put in. A horizon never ends before the epochs do."""
    recipe = recipes.get(world.name, recipes["folder"] if runs.is_folder(world.name) else None)
    if getattr(args, "ablation", "none") != "none":
        import ablations
        recipe = ablations.recipe_for(args.ablation, recipe, world.name)
    if hasattr(args, "epochs"):
        recipe = replace(recipe, epochs=args.epochs)
        if hasattr(recipe, "horizon"):                              # stage 2 trains to the end of its schedule
            recipe = replace(recipe, horizon=max(recipe.horizon, args.epochs))
    if hasattr(args, "batch_size"):             # the rate goes with it, as in [code] for Cityscapes: 16 images, 0.16
        larger = min(args.batch_size, len(world.training_images)) / recipe.batch_size
        if hasattr(recipe, "floor_rate"):
            recipe = replace(recipe, floor_rate=recipe.floor_rate * larger)
        recipe = replace(recipe, batch_size=args.batch_size, learning_rate=recipe.learning_rate * larger)
    for name in ("vote_threshold", "window_ratio"):
        if hasattr(args, name):
            if recipe.ablation != "none" and "cached_hypotheses" in ablations.IN_PLACE_OF[recipe.ablation]:
                raise ValueError(f"--{name.replace('_', '-')}: expected hypotheses from windows, found --ablation "
                                 f"{recipe.ablation}, which looks at whole images. Leave one of the two out.")
            recipe = replace(recipe, **{name: getattr(args, name)})
    if hasattr(args, "cache_features"):
        recipe = replace(recipe, augment_once=True)
    return recipe


def stamps_of(images: dict[str, Path]) -> list[tuple[str, int, int]]:
    """What tells whether an image file is still the one that a cache was made from."""
    return [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in images.items()]
