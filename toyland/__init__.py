"""Toyland: a small drawn world in which the whole method runs in minutes, with a small CLIP of its own.

    world.py      the world and its pictures; `python toyland/world.py` draws them, with a sheet to look at
    networks.py   the small CLIP and the small ResNet, and their two weights files, clip.pt and resnet.pt
    pretrain.py   `python toyland/pretrain.py` trains both from captions alone, to the shipped bits
    README.md     what it shows, and what it does not
"""
