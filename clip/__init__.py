"""CLIP in our own code, compatible with OpenAI's package and weights. It knows no segmentation method.

    model, preprocess = clip.load("ViT-B/16", device="cuda")
    image_features = model.encode_image(preprocess(Image.open("cat.jpg"))[None])
    text_features = model.encode_text(clip.tokenize(["a photo of a cat", "a photo of a dog"]))

and, for segmentation, `model.encode_dense(images)` and `model.encode_prompt(prompt, class_names)`.
Reading order: model.py (the two towers), tokenizer.py (text → ids), load.py (a name or a file → a model),
weights.py (any file → tensors), download.py.
"""

from .load import MEAN, STD, available_models, build_model, fingerprint, load
from .model import ACTIVATIONS, CLIP, DENSE_PATHS
from .tokenizer import VOCABULARY, encode, tokenize
from .weights import read_state_dict

__all__ = ["ACTIVATIONS", "CLIP", "DENSE_PATHS", "MEAN", "STD", "VOCABULARY", "available_models",
           "build_model", "encode", "fingerprint", "load", "read_state_dict", "tokenize"]
