"""What test_processes.py lets torchrun start: no test itself.

    torchrun --nproc-per-node 2 tests/processes_worker.py steps rectify OUT    ten steps
    torchrun --nproc-per-node 2 tests/processes_worker.py run rectify …        a script, with small recipes
"""

import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from harness import errors, machine, processes, runs

import pytest
import torch

import distill
import evaluate
import helpers
import rectify

BATCH = 4


def steps(stage: str, out: str) -> None:
    """Process 0 writes what ten steps gave: {"losses", "gradients", "weights"}, all in float64. In float32
    one ReLU in a million rounds to its other side, and a young ResNet makes much of it."""
    single = torch.Tensor.float
    torch.Tensor.float = lambda self: self if self.dtype == torch.float64 else single(self)
    setup = helpers.toy_setup(Path(out).parent)
    setup.clip_model.double()
    processes.begin(setup.device)
    torch.manual_seed(0)
    names, D = setup.vocabulary.names, setup.clip_model.visual.proj.shape[1]
    query = helpers.unit(len(names), D, seed=1).double()
    votes = helpers.random(BATCH, len(names), seed=2).softmax(dim=1)
    recipe = rectify.Recipe(prompt_length=5, mask_scale=3.0, loss_scale=10.0)
    model, function = rectify.Rectifier(setup.clip_model, len(names), 5).double(), rectify.train_step
    if stage == "distill":
        head = distill.Inherited(model, query, query.flip(0), setup.clip_model.visual.patch_positions(4, 4))
        model, function = distill.Student("small", head, pretrained=False).double(), distill.train_step
    step_of = processes.parallel(function, model.train())
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, noise = torch.optim.SGD(learned, lr=0.05, momentum=0.9), torch.Generator()
    found = {"losses": [], "gradients": []}
    for step in range(10):
        mine = processes.share(BATCH)
        features = helpers.unit(BATCH, D, 5, 6, dim=1, seed=10 + step).double()[mine]
        noise.manual_seed(step)
        optimizer.zero_grad()
        if stage == "rectify":
            loss = step_of(setup.clip_model, features, votes[mine], query, names, recipe, noise)
        else:
            images = helpers.random(BATCH, 3, 40, 48, seed=30 + step).double()[mine]
            taught = helpers.random(BATCH, len(names), 5, 6, seed=50 + step).double()[mine]
            loss = step_of(features, taught, images, votes[mine], recipe, distill.Recipe(), noise)["loss"]
        loss.backward()
        found["losses"].append(processes.mean(loss))
        found["gradients"].append([parameter.grad.clone() for parameter in learned])
        optimizer.step()
    if machine.RANK == 0:
        torch.save(found | {"weights": model.state_dict()}, out)


def run(script: str, *flags: str) -> None:
    """A script as its last lines run it. Every step takes a moment, so that a run can be killed in it."""
    folder = Path(f"weights of {machine.RANK}")
    folder.mkdir(exist_ok=True)
    helpers.quick_recipes(pytest.MonkeyPatch(), folder)
    done = runs.Training.done
    runs.Training.done = lambda self, **losses: (time.sleep(0.05), done(self, **losses))
    args = sys.modules[script].flags().parse_args([*flags, "--device", "cpu"])
    with errors.one_paragraph():
        result = sys.modules[script].main(args)
        if script in ("rectify", "distill"):
            evaluate.after_training(result, script)


if __name__ == "__main__":
    {"steps": steps, "run": run}[sys.argv[1]](*sys.argv[2:])
