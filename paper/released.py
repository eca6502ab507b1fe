"""The files of the authors' release: measure theirs here, write ours in their form.

    python paper/released.py best_weight.pth --data voc --out runs-released
    python paper/released.py --write hypotheses.json --data voc

The first command puts the rectification of a release's checkpoint into a run folder; evaluate.py and
distill.py go on from it. What they trained is taken over as it is, and M_o is theirs:

- The convolution's bias is a constant in front of BatchNorm: it is taken from the running mean.
- The release cuts class names to three tokens and reads W_r at the largest token id among them. For names of
  one or two tokens that is the end token, as here. Where one is longer, 73 vectors leave no room for its end
  token here: the prompt is shortened, and the projection is solved for, so that M_b = W_p W_rᵀ stays theirs.
- Its image tower has eps = 1e-6 in LayerNorm, ours has OpenAI's 1e-5: a relative 4e-6 in Z.

Their numbers are measured with prompt denoising (evaluate.py --prompt-denoising), and belong to their class
names: --classes, where ours are others. The second command writes the hypotheses H of the training images, of
the run in --out or else of the dataset's recipe, or of --hypotheses FILE in the other form.

    C classes · D joint dimension (512) · E ViT width (768) · Et text width (512) · L learned vectors (73)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # modules are named from the project's folder

from harness import errors, flags as common


def flags() -> argparse.ArgumentParser:
    parser = common.parser(__doc__, "seed", "hypotheses")
    parser.add_argument("checkpoint", nargs="?", type=common.path, metavar="CHECKPOINT",
                        help="the release's best_weight.pth")
    parser.add_argument("--write", type=common.path, metavar="FILE",
                        help="write the hypotheses of the training images, one JSON list a line as the "
                             "release does")
    parser.add_argument("--by-id", action="store_true", help="with --write: a JSON object, image id → list")
    return parser


if __name__ == "__main__":
    FLAGS = flags().parse_args()            # before torch is imported: --help answers at once

import json
from dataclasses import replace

import torch
from torch import Tensor

import clip
import data
import evaluate
import rectify
from clip.download import sha256
from clip.tokenizer import END, START
from datasets import images as image_files
from harness import files, runs
from paper import systems

# ---------------------------------------------------------------------------- their rectification

NAMES = {                                   # ours → theirs
    "prompt": "text_encoder.prompt_token",                                  # (1, L, Et)
    "projection.weight": "pe_proj.weight", "projection.bias": "pe_proj.bias",
    "decoder.conv.weight": "decoder_conv2.weight",                          # features first, then logits
    "decoder.norm.weight": "decoder_norm2.weight", "decoder.norm.bias": "decoder_norm2.bias",
    "decoder.norm.running_mean": "decoder_norm2.running_mean",
    "decoder.norm.running_var": "decoder_norm2.running_var",
}
CONV_BIAS = "decoder_conv2.bias"            # (C)


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """What was trained, under the release's names without "module.", in float32. Raises ValueError,
    FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the release's checkpoint, found no such file.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state = {name.removeprefix("module."): tensor for name, tensor in content.items()}
        return {name: state[name].float() for name in (*NAMES.values(), CONV_BIAS)}
    except KeyError as missing:
        raise ValueError(f"{path}: expected the state dict of the release's rectification, found no "
                         f"{missing.args[0]} in it. Take its best_weight.pth of the first stage.") from None
    except Exception as error:              # torch has one of its own for every kind of damage
        raise ValueError(f"{path}: expected the state dict of the release's rectification, found another "
                         f"content or a damaged file ({type(error).__name__}).") from error


def in_our_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of rectify.Rectifier. BN(conv(x) + b) = BN with running mean less b, of conv(x)."""
    ours = {name: theirs[of_theirs] for name, of_theirs in NAMES.items()}
    ours["prompt"] = ours["prompt"][0]                                                      # (L, Et)
    ours["decoder.norm.running_mean"] = ours["decoder.norm.running_mean"] - theirs[CONV_BIAS]
    return ours | {"decoder.norm.num_batches_tracked": torch.tensor(0)}


@torch.no_grad()
def their_reference(clip_model: clip.CLIP, prompt: Tensor, class_names: list[str]) -> Tensor:
    """W_r as the release reads it: prompt (L, Et) → (C, D), the whole matrix of length one.

    The first three tokens of name, end and zeros follow the L vectors; read is the one with the largest id.
    """
    rows = []
    for name in class_names:
        tokens = torch.tensor((clip.encode(name) + [END, 0, 0])[:3], device=clip_model.device)
        words = clip_model.token_embedding(torch.cat([tokens.new_tensor([START]), tokens]))
        sentence = torch.cat([words[:1], prompt, words[1:]])                                # (1 + L + 3, Et)
        x = clip_model.transformer((sentence + clip_model.positional_embedding[:len(sentence)])[None])
        rows.append(clip_model.ln_final(x[0, len(prompt) + 1 + tokens.argmax()]) @ clip_model.text_projection)
    reference = torch.stack(rows)
    return reference / reference.norm()


def with_room_for(ours: dict[str, Tensor], clip_model: clip.CLIP, class_names: list[str],
                  length: int) -> dict[str, Tensor]:
    """The same M_b from a prompt of `length` vectors, which leave room for the longest name's end token.

    With our W_r of the shortened prompt, a projection P′ with W_r P′ = (their W_r) P gives their bias logits:
    P′ = W_r⁺ (their W_r) P. Exact where the C ≤ D rows of W_r are independent; what rounding leaves is said.
    """
    device = clip_model.device
    theirs = their_reference(clip_model, ours["prompt"].to(device), class_names).double().cpu()      # (C, D)
    with torch.no_grad():
        kept = ours["prompt"][:length]
        reference = rectify.reference_features(clip_model, kept.to(device), class_names).double().cpu()
    weight = ours["projection.weight"].flatten(start_dim=1)
    projection = torch.cat([weight, ours["projection.bias"][:, None]], dim=1).double()      # (D, E + 1)
    solved = (torch.linalg.pinv(reference) @ (theirs @ projection)).float()
    wanted, found = theirs @ projection, reference @ solved.double()                        # (C, E + 1)
    print(f"A class name of three tokens or more leaves room for {length} of {len(ours['prompt'])} learned "
          f"vectors. The projection was solved for: M_b is the release's, to a relative "
          f"{((found - wanted).norm() / wanted.norm()).item():.0e}.")
    return ours | {"prompt": kept, "projection.weight": solved[:, :-1, None, None],
                   "projection.bias": solved[:, -1]}


def import_rectification(args: argparse.Namespace) -> data.Setup:
    """Write the run folder's rectification. Raises ValueError where one stands, or the shapes are others."""
    setup, theirs = data.open_setup(args), read_checkpoint(Path(args.checkpoint))
    folder, system = setup.folder("rectify"), rectify.System()
    if (folder / "checkpoint.pt").exists():
        raise ValueError(f"{folder}: expected no rectification yet, found one. Give another --out, which "
                         "keeps both.")
    ours, recipe = in_our_names(theirs), rectify.recipe_of(setup, system)
    full = replace(recipe, prompt_length=rectify.Recipe.prompt_length)
    for name, tensor in rectify.build_rectifier(setup, full, system).cpu().state_dict().items():
        if ours[name].shape != tensor.shape:
            raise ValueError(f"{args.checkpoint}: expected {NAMES[name]} for {len(setup.vocabulary)} classes "
                             f"and this CLIP, {tuple(tensor.shape)}, found {tuple(ours[name].shape)}. Name "
                             "the dataset that it was trained on (--data, --classes) and its CLIP (--clip).")
    if recipe.prompt_length < full.prompt_length:
        ours = with_room_for(ours, setup.clip_model, setup.vocabulary.names, recipe.prompt_length)
    files.save(folder / "checkpoint.pt", {"stage": "rectify", "step": 0, "weights": ours,
                                          "settings": runs.plain(setup.settings(system, recipe))})
    files.write_json(folder / "recipe.json", setup.header("rectify", system, recipe) | {
        "imported": args.checkpoint, "sha256": sha256(Path(args.checkpoint))})
    print(f"Wrote {folder}/: checkpoint.pt, recipe.json. Its LayerNorms have eps 1e-5, the release's 1e-6: a "
          "relative 4e-6 in Z.\n"
          f"Next: python evaluate.py --data {setup.data}{common.repeated(args)}")
    return setup


# ---------------------------------------------------------------------------- our hypotheses


def write_hypotheses(args: argparse.Namespace) -> dict[str, list[int]]:
    """H of every training image, as class numbers, into the file that --write names."""
    setup = data.open_setup(args, checkpoint := runs.find(args.out, args.data, "rectify"))
    system = systems.rectification_of(systems.of(checkpoint)) if checkpoint else rectify.System()
    recipe = evaluate.stage_1_recipe(setup)
    recipe = replace(recipe, hypotheses=args.hypotheses or recipe.hypotheses)
    votes = rectify.votes_of(setup, rectify.query_of(setup), recipe, system)
    of_image = {name: row.nonzero()[:, 0].tolist() for name, row in zip(
        setup.training_images, rectify.multi_label_hypothesis(votes, recipe.vote_threshold))}
    order = image_files.training_order(setup.data, setup.root)
    if not args.by_id and (lost := [name for name in order if name not in of_image]):
        raise ValueError(f"--write {args.write}: expected hypotheses of all images of the training list, "
                         f"found {len(lost)} that --skip-broken left out. Write them --by-id.")
    text = json.dumps(of_image) if args.by_id else "\n".join(json.dumps(of_image[name]) for name in order)
    files.write_atomically(Path(args.write), lambda file: file.write((text + "\n").encode()))
    print(f"Wrote {args.write}: {'by image id' if args.by_id else 'one list a line'}, {len(of_image)} "
          f"training images, {sum(map(len, of_image.values())) / len(of_image):.2f} classes each.")
    return of_image


def main(args: argparse.Namespace) -> None:
    if (args.checkpoint is None) == (args.write is None):
        raise ValueError("expected either the release's checkpoint to import or --write FILE, found "
                         f"{'neither' if args.write is None else 'both'}.")
    if args.write:
        write_hypotheses(args)
    else:
        import_rectification(args)


if __name__ == "__main__":
    with errors.one_paragraph(FLAGS.debug):
        main(FLAGS)
