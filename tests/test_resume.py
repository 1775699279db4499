"""Chapter 06: a run that is killed, interrupted or damaged ends with the same bits as one that was left alone."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bitlib import pretrain as module
from bitlib.pretrain import (
    TrainingError,
    TrainingInterrupted,
    load_state,
    newest_state,
    save_state,
    train,
    warmup_cosine_lr,
)

ROOT = Path(__file__).parent.parent
STEPS = 30


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))


def batch_fn(step):
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(step))
    return x, x[:, :4].argmax(dim=1)


def job(run_dir, seed=0, model=None, **options):
    """Thirty steps with dropout, a checkpoint every five; the weights at the end."""
    model = model or model_of(seed)
    options = {
        "lr": lambda step: warmup_cosine_lr(step, 0.1, 5, STEPS),
        "weight_decay": 1e-3,
        "save_every": 5,
        "log_every": 4,
        "eval_fn": lambda model: {"norm": sum(p.norm().item() for p in model.parameters())},
        "eval_every": 7,
        "progress": False,
    } | options
    history = train(model, batch_fn, F.cross_entropy, steps=options.pop("steps", STEPS), run_dir=run_dir, **options)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, history


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return *job(folder), log_of(folder)


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "second" not in name} for line in lines]


def assert_same(result, folder, whole):
    weights, history = result
    assert all(torch.equal(weights[name], whole[0][name]) for name in whole[0])
    assert history == whole[1]
    assert log_of(folder) == whole[2]


class PowerCut(BaseException):
    pass


def stop_at(step, error=PowerCut):
    def on_step(done, model):
        if done == step:
            raise error

    return on_step


def checkpoints(folder):
    return sorted(int(path.stem[5:]) for path in folder.glob("step-*.safetensors"))


@pytest.mark.parametrize("step", [1, 4, 5, 6, 13, 29, 30])
def test_a_cut_at_any_step(step, tmp_path, whole):
    with pytest.raises(PowerCut):
        job(tmp_path, on_step=stop_at(step))
    assert_same(job(tmp_path, seed=9), tmp_path, whole)  # the other initial weights do not matter
    assert checkpoints(tmp_path) == [25, 30]


def test_many_cuts_in_one_run(tmp_path, whole):
    for step in (3, 8, 8, 9, 17, 26):
        with pytest.raises(PowerCut):
            job(tmp_path, on_step=stop_at(step))
    assert_same(job(tmp_path), tmp_path, whole)


KILLS = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[2])
import test_resume
folder = test_resume.Path(sys.argv[1])
draw = random.Random(int(sys.argv[3]))
options = dict(steps=200, save_every=2, lr=lambda step: 0.05)

def life(run_dir, pipe, most):
    done = 0

    def on_step(step, model):
        nonlocal done
        done += 1
        os.write(pipe, b".")
        while done > most:
            signal.pause()

    test_resume.job(run_dir, on_step=on_step, **options)

def start(run_dir, most=200):
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            life(run_dir, there, most)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    os.close(there)
    return pid, here

pid, pipe = start(folder / "whole")
os.read(pipe, 1)
began, steps = time.monotonic(), 1
while read := os.read(pipe, 100):
    steps += len(read)
assert os.waitpid(pid, 0)[1] == 0 and steps == 200
step_seconds = (time.monotonic() - began) / 199  # a machine may be ten times as fast as another
kills = half_written = 0
reached = []
while kills < 24:
    wait_for = draw.randrange(0, 7)
    # on whatever machine, 24 lives of at most 8 steps do not come to the end of 200
    pid, pipe = start(folder / "killed", most=wait_for + 1)
    for _ in range(wait_for):
        os.read(pipe, 1)
    time.sleep(draw.uniform(0, 2) * step_seconds)  # anywhere in a step, a checkpoint or the start
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(pipe)
    assert os.WIFSIGNALED(status), "the run ended before it could be killed"
    kills += 1
    half_written += len(list((folder / "killed").glob(".*.tmp")))
    reached.append(max(test_resume.checkpoints(folder / "killed"), default=0))
pid, pipe = start(folder / "killed")
while os.read(pipe, 100):
    pass
assert os.waitpid(pid, 0)[1] == 0
ends = [test_resume.load_state(folder / name / "step-000000200.safetensors")[0] for name in ("whole", "killed")]
print(json.dumps({
    "kills": kills,
    "reached": reached,
    "half_written": half_written,
    "step_milliseconds": 1e3 * step_seconds,
    "equal": all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0]),
    "logs": test_resume.log_of(folder / "whole") == test_resume.log_of(folder / "killed"),
    "left_over": len(list((folder / "killed").glob(".*.tmp"))),
}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kill_9_at_random_moments(tmp_path):
    words = [sys.executable, "-c", KILLS, str(tmp_path), str(Path(__file__).parent), "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(found)
    assert found["kills"] >= 20 and found["reached"][-1] > 10
    assert found["equal"] and found["logs"] and found["left_over"] == 0, found


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("where", ["half a file", "before the rename", "after the rename"])
def test_kill_9_inside_a_checkpoint(where, tmp_path, whole):
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            torch.set_num_threads(1)
            count = [0]

            def die_at_fourth(act):
                count[0] += 1
                if count[0] == 4:
                    act()
                    os.kill(os.getpid(), signal.SIGKILL)

            save_file, replace = module.save_file, os.replace
            if where == "half a file":

                def half(tensors, path, metadata):
                    save_file(tensors, path, metadata=metadata)
                    die_at_fourth(lambda: os.truncate(path, Path(path).stat().st_size // 2))

                module.save_file = half
            else:

                def rename(a, b):
                    if Path(b).suffix == ".safetensors":
                        die_at_fourth(lambda: replace(a, b) if where == "after the rename" else None)
                    replace(a, b)

                os.replace = rename
            job(tmp_path)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert checkpoints(tmp_path) == ([5, 10, 15] if where == "after the rename" else [5, 10])
    assert_same(job(tmp_path), tmp_path, whole)
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_go_on(signum, tmp_path, whole):
    def on_step(step, model):
        if step == 13:
            os.kill(os.getpid(), signum)

    with pytest.raises(TrainingInterrupted, match=rf"{signum.name}.*step 13 of 30.*same command") as stop:
        job(tmp_path, on_step=on_step)
    assert stop.value.signum == signum and isinstance(stop.value, KeyboardInterrupt)
    assert checkpoints(tmp_path) == [10, 13]
    assert_same(job(tmp_path), tmp_path, whole)


def test_a_second_signal_stops_at_once(tmp_path):
    def on_step(step, model):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    with pytest.raises(KeyboardInterrupt) as stop:
        job(tmp_path, on_step=on_step)
    assert not isinstance(stop.value, TrainingInterrupted)


@pytest.mark.parametrize("signum, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_line_stops_cleanly(signum, code, tmp_path):
    words = [sys.executable, "-m", "bitlib.pretrain", "--model", "R14x0.25", "--data", "S", "--image-size", "32"]
    words += [
        "--batch-size",
        "4",
        "--steps",
        "100000",
        "--val-images",
        "4",
        "--log-every",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # a shell's background jobs, and what starts in them, ignore SIGINT; Python sets its handler only otherwise
    process = subprocess.Popen(
        words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    for line in process.stderr:
        if line.startswith("step 3/"):
            break
    process.send_signal(signum)
    rest = process.stderr.read()
    assert process.wait() == code, rest
    assert f"stopped by {signum.name}, saved at step" in rest and "the same command goes on" in rest
    assert "Traceback" not in rest
    assert newest_state(tmp_path / "run") is not None


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "truncated":
        data = data[: len(data) // 2]
    elif how == "empty":
        data = bytearray()
    elif how == "one bit":
        data[-40] ^= 1
    else:
        data = bytearray(os.urandom(len(data)))
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["truncated", "empty", "one bit", "noise"])
def test_a_damaged_newest_checkpoint(how, tmp_path, whole, capsys):
    with pytest.raises(PowerCut):
        job(tmp_path, on_step=stop_at(13))
    damage(tmp_path / "step-000000010.safetensors", how)
    result = job(tmp_path)
    said = capsys.readouterr().err
    assert "step-000000010.safetensors" in said and "falling back" in said
    assert "going on from step 5 of 30" in said
    assert_same(result, tmp_path, whole)
    assert (tmp_path / "step-000000010.safetensors.damaged").exists()


def test_all_checkpoints_damaged_is_an_error_and_not_a_new_start(tmp_path):
    with pytest.raises(PowerCut):
        job(tmp_path, on_step=stop_at(13))
    for path in tmp_path.glob("step-*"):
        damage(path, "truncated")
    with pytest.raises(TrainingError, match="no checkpoint .* can be read .*empty the folder"):
        job(tmp_path)


def test_a_torn_log_line_is_cut_off(tmp_path, whole):
    with pytest.raises(PowerCut):
        job(tmp_path, on_step=stop_at(29))
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"step": 29, "lo')
    assert_same(job(tmp_path), tmp_path, whole)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(poison, tmp_path):
    def poisoned(step):
        x, y = batch_fn(step)
        return (x * poison if step == 17 else x), y

    model = model_of()
    lr = lambda step: 0.1  # noqa: E731
    with pytest.raises(TrainingError, match=r"step 18: the loss is nan.*last good checkpoint, of step 15"):
        train(model, poisoned, F.cross_entropy, lr, 30, run_dir=tmp_path, save_every=5, progress=False)
    assert checkpoints(tmp_path) == [10, 15]
    tensors, about = load_state(tmp_path / "step-000000015.safetensors")
    assert about["step"] == 15 and all(torch.isfinite(t).all() for t in tensors.values() if t.is_floating_point())


def test_a_gradient_that_is_not_finite_counts_too():
    model = nn.Linear(8, 4)
    loss_fn = lambda z, y: F.cross_entropy(z, y) + (z - z.detach()).abs().sqrt().sum()  # noqa: E731
    with pytest.raises(TrainingError, match="step 1: the loss is [0-9.]+, the gradient's norm (nan|inf)"):
        train(model, batch_fn, loss_fn, lambda step: 0.1, 5, progress=False)


@pytest.mark.parametrize(
    "changes, difference",
    [
        ({"weight_decay": 0.5}, "weight_decay: the checkpoint has 0.001, this run has 0.5"),
        ({"momentum": 0.8}, "momentum: the checkpoint has 0.9, this run has 0.8"),
        ({"steps": 40}, "steps: the checkpoint has 30, this run has 40"),
        ({"config": {"data": "M"}}, r"data: the checkpoint has \(not set\), this run has M"),
        ({"lr": lambda step: 0.3}, r"the rate at step 0: the checkpoint has 0\.02\d*, this run has 0.3"),
        ({"model": nn.Linear(8, 4)}, "does not fit this model"),
    ],
)
def test_another_configuration_is_refused(changes, difference, tmp_path, whole):
    with pytest.raises(PowerCut):
        job(tmp_path, on_step=stop_at(13))
    with pytest.raises(TrainingError, match=difference):
        job(tmp_path, **changes)
    assert_same(job(tmp_path), tmp_path, whole)  # and nothing was harmed


def test_other_threads_are_allowed_and_reported(tmp_path, capsys):
    with pytest.raises(PowerCut):
        job(tmp_path, on_step=stop_at(13))
    path = tmp_path / "step-000000010.safetensors"
    tensors, about = load_state(path)
    save_state(path, tensors, {**about, "place": {**about["place"], "threads": 77}})
    job(tmp_path)
    said = capsys.readouterr().err
    assert "to rounding" in said and f"threads: the checkpoint has 77, this run has {torch.get_num_threads()}" in said


def never(step):
    raise AssertionError("training began")


def test_a_folder_that_cannot_be_used_fails_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(TrainingError, match="cannot use .*file"):
            train(model_of(), never, F.cross_entropy, lambda step: 0.1, 5, run_dir=path, progress=False)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_fails_before_training(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(TrainingError, match="Permission denied"):
            train(model_of(), never, F.cross_entropy, lambda step: 0.1, 5, run_dir=tmp_path / "run", progress=False)
    finally:
        tmp_path.chmod(0o700)


def test_too_little_room_fails_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5_000, 5_000))
    with pytest.raises(TrainingError, match="MB are free, 3 checkpoints take .* nothing was trained"):
        train(model_of(), never, F.cross_entropy, lambda step: 0.1, 5, run_dir=tmp_path, progress=False)


@contextlib.contextmanager
def largest_file(size):
    """Let the system refuse to write files beyond a size, as it does when a disk or a quota is full."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_disk_that_is_full_at_the_start(tmp_path):
    with largest_file(2_000) as limit:
        limit()
        with pytest.raises(TrainingError, match="cannot write step-000000000.* nothing was trained"):
            train(model_of(), never, F.cross_entropy, lambda step: 0.1, 5, run_dir=tmp_path, progress=False)
    assert not list(tmp_path.glob(".*.tmp")), "the half-written file is removed"


def test_a_disk_that_fills_up_on_the_way(tmp_path, whole):
    with largest_file(6_000) as limit:

        def on_step(step, model):
            if step == 12:
                limit()

        with pytest.raises(TrainingError, match="cannot write .*the checkpoint of step 10 is kept.*Make room"):
            job(tmp_path, on_step=on_step)
    assert checkpoints(tmp_path) == [5, 10] and not list(tmp_path.glob(".*.tmp"))
    assert_same(job(tmp_path), tmp_path, whole)


def test_saved_states_come_back_whole(tmp_path):
    tensors = {
        "a": torch.randn(3, 4, 2, 2).contiguous(memory_format=torch.channels_last),
        "empty": torch.zeros(0),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "view": torch.randn(4, 4).T,
    }
    save_state(tmp_path / "x.safetensors", tensors, {"step": 3, "text": "ü"})
    loaded, about = load_state(tmp_path / "x.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert about["step"] == 3 and about["text"] == "ü"
    with pytest.raises(ValueError, match="cannot be read"):
        load_state(tmp_path / "nothing.safetensors")
