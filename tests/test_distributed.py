"""Chapter 06: two real processes give the weights of one, and a run may change their number when it is resumed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from bitlib.pretrain import PretrainConfig, TrainingInterrupted, load_state, pretrain, shard_indices, train
from bitlib.resnet import create_model

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
STEPS, BATCH, N = 6, 7, 40  # two processes cannot share 7 images evenly; 6 steps cross the end of an epoch


def job(run_dir, rank=0, world=1, stop=None, **options):
    """A small BiT in double precision on random images; with `stop`, process world - 1 gets SIGTERM at that step."""
    torch.manual_seed(0)
    model = create_model("R14x0.25", num_classes=3).double()
    nn.init.normal_(model.head.weight, std=0.1)
    g = torch.Generator().manual_seed(1)
    images, labels = torch.rand(N, 3, 32, 32, generator=g, dtype=torch.float64), torch.randint(3, (N,), generator=g)

    def batch_fn(step):
        chosen = shard_indices(step, BATCH, N, 0, rank, world)
        return images[chosen], labels[chosen]

    def on_step(step, model):
        if step == stop and rank == world - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    options = {"save_every": 2, "log_every": 2, "weight_decay": 1e-3, "micro_batch": 2, "progress": False} | options
    evaluated = {"eval_fn": lambda model: {"norm": model.head.weight.norm().item()}, "eval_every": 3}
    try:
        history = train(
            model,
            batch_fn,
            F.cross_entropy,
            lambda step: 0.05,
            STEPS,
            run_dir=run_dir,
            on_step=on_step,
            **evaluated,
            **options,
        )
    except TrainingInterrupted as error:
        return error, None
    return model.state_dict(), history


def in_every_process(folder):
    """What each of the processes that torchrun starts does."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.set_num_threads(1)
    weights, _ = job(folder / "two", rank, world)
    everyone = [None] * world
    dist.all_gather_object(everyone, {name: tensor.sum().item() for name, tensor in weights.items()})
    assert all(sums == everyone[0] for sums in everyone), "the processes ended with different weights"
    stopped, _ = job(folder / "two then one", rank, world, stop=3)
    assert stopped.signum == signal.SIGTERM
    job(folder / "one then two", rank, world)
    dist.destroy_process_group()


def torchrun(*words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def end_of(folder):
    tensors, about = load_state(folder / f"step-{STEPS:09d}.safetensors")
    return {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}, about, tensors


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    stopped, _ = job(folder / "one then two", stop=3)
    assert stopped.signum == signal.SIGTERM
    torchrun(__file__, str(folder))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return job(tmp_path_factory.mktemp("alone"))


def test_two_processes_equal_one(runs, alone):
    weights, about, tensors = end_of(runs / "two")
    assert about["place"]["processes"] == 2 and about["images"] == STEPS * BATCH
    assert largest_difference(weights, alone[0]) < 1e-10
    assert tensors["history.loss"].tolist() == pytest.approx(alone[1].loss, abs=1e-6)
    assert tensors["history.grad_norm"].tolist() == pytest.approx(alone[1].grad_norm, abs=1e-6)
    assert [row["norm"] for row in about["evals"]] == pytest.approx([row["norm"] for row in alone[1].evals])


def test_a_run_of_one_goes_on_with_two(runs, alone):
    weights, about, _ = end_of(runs / "one then two")
    assert about["place"]["processes"] == 2
    assert largest_difference(weights, alone[0]) < 1e-10


def test_a_run_of_two_goes_on_with_one(runs, alone, capsys):
    """The signal reached only the second process, and both stopped after the same step."""
    folder = runs / "two then one"
    assert sorted(path.name for path in folder.glob("step-*")) == [
        "step-000000002.safetensors",
        "step-000000003.safetensors",
    ]
    weights, history = job(folder)
    assert "processes: the checkpoint has 2, this run has 1" in capsys.readouterr().err
    assert largest_difference(weights, alone[0]) < 1e-10
    assert history.loss == pytest.approx(alone[1].loss, abs=1e-6)


def test_the_command_line_under_torchrun(tmp_path):
    config = PretrainConfig(
        model="R14x0.25", data="S", steps=3, batch_size=5, lr=0.02, warmup_steps=0, image_size=32, val_images=10
    )
    done = torchrun(*config.command().split()[1:], "--out", str(tmp_path / "run"))
    assert done.stdout.count("model.safetensors: R14x0.25 after 3 steps") == 1, "only the first process speaks"
    two = load_file(tmp_path / "run" / "model.safetensors")
    one = pretrain(config, progress=False).model.state_dict()
    assert largest_difference(two, one) < 1e-4
    assert (tmp_path / "run" / "card.json").exists()


def test_more_processes_than_images_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="a batch of 5 cannot be shared by 8 processes"):
        pretrain(PretrainConfig(model="R14x0.25", data="S", batch_size=5), progress=False)


if __name__ == "__main__":
    in_every_process(Path(sys.argv[1]))
