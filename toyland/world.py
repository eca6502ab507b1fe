"""The drawn world: classes, captioned pictures, scenes.

    python toyland/world.py                    draw the scenes into data/toyland, and a sheet to look at

Two kinds of pictures, as CLIP learns from one kind and is then used on another:

captioned pictures   64×64: one or two things near the centre, or stuff alone. The caption names the things
                     and rarely what lies behind them. Pictures on the web are like this. The small CLIP
                     learns from these alone, and its class bias comes from them: the grass behind a tree is
                     part of what is called "tree".
scenes               96×128: several stuffs, things anywhere. These are segmented. Those of val and test have
                     a dense truth; the truth of training scenes is never written to disk.

    H,W pixels
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # modules are named from the project's folder

from harness import errors, files
from harness import flags as common


def flags() -> argparse.ArgumentParser:
    parser = common.plain_parser(__doc__)
    parser.add_argument("--root", type=common.path, default="data", metavar="DIR",
                        help="the scenes go to DIR/toyland (default: data)")
    parser.add_argument("--seed", type=common.whole(0), metavar="N", default=0,
                        help="of the captioned pictures on the sheet (default: 0)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before numpy is imported: --help answers at once

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

# ------------------------------------------------------------------------------------------ the world

# name: (colour in label pictures, where it is at home: the stuffs that it is usually seen on)
STUFF = {"sky": (135, 206, 250), "grass": (60, 160, 60), "water": (30, 80, 200), "sand": (235, 205, 130),
         "road": (110, 110, 110), "wall": (165, 75, 60)}
THINGS = {"house": ((128, 0, 64), ("grass", "sand")), "tree": ((0, 90, 30), ("grass", "sky")),
          "car": ((220, 20, 60), ("road", "road", "grass")), "bus": ((255, 140, 0), ("road", "road", "wall")),
          "boat": ((120, 60, 180), ("water",)), "sun": ((255, 230, 0), ("sky",)),
          "cloud": ((230, 230, 240), ("sky",)), "flower": ((255, 90, 200), ("grass", "wall")),
          "fish": ((0, 220, 200), ("water", "sand")), "balloon": ((170, 255, 80), ("sky", "sky", "wall"))}
CLASSES = [*STUFF, *THINGS]                 # car and bus are the pair that is easy to confuse
PALETTE = [*STUFF.values(), *(colour for colour, _ in THINGS.values())]
TEMPLATES = ["the {}.", "a photo of the {}.", "a picture of the {}.", "a drawing of the {}."]

PICTURE = 64                                # captioned pictures are square
SCENE = (96, 128)                           # height, width
TRAIN_SCENES, VAL_SCENES, TEST_SCENES = 1000, 500, 500      # numbers are chosen by val, never by test
SCENE_SEEDS = {"train": 1, "val": 2, "test": 6}     # 3 to 5 begin the seeds of captioned pictures and draws
# These two numbers make the small CLIP's class bias. Captions rarely name what lies behind a thing, so plain
# grass comes to say "tree". But some pictures show stuff alone, so CLIP does know grass when it sees it.
MENTION = 0.15                              # share of captions with things that also name what lies behind
PLAIN = 0.35                                # share of pictures that show stuff alone
SUPERSAMPLE = 2                             # pictures are drawn twice as large, then averaged: smooth edges


class Canvas:
    """A picture and its label map, painted together: a colour image (enlarged) and an index image (H, W)."""

    def __init__(self, height: int, width: int):
        self.height, self.width = height, width
        self.image = Image.new("RGB", (width * SUPERSAMPLE, height * SUPERSAMPLE))
        self.label = Image.new("L", (width, height))
        self.pens = ImageDraw.Draw(self.image), ImageDraw.Draw(self.label)
        self.index = 0                      # the class being painted

    def polygon(self, points, colour) -> None:
        points = [(float(x), float(y)) for x, y in points]
        fill = tuple(int(value) for value in np.clip(colour, 0, 255))
        self.pens[0].polygon([(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in points], fill=fill)
        self.pens[1].polygon(points, fill=self.index)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour) -> None:
        angle = np.linspace(0, 2 * np.pi, 20, endpoint=False)
        self.polygon(zip(x + rx * np.cos(angle), y + ry * np.sin(angle)), colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour)

    def stuff(self, name: str, top: int, bottom: int, rng: np.random.Generator, zoom: float = 1.0) -> None:
        """Fill the rows top..bottom with the texture of a stuff class, as seen from `zoom` times as near."""
        if bottom <= top:
            return
        H, W = (bottom - top) * SUPERSAMPLE, self.width * SUPERSAMPLE
        texture = TEXTURES[name](int(np.ceil(H / zoom)), int(np.ceil(W / zoom)), rng)
        texture = Image.fromarray(texture.clip(0, 255).astype(np.uint8))
        if zoom > 1:
            texture = texture.resize((W, H), Image.Resampling.BILINEAR)
        self.image.paste(texture, (0, top * SUPERSAMPLE))
        self.label.paste(CLASSES.index(name), (0, top, self.width, bottom))

    def thing(self, name: str, x: float, y: float, size: float, rng: np.random.Generator) -> None:
        """Paint a thing whose larger side is about `size` pixels, centred at (x, y)."""
        self.index = CLASSES.index(name)
        DRAWINGS[name](self, x, y, size / 2, rng)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """`(image (H, W, 3) uint8, label (H, W) uint8)`."""
        return np.asarray(self.image.reduce(SUPERSAMPLE)), np.asarray(self.label)


def shade(colour, rng: np.random.Generator, amount: float = 25) -> np.ndarray:
    """A colour, a little brighter or darker and a little off in each channel."""
    off = rng.normal(0, amount / 2)
    return (np.array(colour) + off + rng.normal(0, amount / 2, 3)).clip(0, 255).astype(int)


def pick(rng: np.random.Generator, *choices):
    return choices[rng.integers(len(choices))]


# ---- stuff: textures (H, W, 3)

def sky(H, W, rng):
    top, bottom = pick(rng, ((60, 130, 220), (170, 210, 250)), ((90, 160, 235), (200, 225, 250)),
                       ((70, 80, 160), (250, 170, 120)), ((130, 150, 180), (190, 200, 215)))
    ramp = np.linspace(0, 1, H)[:, None, None]
    return shade(top, rng) * (1 - ramp) + shade(bottom, rng) * ramp + np.zeros((H, W, 1))


def grass(H, W, rng):
    blades = rng.normal(0, 28, (1 + H // 6, W, 1)).repeat(6, axis=0)[:H]        # streaks six rows tall
    return shade((75, 150, 50), rng, 45) + blades * (0.6, 1, 0.4)


def water(H, W, rng):
    y, x = np.mgrid[:H, :W]
    phase = 2 * np.sin(x * rng.uniform(0.05, 0.15) + rng.uniform(0, 6))
    waves = np.sin(y * rng.uniform(0.45, 0.8) + phase)[..., None]
    return shade(pick(rng, (35, 95, 170), (30, 130, 150), (60, 90, 130)), rng, 35) + 24 * waves


def sand(H, W, rng):
    tone = shade((220, 190, 130), rng, 35)
    grains = rng.normal(0, 20, (1 + H // 2, 1 + W // 2, 1)).repeat(2, axis=0).repeat(2, axis=1)[:H, :W]
    return tone + grains


def road(H, W, rng):
    texture = shade((105, 105, 110), rng, 35) + rng.normal(0, 6, (H, W, 1))
    period = int(rng.integers(22, 44))
    for y in range(int(rng.integers(period)), H, period):                       # rows of dashed white lines
        dashes = (np.arange(W) + rng.integers(24)) % 24 < 13
        texture[y:y + 3, dashes] = (235, 235, 220)
    return texture


def wall(H, W, rng):
    h, w = int(rng.integers(9, 13)), int(rng.integers(18, 26))
    y, x = np.mgrid[:H, :W]
    row = y // h
    shifted = x + (row % 2) * (w // 2)
    mortar = (y % h < 2) | (shifted % w < 2)
    tone = rng.normal(0, 14, (H // h + 2, W // w + 3))[row, shifted // w]
    bricks = shade(pick(rng, (165, 75, 60), (180, 100, 75), (140, 90, 80)), rng, 25) + tone[..., None]
    return np.where(mortar[..., None], (205, 195, 185), bricks)


TEXTURES = dict(sky=sky, grass=grass, water=water, sand=sand, road=road, wall=wall)


# ---- things: x, y is the centre, r half of the larger side. Each has parts and a pattern of its own, so that
# a piece of it is as easy to tell as the whole. Each has a range of colours; those of car and bus overlap.

def house(c, x, y, r, rng):
    front = shade(pick(rng, (245, 190, 190), (250, 205, 185), (235, 180, 200)), rng)
    c.box(x - 0.8 * r, y - 0.2 * r, x + 0.8 * r, y + r, front)
    for k in range(6):                                          # boards
        c.box(x - 0.8 * r, y + (-0.1 + 0.18 * k) * r, x + 0.8 * r, y + (-0.04 + 0.18 * k) * r, front - 90)
    roof = shade(pick(rng, (95, 45, 55), (75, 50, 70)), rng)
    for k in range(5):                                          # rows of tiles, dark and bright
        top, bottom = y - (1 - 0.16 * k) * r, y - (0.84 - 0.16 * k) * r
        c.polygon([(x - (0.2 * k + 0.2) * r, bottom), (x - 0.2 * k * r, top), (x + 0.2 * k * r, top),
                   (x + (0.2 * k + 0.2) * r, bottom)], roof + 60 * (k % 2))
    c.box(x - 0.15 * r, y + 0.35 * r, x + 0.2 * r, y + r, shade((110, 70, 40), rng))
    for side in (-0.5, 0.52):
        c.box(x + (side - 0.2) * r, y + 0.05 * r, x + (side + 0.2) * r, y + 0.5 * r, (250, 250, 250))
        c.box(x + (side - 0.15) * r, y + 0.1 * r, x + (side + 0.15) * r, y + 0.45 * r,
              shade((90, 130, 170), rng))


def tree(c, x, y, r, rng):
    c.box(x - 0.13 * r, y, x + 0.13 * r, y + r, shade((100, 70, 45), rng))
    green = shade(pick(rng, (20, 85, 45), (35, 95, 35), (15, 75, 60)), rng)
    if rng.random() < 0.5:                                      # a fir: dark and bright tiers
        for k in range(4):
            half = (0.4 + 0.14 * k) * r
            bottom = y + (-0.4 + 0.3 * k) * r
            c.polygon([(x - half, bottom), (x, y + (-1 + 0.3 * k) * r), (x + half, bottom)],
                      green + 45 * (k % 2))
    else:                                                       # a broad crown with clumps of leaves
        for dx, dy in ((-0.4, -0.1), (0.4, -0.1), (0, -0.5), (0, -0.1)):
            c.ellipse(x + dx * r, y + dy * r, 0.48 * r, 0.48 * r, green)
        for angle in np.arange(14) * 2.4:
            d = 0.045 * angle / 2.4
            c.ellipse(x + d * 1.2 * r * np.cos(angle), y + (-0.22 + d * np.sin(angle)) * r, 0.1 * r, 0.1 * r,
                      green + 55)


def car(c, x, y, r, rng):
    body = shade(pick(rng, (205, 25, 35), (225, 45, 30), (170, 15, 40)), rng)
    c.polygon([(x - 0.55 * r, y - 0.1 * r), (x - 0.3 * r, y - 0.6 * r), (x + 0.3 * r, y - 0.6 * r),
               (x + 0.6 * r, y - 0.1 * r)], body)
    for left, top_left, top_right, right in ((-0.42, -0.22, -0.03, -0.03), (0.05, 0.05, 0.22, 0.44)):
        c.polygon([(x + left * r, y - 0.12 * r), (x + top_left * r, y - 0.5 * r),
                   (x + top_right * r, y - 0.5 * r), (x + right * r, y - 0.12 * r)], shade((60, 70, 85), rng))
    c.box(x - r, y - 0.12 * r, x + r, y + 0.32 * r, body)
    c.box(x - r, y + 0.1 * r, x + r, y + 0.16 * r, (35, 35, 40))                # then trim, lamp and door
    c.ellipse(x + 0.9 * r, y, 0.1 * r, 0.1 * r, (255, 240, 150))
    c.box(x - 0.01 * r, y - 0.1 * r, x + 0.03 * r, y + 0.3 * r, body - 60 * (body > 70))
    wheels(c, x, y + 0.32 * r, (-0.55, 0.55), 0.26, r)


def bus(c, x, y, r, rng):
    body = shade(pick(rng, (245, 120, 20), (250, 150, 30), (225, 50, 30)), rng)
    c.box(x - r, y - 0.7 * r, x + r, y + 0.5 * r, body)
    for row in (-0.62, -0.16):                                  # a double-decker: two rows of windows
        for k in range(5):
            c.box(x + (-0.93 + 0.38 * k) * r, y + row * r, x + (-0.65 + 0.38 * k) * r, y + (row + 0.3) * r,
                  shade((175, 220, 240), rng, 12))
    c.box(x - r, y + 0.26 * r, x + r, y + 0.34 * r, (250, 250, 250))
    wheels(c, x, y + 0.5 * r, (-0.6, 0.6), 0.2, r)


def wheels(c, x, y, places, size, r):
    for place in places:
        c.ellipse(x + place * r, y, size * r, size * r, (25, 25, 28))
        c.ellipse(x + place * r, y, 0.45 * size * r, 0.45 * size * r, (190, 190, 195))


def boat(c, x, y, r, rng):
    hull = shade(pick(rng, (30, 35, 75), (25, 25, 50)), rng)
    for k in range(4):                                          # planks
        top, bottom = y + (0.35 + 0.14 * k) * r, y + (0.49 + 0.14 * k) * r
        c.polygon([(x - (1 - 0.09 * k) * r, top), (x + (1 - 0.09 * k) * r, top),
                   (x + (0.91 - 0.09 * k) * r, bottom), (x - (0.91 - 0.09 * k) * r, bottom)],
                  hull + 150 * (k % 2))
    c.box(x - 0.05 * r, y - r, x + 0.05 * r, y + 0.35 * r, shade((90, 60, 40), rng))
    sail, seam = shade((250, 250, 245), rng, 12), shade(pick(rng, (30, 40, 100), (25, 25, 60)), rng)
    for right in (True, False):
        side, top, reach = (1, -0.95, 0.8) if right else (-1, -0.75, 0.6)
        for k in range(5):                                      # striped sails
            a, b = k / 5, (k + 1) / 5
            ya, yb = top + (0.22 - top) * a, top + (0.22 - top) * b
            c.polygon([(x + side * 0.1 * r, y + ya * r), (x + side * (0.1 + reach * a) * r, y + ya * r),
                       (x + side * (0.1 + reach * b) * r, y + yb * r), (x + side * 0.1 * r, y + yb * r)],
                      seam if k % 2 else sail)


def sun(c, x, y, r, rng):
    yellow = shade(pick(rng, (255, 225, 50), (255, 210, 40)), rng, 15)
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False) + rng.uniform(0, 1)
    radius = np.where(np.arange(24) % 2, 0.66, 1.0) * r
    c.polygon(zip(x + radius * np.cos(angle), y + radius * np.sin(angle)), yellow)
    for k, size in enumerate((0.66, 0.52, 0.38, 0.24, 0.1)):    # rings of fire
        c.ellipse(x, y, size * r, size * r, yellow if k % 2 else yellow - (15, 110, 20))


def cloud(c, x, y, r, rng):
    white = shade(pick(rng, (245, 245, 250), (225, 228, 235), (250, 235, 230)), rng, 12)
    for dx, dy, size in ((-0.6, 0.12, 0.36), (0.6, 0.12, 0.36), (-0.2, -0.12, 0.45), (0.28, -0.05, 0.4),
                         (0, 0.22, 0.4)):
        for k in range(3):                                      # curls: white rims around grey
            c.ellipse(x + dx * r, y + dy * r, (1 - 0.3 * k) * size * r, (0.8 - 0.24 * k) * size * r,
                      white - 60 * (k % 2))


def flower(c, x, y, r, rng):
    c.box(x - 0.06 * r, y - 0.2 * r, x + 0.06 * r, y + r, shade((40, 130, 50), rng))
    c.polygon([(x, y + 0.7 * r), (x + 0.45 * r, y + 0.35 * r), (x + 0.35 * r, y + 0.7 * r)],
              shade((50, 140, 60), rng))
    petal = shade(pick(rng, (235, 50, 150), (215, 50, 200), (250, 110, 180)), rng)
    for angle in np.linspace(0, 2 * np.pi, 6, endpoint=False) + rng.uniform(0, 1):
        px, py = x + 0.38 * r * np.cos(angle), y - 0.38 * r + 0.38 * r * np.sin(angle)
        c.ellipse(px, py, 0.25 * r, 0.25 * r, petal)
        c.ellipse(px, py, 0.1 * r, 0.1 * r, petal + 50)
    c.ellipse(x, y - 0.38 * r, 0.22 * r, 0.22 * r, shade((250, 210, 50), rng, 15))


def fish(c, x, y, r, rng):
    skin = shade(pick(rng, (40, 200, 190), (60, 215, 160), (30, 180, 210)), rng)
    fin = skin - 40 * (skin > 60)
    d = pick(rng, -1, 1)                                        # which way it swims
    c.polygon([(x - 0.45 * d * r, y), (x - d * r, y - 0.45 * r), (x - d * r, y + 0.45 * r)], fin)
    c.polygon([(x, y - 0.35 * r), (x + 0.35 * d * r, y - 0.35 * r), (x - 0.1 * d * r, y - 0.7 * r)], fin)
    c.ellipse(x + 0.2 * d * r, y, 0.78 * r, 0.46 * r, skin)
    for dx in (-0.3, -0.08, 0.14, 0.36):                        # rows of scales
        for dy in (-0.22, 0, 0.22):
            c.ellipse(x + (dx + 0.4 * abs(dy)) * d * r, y + dy * r, 0.08 * r, 0.08 * r, skin + 70)
    c.ellipse(x + 0.68 * d * r, y - 0.1 * r, 0.13 * r, 0.13 * r, (250, 250, 250))
    c.ellipse(x + 0.7 * d * r, y - 0.1 * r, 0.07 * r, 0.07 * r, (20, 20, 25))


def balloon(c, x, y, r, rng):
    skin = shade(pick(rng, (130, 50, 190), (90, 50, 200)), rng)
    stripe = shade((250, 215, 90), rng)
    c.polygon([(x - 0.55 * r, y - 0.1 * r), (x + 0.55 * r, y - 0.1 * r), (x + 0.16 * r, y + 0.6 * r),
               (x - 0.16 * r, y + 0.6 * r)], skin)
    for k in range(5):                                          # stripes, one inside the other
        c.ellipse(x, y - 0.35 * r, (0.7 - 0.15 * k) * r, 0.65 * r, stripe if k % 2 else skin)
    c.box(x - 0.18 * r, y + 0.66 * r, x + 0.18 * r, y + r, shade((130, 90, 50), rng))


DRAWINGS = dict(house=house, tree=tree, car=car, bus=bus, boat=boat, sun=sun, cloud=cloud, flower=flower,
                fish=fish, balloon=balloon)


# ------------------------------------------------------------------------------ captioned pictures and scenes

def captioned_picture(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """`(picture (64, 64, 3) uint8, what the caption names)`, for instance "car and the tree on the grass"."""
    canvas = Canvas(PICTURE, PICTURE)
    zoom = np.exp(rng.uniform(0, np.log(3)))                    # photographs are taken from near and far
    if rng.random() < PLAIN:                                    # stuff alone: one, or two with a horizon
        stuffs = [str(name) for name in rng.choice([*STUFF], size=rng.integers(1, 3), replace=False)]
        if "sky" in stuffs:
            stuffs.sort(key="sky".__ne__)                       # the sky comes first: it is above
        horizon = int(rng.uniform(0.3, 0.7) * PICTURE) if len(stuffs) == 2 else PICTURE
        canvas.stuff(stuffs[0], 0, horizon, rng, zoom)
        canvas.stuff(stuffs[-1], horizon, PICTURE, rng, zoom)
        return canvas.finish()[0], " and the ".join(stuffs)
    things = sorted(str(name) for name in rng.choice([*THINGS], size=1 + (rng.random() < 0.4), replace=False))
    # Three times out of four the first thing stands where it is at home. Captions rarely name that ground, so
    # CLIP comes to read "tree" off plain grass.
    ground = pick(rng, *THINGS[things[0]][1]) if rng.random() < 0.75 else pick(rng, *STUFF)
    horizon = 0
    if ground != "sky" and rng.random() < 0.5:
        horizon = int(rng.uniform(0.1, 0.5) * PICTURE)
        canvas.stuff("sky", 0, horizon, rng, zoom)
    canvas.stuff(ground, horizon, PICTURE, rng, zoom)
    for i, name in enumerate(things):
        # The largest are close-ups that show only a part of the thing: each part must say whose it is.
        size = np.exp(rng.uniform(np.log(16), np.log(110 if len(things) == 1 else 40)))
        offset = 0 if len(things) == 1 else (i - 0.5) * rng.uniform(20, 30)
        canvas.thing(name, PICTURE / 2 + offset + rng.normal(0, 5), PICTURE / 2 + rng.normal(0, 5), size, rng)
    named = " and the ".join(things) + (f" on the {ground}" if rng.random() < MENTION else "")
    return canvas.finish()[0], named


def scene(split: str, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Scene `number` of a split, always the same: `(image (96, 128, 3) uint8, truth (96, 128) uint8)`."""
    rng = np.random.default_rng([SCENE_SEEDS[split], number])
    H, W = SCENE
    canvas = Canvas(H, W)
    # Bands from top to bottom: mostly a sky (or a wall) over one or two grounds.
    bands = [pick(rng, "sky", "sky", "sky", "wall")]
    grounds = [name for name in STUFF if name not in ("sky", "wall")]
    bands += [str(name) for name in rng.permutation(grounds)[:rng.integers(1, 3)]]
    edges = [0, int(rng.uniform(0.25, 0.6) * H), H]
    if len(bands) == 3:
        edges.insert(2, int((edges[1] + H) / 2 + rng.uniform(-0.08, 0.08) * H))
    for name, top, bottom in zip(bands, edges, edges[1:]):
        canvas.stuff(name, top, bottom, rng)
    centres: list[tuple[float, float]] = []
    for _ in range(rng.integers(2, 6)):
        # Usually where it is at home, sometimes anywhere at all; never on top of another thing.
        name = str(rng.choice([*THINGS]))
        x, y = rng.uniform(0.03, 0.97) * W, rng.uniform(0.05, 0.95) * H
        homes = [(top, bottom) for band, top, bottom in zip(bands, edges, edges[1:])
                 if band in THINGS[name][1]]
        if homes and rng.random() < 0.7:
            top, bottom = pick(rng, *homes)
            y = rng.uniform(top + 4, max(top + 5, bottom - 4))
        if all(abs(x - other_x) + abs(y - other_y) > 36 for other_x, other_y in centres):
            centres.append((x, y))
            canvas.thing(name, x, y, np.exp(rng.uniform(np.log(24), np.log(60))), rng)
    return canvas.finish()


def draw_dataset(root: Path) -> Path:
    """Draw Toyland's dataset once, into `root`/toyland: images/{train,val,test}/*.png and
    labels/{val,test}/*.png.

    What is there already is kept, unless this file now draws another world. The training scenes' truth is not
    written, so nothing that trains can read it. Files get a temporary name first, and are renamed when
    whole: a killed run leaves no half picture behind.
    """
    root = Path(root) / "toyland"
    counts = {"train": TRAIN_SCENES, "test": TEST_SCENES, "val": VAL_SCENES}    # val last: see another_world
    wanted = [(split, f"{number:04d}.png", number) for split in counts for number in range(counts[split])]
    changed = another_world(root)
    missing = [(split, name, number) for split, name, number in wanted
               if changed or not (root / "images" / split / name).exists()
               or split != "train" and not (root / "labels" / split / name).exists()]
    if missing:
        for folder in ("images/train", "images/val", "images/test", "labels/val", "labels/test"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        for split, name, number in tqdm(missing, desc=f"drawing {root}", unit="scene"):
            image, truth = scene(split, number)
            if split != "train":                            # before its image, which `another_world` looks at
                label = Image.fromarray(truth)
                label.putpalette([value for colour in PALETTE for value in colour])
                write_png(label, root / "labels" / split / name)
            write_png(Image.fromarray(image), root / "images" / split / name)
    return root


def another_world(root: Path, samples: int = 8) -> bool:
    """Whether the last validation scenes on disk differ from those drawn now: a class was added, say."""
    # The last scenes, because they are drawn last: a redrawing that was interrupted begins again. Only images
    # are compared: drawing happens before a training too, and no training opens a label.
    for number in range(max(0, VAL_SCENES - samples), VAL_SCENES):
        path = root / "images" / "val" / f"{number:04d}.png"
        if path.exists():
            try:
                drawn = np.asarray(Image.open(path))
            except OSError:                                 # damaged, or no picture at all
                return True
            if not np.array_equal(drawn, scene("val", number)[0]):
                return True
    return False


def write_png(image: Image.Image, path: Path) -> None:
    files.write_atomically(path, lambda file: image.save(file, format="PNG"), flush=False)


# ------------------------------------------------------------------------------------------ the command


def main(args: argparse.Namespace) -> None:
    root = draw_dataset(Path(args.root))
    rng = np.random.default_rng(args.seed)
    rows = [[captioned_picture(rng)[0] for _ in range(12)] for _ in range(4)]
    scenes = [scene("val", number) for number in range(12)]
    colours = np.array(PALETTE, dtype=np.uint8)
    for half in (scenes[:6], scenes[6:]):
        rows += [[image for image, _ in half], [colours[truth] for _, truth in half]]
    page = Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in rows]))
    files.write_atomically(root / "overview.png", lambda file: page.save(file, format="PNG"))
    print(f"Wrote {root}/: images of train, val and test, labels of val and test, and overview.png "
          "(captioned pictures, then scenes and their truth).\nNext: python rectify.py")


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
