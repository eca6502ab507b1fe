"""The two small networks of Toyland and their weights files: a CLIP, and a ResNet for the student.

Both learned from captioned pictures alone; no scene and no label took part (toyland/pretrain.py).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torchvision.models.resnet import Bottleneck

import clip
from harness import files
from toyland.world import CLASSES, PICTURE, TEMPLATES

CLIP_WEIGHTS = Path(__file__).with_name("clip.pt")
RESNET_WEIGHTS = Path(__file__).with_name("resnet.pt")

# OpenAI's architecture and tokenizer at small size. [ours: one core trains it in minutes] Only two layers: in
# a deeper small tower every patch learns what the whole picture shows, and says that, not what is under it.
SMALL_CLIP = dict(embed_dim=128, image_resolution=PICTURE, vision_patch_size=8, vision_width=128,
                  vision_layers=2, context_length=77, vocab_size=49408, transformer_width=128,
                  transformer_heads=2, transformer_layers=2)


def small_clip() -> clip.CLIP:
    """The small CLIP that ships with the project, in eval mode, on the CPU."""
    state = files.read(CLIP_WEIGHTS)
    # The file holds the rows of a few tokens alone (see `weights_to_ship`); all others are zero.
    used, rows = state.pop("token_embedding.used"), state["token_embedding.weight"]
    state["token_embedding.weight"] = rows.new_zeros(clip.VOCABULARY, rows.shape[1]).index_copy(0, used, rows)
    return clip.build_model(state, source=str(CLIP_WEIGHTS)).eval()


def weights_to_ship(model, captions: list[str]) -> dict[str, Tensor]:
    """What clip.pt holds: the state dict, with the token embeddings of the captions' words alone.

    All but 27 of the 49,408 rows never get a gradient. They stay noise, and would fill nearly the whole file.
    So "token_embedding.weight" has the other rows only, and "token_embedding.used" says which they are.
    All weights are in half precision.
    """
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    texts = {template.format(named) for template in TEMPLATES for named in set(captions)}
    seen = torch.cat([clip.tokenize(sorted(texts)).flatten().long(), torch.tensor([49406, 49407])]).unique()
    seen = seen[seen > 0]
    table = state["token_embedding.weight"]
    return state | {"token_embedding.used": seen, "token_embedding.weight": table[seen].clone()}


class SmallResNet(torchvision.models.ResNet):
    """torchvision's ResNet with two bottlenecks a stage and few channels: 32, 64, 128 and again 128."""

    def __init__(self):
        super().__init__(Bottleneck, [2, 2, 2, 2], num_classes=len(CLASSES),
                         replace_stride_with_dilation=[False, True, True])
        self.fc = torch.nn.Linear(self.inplanes, len(CLASSES))

    def _make_layer(self, block, planes, *args, **kwargs):
        return super()._make_layer(block, min(planes // 8, 32), *args, **kwargs)


def small_resnet(pretrained: bool = True) -> SmallResNet:
    """The student's backbone in Toyland, output stride 8; pre-trained on captioned pictures if asked.

    In the paper the student starts from ImageNet. Toyland's stand-in is its captioned pictures: the network
    learned which class names a picture's caption holds. No scene and no label took part. Raises
    FileNotFoundError when resnet.pt is missing, ValueError when it knows another number of classes.
    """
    resnet = SmallResNet()
    if pretrained:
        weights = files.read(RESNET_WEIGHTS)
        if (outputs := len(weights["fc.weight"])) != len(CLASSES):
            raise ValueError(f"{RESNET_WEIGHTS}: expected one output for each of Toyland's {len(CLASSES)} "
                             f"classes, found {outputs}. The world has changed: train its two networks again "
                             "with python toyland/pretrain.py")
        resnet.load_state_dict({name: tensor.float() if tensor.is_floating_point() else tensor
                                for name, tensor in weights.items()})
    return resnet
