"""CLIP in our own code, compatible with OpenAI's package and weights.

    model, preprocess = clip.load("ViT-B/16", device="cuda")
    image_features = model.encode_image(preprocess(Image.open("cat.jpg"))[None])
    text_features = model.encode_text(clip.tokenize(["a photo of a cat", "a photo of a dog"]))

and, for segmentation, `model.encode_dense(images)` and `model.encode_prompt(prompt, class_names)`.
Reading order: model.py (the two towers), tokenizer.py (text → ids), load.py (files → weights), download.py.
"""

from .load import available_models, build_model, fingerprint, load, read_state_dict
from .model import CLIP, DENSE_PATHS
from .tokenizer import VOCABULARY, encode, tokenize

__all__ = ["CLIP", "DENSE_PATHS", "VOCABULARY", "available_models", "build_model", "encode", "fingerprint", "load",
           "read_state_dict", "tokenize"]
