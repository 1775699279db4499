"""Upstream pre-training: SGD with momentum, schedules, losses, and a training loop that survives.

Exported from chapters/06_pretraining.py by tools/export.py: edit the chapter, not this file.
"""

__all__ = [
    "SGD",
    "warmup",
    "warmup_step_lr",
    "warmup_cosine_lr",
    "warmup_polynomial_lr",
    "linear_scaling",
    "cross_entropy",
    "sigmoid_cross_entropy",
    "upstream_loss",
    "accumulate",
    "clip_gradients",
    "TrainingError",
    "TrainingInterrupted",
    "History",
    "write_atomically",
    "save_state",
    "load_state",
    "newest_state",
    "train",
    "PretrainConfig",
    "shard_indices",
    "step_windows",
    "enlarge",
    "upstream_batches",
    "group_accuracy",
    "Pretrained",
    "pretrain",
    "write_model",
    "main",
]

import argparse
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from bitlib.checkpoints import load_pretrained, save_checkpoint
from bitlib.data import GlyphNet, cut_and_resize, normalize, resized_crop_boxes
from bitlib.resnet import ResNetV2, create_model


class SGD:
    """Stochastic gradient descent with momentum: equal to torch.optim.SGD, step by step.

    Weight decay is L2: lambda * theta joins the gradient before the momentum does. A parameter whose gradient is
    None is left alone. The rate is read at each step from the attribute `lr`, which a schedule sets.
    """

    def __init__(self, parameters: Iterable[Tensor], lr: float = 0.0, momentum: float = 0.9, weight_decay: float = 0.0):
        self.parameters = list(parameters)
        self.lr, self.momentum, self.weight_decay = lr, momentum, weight_decay
        self.velocity = [torch.zeros_like(p) for p in self.parameters]

    @torch.no_grad()
    def step(self) -> None:
        for theta, v in zip(self.parameters, self.velocity, strict=True):
            if theta.grad is None:
                continue
            g = theta.grad.add(theta, alpha=self.weight_decay) if self.weight_decay else theta.grad
            v.mul_(self.momentum).add_(g)  # v <- mu v + g
            theta.add_(v, alpha=-self.lr)  # theta <- theta - eta v

    def zero_grad(self) -> None:
        for theta in self.parameters:
            theta.grad = None


def warmup(step: int, warmup_steps: int) -> float:
    """The factor of a linear warm-up: 1/w, 2/w, ... in the first w steps, then 1."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def warmup_step_lr(
    step: int, base_lr: float, warmup_steps: int, decay_steps: Sequence[int], factor: float = 0.1
) -> float:
    """Warm-up, then the rate times `factor` at each of `decay_steps`: the schedule of the paper."""
    return base_lr * warmup(step, warmup_steps) * factor ** sum(step >= s for s in decay_steps)


def warmup_cosine_lr(step: int, base_lr: float, warmup_steps: int, total_steps: int) -> float:
    """Warm-up, then half a period of a cosine from `base_lr` down to 0 at `total_steps`."""
    t = max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base_lr * warmup(step, warmup_steps) * 0.5 * (1 + math.cos(math.pi * min(1.0, t)))


def warmup_polynomial_lr(step: int, base_lr: float, warmup_steps: int, total_steps: int, power: float = 1.0) -> float:
    """Warm-up, then base_lr * (1 - t)^power, where t goes from 0 to 1 at `total_steps`; power 1 is a line."""
    t = max(0, step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base_lr * warmup(step, warmup_steps) * (1 - min(1.0, t)) ** power


def linear_scaling(batch_size: int, base_lr: float = 0.03, base_batch: int = 256) -> float:
    """The learning rate for a batch size, in proportion. The defaults are the paper's: 0.48 at batch 4,096."""
    return base_lr * batch_size / base_batch


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """Cross-entropy of softmax(logits) against classes smoothed towards uniform, as F.cross_entropy computes it.

    logits: (N, K). target: (N,) class indices. The smoothed target of class k is (1 - a) [k = target] + a / K.
    Returns the mean, or with reduction="none" the loss of each example, (N,).
    """
    log_p = _at_least_float32(logits).log_softmax(dim=1)
    loss = -log_p.gather(1, target[:, None])[:, 0]
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * log_p.mean(dim=1)
    return loss.mean() if reduction == "mean" else loss


def sigmoid_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy summed over the classes, mean over the images. Both arguments (N, K); target in [0, 1]."""
    z = _at_least_float32(logits)
    loss = z.clamp(min=0) - z * target + torch.log1p(torch.exp(-z.abs()))  # never exp of a large number
    return loss.sum(dim=1).mean()


def upstream_loss(
    logits: Tensor, targets: Tensor, groups: Sequence, kind: str = "softmax", label_smoothing: float = 0.0
) -> Tensor:
    """The loss over several groups of labels, weighted, averaged over the images.

    logits: (N, sum of the groups' n_classes), one block of columns a group. targets: (N, number of groups); -1 says
    that the image has no label in the group. groups: objects with n_classes and weight, such as GlyphNet's.

    kind "softmax": one cross-entropy a group; an image without a label adds 0 to it. kind "sigmoid": one yes-or-no
    question a class; an image without a label answers "no" to all. Either way the sum is divided by N and never by
    the number of labels, so that the losses of parts of a batch, weighted by size, add up to that of the whole.
    """
    total = logits.new_zeros(())
    blocks = logits.split([group.n_classes for group in groups], dim=1)
    for block, target, group in zip(blocks, targets.T, groups, strict=True):
        known = target >= 0
        if kind == "softmax":
            loss = cross_entropy(block, target.clamp(min=0), label_smoothing, reduction="none")
            total = total + group.weight * (loss * known).mean()
        elif kind == "sigmoid":
            one_hot = F.one_hot(target.clamp(min=0), group.n_classes) * known[:, None]
            total = total + group.weight * sigmoid_cross_entropy(block, one_hot)
        else:
            raise ValueError(f'unknown loss {kind!r}; use "softmax" or "sigmoid"')
    return total


def accumulate(
    net: nn.Module, x: Tensor, target, loss_fn: Callable, total: int, micro_batch: int | None = None, amp: bool = False
) -> Tensor:
    """Add to the gradients those of a batch's mean loss, in parts of at most micro_batch images; returns the loss.

    total: the images in the batch of all processes together. Each part's mean counts by its share of them, so a
    smaller last part counts less. DistributedDataParallel averages over the processes, where a sum is wanted: its
    loss is multiplied by their number. They exchange gradients once, after the last part.
    """
    device = next(net.parameters()).device
    parallel = isinstance(net, DistributedDataParallel)
    size = micro_batch or len(x)
    loss = 0.0
    for start in range(0, len(x), size):
        end = min(start + size, len(x))
        with net.no_sync() if parallel and end < len(x) else nullcontext():
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = net(_rows(x, start, end, device))
                part = loss_fn(logits, _rows(target, start, end, device)) * ((end - start) / total)
            (part * dist.get_world_size() if parallel else part).backward()
        loss = loss + part.detach()
    return loss


def _rows(value, start: int, end: int, device: torch.device):
    """Rows start:end of a tensor, or of each in a tuple of tensors, on the device."""
    if isinstance(value, tuple | list):
        return tuple(_rows(v, start, end, device) for v in value)
    return value[start:end].to(device, non_blocking=True)


def clip_gradients(gradients: Sequence[Tensor], max_norm: float | None) -> Tensor:
    """The norm of all the gradients together; where it is above max_norm, they are scaled down to that."""
    norm = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm()
    if max_norm is not None:
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale)
    return norm


class TrainingError(RuntimeError):
    """Training cannot go on. The message says why, at which step, and what is kept."""


class TrainingInterrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came; the state was saved. `signum` is the signal's number."""

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


@dataclass
class History:
    """What happened at each step (the loss, the gradient's norm before clipping, the rate) and at each evaluation."""

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    evals: list[dict] = field(default_factory=list)  # {"step": 500, and what eval_fn returned}
    best: dict | None = None  # {"step", "value"} of the evaluation that `keep_best` keeps

    def recent(self, n: int) -> dict[str, float]:
        """The mean loss and gradient norm of the last n steps, and the last rate."""
        return {"loss": sum(self.loss[-n:]) / n, "grad_norm": sum(self.grad_norm[-n:]) / n, "lr": self.lr[-1]}


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file, push it to the disk, then give it its name: whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes files that only their owner may read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # the new name is on the disk only once its folder is
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _checksum(tensors: dict[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    return crc


def save_state(path: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Write tensors and a JSON-able dict to one safetensors file, atomically, with a checksum."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    about = json.dumps({**about, "crc32": _checksum(tensors)})
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata={"about": about}))


def load_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """Read what `save_state` wrote. Raises ValueError where the file is truncated or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    if about.get("crc32") != _checksum(tensors):
        raise ValueError(f"{path.name} is damaged: its checksum is wrong")
    return tensors, about


def newest_state(run_dir: Path) -> Path | None:
    """The newest checkpoint in a run folder that can be read, or None where there is none at all.

    A damaged one is reported, set aside under the name `*.damaged`, and the one before it taken. Where every one
    is damaged, TrainingError is raised: starting again silently would throw away a run.
    """
    damaged = []
    for path in sorted(run_dir.glob("step-*.safetensors"), reverse=True):
        try:
            load_state(path)
        except ValueError as error:
            damaged.append(path.name)
            path.rename(path.with_name(path.name + ".damaged"))
            print(f"{error}; falling back to the checkpoint before it", file=sys.stderr)
        else:
            return path
    if damaged:
        raise TrainingError(
            f"no checkpoint in {run_dir} can be read ({', '.join(damaged)}); empty the folder to start again"
        )
    return None


class _Run:
    """A run folder: its checkpoints, log.jsonl, and the reports on the terminal. Without a folder, only the reports.

    Only the first process of a group writes; all of them read the same checkpoint.
    """

    def __init__(self, run_dir, steps: int, keep: int, progress: bool | None, tensorboard: bool):
        if keep < 1:
            raise ValueError(f"keep is {keep}; at least the last checkpoint must be kept")
        self.dir = Path(run_dir) if run_dir is not None else None
        self.steps, self.keep, self.writes = steps, keep, _rank_and_world()[0] == 0
        terminal = sys.stderr.isatty()
        self.show_bar = self.writes and (terminal if progress is None else progress)
        self.show_lines = self.writes and progress is None and not terminal and self.dir is not None
        self.wants_board = tensorboard
        self.bar = self.log = self.board = self.last_saved = None
        self.seconds, self.since = 0.0, time.monotonic()  # of training in all sittings; the clock's last reading

    def find(self) -> Path | None:
        """Make the folder ready to write to; the checkpoint to go on from, if there is one."""
        newest = None
        if self.dir is not None and self.writes:
            try:
                self.dir.mkdir(parents=True, exist_ok=True)
                for left_over in self.dir.glob(".*.tmp"):
                    left_over.unlink()
            except OSError as error:
                raise TrainingError(f"cannot use {self.dir} as a run folder: {error.strerror}") from error
            newest = newest_state(self.dir)
        return _from_first(newest)

    def open(self, step: int) -> None:
        """Start the reports at `step`. What the log says of later steps, from a run that was killed, is cut off."""
        if self.show_bar:
            self.bar = tqdm(total=self.steps, initial=step, unit="step", dynamic_ncols=True)
        if self.dir is not None and self.writes:
            path = self.dir / "log.jsonl"
            with self.writing(path.name):
                lines = path.read_text().splitlines() if path.exists() else []
                kept = "".join(line + "\n" for line in lines if 0 <= _step_of(line) <= step)
                write_atomically(path, lambda temporary: temporary.write_text(kept))
                self.log = open(path, "a", buffering=1)
            if self.wants_board:
                try:
                    from torch.utils.tensorboard import SummaryWriter
                except ImportError as error:
                    raise ImportError("tensorboard=True needs TensorBoard: pip install tensorboard") from error
                self.board = SummaryWriter(str(self.dir / "tensorboard"), purge_step=step + 1)
        self.since = time.monotonic()

    def lap(self) -> float:
        """The seconds since the last call."""
        before, self.since = self.since, time.monotonic()
        self.seconds += self.since - before
        return self.since - before

    def report(self, step: int, row: dict) -> None:
        """One row of numbers: to the log, and to the terminal."""
        if self.log is not None:
            with self.writing("log.jsonl"):
                self.log.write(json.dumps({"step": step, **row, "seconds": round(self.seconds, 1)}) + "\n")
        text = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        if self.show_lines:
            print(f"step {step}/{self.steps}  {text}", file=sys.stderr, flush=True)
        if self.board is not None:
            for name, value in row.items():
                self.board.add_scalar(name, value, step)

    def save(self, state: "_State") -> None:
        """Write the checkpoint of a step, then delete all but the last `keep`."""
        if self.dir is None or not self.writes or self.last_saved == state.step:
            return
        tensors, about = state.pack()
        path = self.dir / f"step-{state.step:09d}.safetensors"
        with self.writing(path.name):
            if self.last_saved is None:
                need = (self.keep + 1) * sum(t.numel() * t.element_size() for t in tensors.values())
                free = shutil.disk_usage(self.dir).free
                if free < need:
                    raise OSError(
                        0, f"{free / 1e6:.0f} MB are free, {self.keep + 1} checkpoints take {need / 1e6:.0f} MB"
                    )
            save_state(path, tensors, {**about, "seconds": self.seconds})
            self.last_saved = state.step
            for old in sorted(self.dir.glob("step-*.safetensors"))[: -self.keep]:
                old.unlink()

    @contextmanager
    def writing(self, what: str):
        """Turn a failure to write into a TrainingError that says what is kept."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            kept = (
                "nothing was trained"
                if self.last_saved is None
                else f"the checkpoint of step {self.last_saved} is kept"
            )
            reason = getattr(error, "strerror", None) or str(error)
            raise TrainingError(
                f"cannot write {what} in {self.dir}: {reason}; {kept}. Make room there and run the same command again"
            ) from error

    def kept(self) -> str:
        """What there is to go on from."""
        if self.dir is None:
            return "no run_dir, so nothing is kept"
        return f"{self.dir} has the last good checkpoint, of step {self.last_saved}"

    def close(self) -> None:
        for thing in (self.bar, self.log, self.board):
            if thing is not None:
                thing.close()


def _step_of(line: str) -> int:
    """The step of a line of log.jsonl; -1 for a line that was cut off."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


class _State:
    """Everything that a checkpoint holds, and how it goes into tensors and back."""

    def __init__(self, model: nn.Module, optimizer: SGD, settings: dict, place: dict):
        self.model, self.optimizer = model, optimizer
        self.settings, self.place = json.loads(json.dumps(settings)), place
        self.step = self.images = 0
        self.history = History()
        name_of = {id(p): name for name, p in model.named_parameters()}
        self.velocity = {name_of[id(p)]: v for p, v in zip(optimizer.parameters, optimizer.velocity, strict=True)}
        self.device = next(model.parameters()).device

    def pack(self) -> tuple[dict[str, Tensor], dict]:
        """The tensors, and the rest as a dict for JSON."""
        history = dataclasses.asdict(self.history)
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"velocity.{name}": tensor for name, tensor in self.velocity.items()}
        for name in ("loss", "grad_norm", "lr"):
            tensors[f"history.{name}"] = torch.tensor(history.pop(name), dtype=torch.float64)
        tensors["random.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        return tensors, {
            "step": self.step,
            "images": self.images,
            "settings": self.settings,
            "place": self.place,
            **history,
        }

    def unpack(self, path: Path, lr: Callable[[int], float]) -> dict:
        """Take over a checkpoint; returns its dict. TrainingError where it is of another run or another model."""
        tensors, about = load_state(path)
        parts: dict[str, dict] = {"model": {}, "velocity": {}, "history": {}, "random": {}}
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            parts[kind][rest] = tensor
        rates = {name: values.tolist() for name, values in parts["history"].items()}
        differ = _differences(about["settings"], self.settings)
        for step, old in enumerate(rates["lr"]):
            if not differ and lr(step) != old:
                differ = f"\n  the rate at step {step}: the checkpoint has {old}, this run has {lr(step)}"
        if differ:
            raise TrainingError(
                f"{path} is from a run with another configuration:{differ}\n"
                "Use another run folder, or the same configuration"
            )
        try:
            self.model.load_state_dict(parts["model"])
            for name, velocity in self.velocity.items():
                velocity.copy_(parts["velocity"][name])
        except (RuntimeError, KeyError) as error:
            raise TrainingError(f"{path} does not fit this model: {error}") from error
        torch.set_rng_state(parts["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in parts["random"]:
            torch.cuda.set_rng_state(parts["random"]["cuda"], self.device)
        self.step, self.images = about["step"], about["images"]
        self.history = History(**rates, evals=about["evals"], best=about["best"])
        return about

    def record(self, rows: list[tuple[float, Tensor]], kept: str) -> None:
        """Add (rate, [loss, gradient norm]) of the last steps to the history; stop at the first that is not finite."""
        if not rows:
            return
        values = torch.stack([row for _, row in rows])
        if _rank_and_world()[1] > 1:
            dist.all_reduce(losses := values[:, 0].contiguous())
            values[:, 0] = losses
        for (rate, _), (loss, norm) in zip(rows, values.tolist(), strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise TrainingError(
                    f"step {len(self.history.loss) + 1}: the loss is {loss}, the gradient's norm {norm}; {kept}. "
                    "A lower learning rate, a longer warm-up or clip_norm may help"
                )
            self.history.loss.append(loss)
            self.history.grad_norm.append(norm)
            self.history.lr.append(rate)
        rows.clear()


def _differences(old: dict, new: dict) -> str:
    missing = "(not set)"
    return "".join(
        f"\n  {name}: the checkpoint has {old.get(name, missing)}, this run has {new.get(name, missing)}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, missing) != new.get(name, missing)
    )


def _rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are: (0, 1) unless torch.distributed runs."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _from_first(value):
    """The value that the first process of the group has."""
    if _rank_and_world()[1] == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _agree(stop: int, size: int, device: torch.device) -> tuple[int, int]:
    """A signal that any process received (0: none), and the number of images in all their batches together."""
    rank, world = _rank_and_world()
    if world == 1:
        return stop, size
    table = torch.zeros(world, 2, dtype=torch.int64)
    table[rank] = torch.tensor([stop, size])
    dist.all_reduce(table := table.to(device))
    return int(table[:, 0].max()), int(table[:, 1].sum())


@contextmanager
def _signals(enabled: bool):
    """Yields a list that receives SIGINT or SIGTERM; the old handlers come back at the end.

    The same signal again stops at once. Not so in a process group, where torchrun may pass on what the terminal sent.
    """
    received: list[int] = []

    def handle(signum, frame):
        if signum in received and _rank_and_world()[1] == 1:
            raise KeyboardInterrupt
        received.append(signum)

    if not enabled or threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {signum: signal.signal(signum, handle) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _deterministic(device: torch.device):
    """On a GPU, choose kernels that give the same bits every time, where there are any. A CPU's do already."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def _channels_last(model: nn.Module) -> None:
    """Lay the convolutions' filters out as (out, height, width, in): equal to rounding, and faster.

    A 1x1 filter is the same either way, and DistributedDataParallel warns of its strides if it is touched.
    """
    for p in model.parameters():
        if p.ndim == 4 and p.shape[2:] != (1, 1):
            p.data = p.data.contiguous(memory_format=torch.channels_last)


@contextmanager
def _ahead(load: Callable[[int], tuple], steps: int, device: torch.device):
    """Yields a function that gives the batch of a step, and has the next one made meanwhile where a core is free.

    Where the computation has a thread on every core, one more would hold it up: at the end of every operation all
    threads wait for the one whose core was taken away.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cpu" and torch.get_num_threads() >= cores:
        yield load
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        made = {}

        def batch(step: int) -> tuple:
            ready = (made.pop(step, None) or pool.submit(load, step)).result()
            if step + 1 < steps:
                made[step + 1] = pool.submit(load, step + 1)
            return ready

        yield batch


@functools.cache
def _keep_freed_memory() -> None:
    """Have the C library keep the memory that a step frees for the next step.

    glibc gives large blocks back to the kernel, which then fills every page with zeros before a step gets it anew:
    thousands of page faults a step. Blocks over 32 MiB still go back at once. Elsewhere this does nothing.
    """
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # not glibc
        return
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 32 * 2**20)


@contextmanager
def _only(model: nn.Module, trained: Sequence[Tensor]):
    """Let only `trained` have gradients for a while."""
    chosen = {id(p) for p in trained}
    before = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in before:
        p.requires_grad_(id(p) in chosen)
    try:
        yield
    finally:
        for p, required in before:
            p.requires_grad_(required)


def train(
    model: nn.Module,
    batch_fn: Callable[[int], tuple],
    loss_fn: Callable[..., Tensor],
    lr: Callable[[int], float],
    steps: int,
    *,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    micro_batch: int | None = None,
    parameters: Iterable[Tensor] | None = None,
    amp: bool | None = None,
    run_dir: str | os.PathLike | None = None,
    config: dict | None = None,
    save_every: int = 500,
    keep: int = 2,
    log_every: int = 50,
    eval_fn: Callable[[nn.Module], dict] | None = None,
    eval_every: int | None = None,
    keep_best: str | None = None,
    on_step: Callable[[int, nn.Module], None] | None = None,
    progress: bool | None = None,
    tensorboard: bool = False,
) -> History:
    """Train a model in place by SGD with momentum; the one loop of the book, upstream and downstream.

    batch_fn(step) -> (x, target): the batch of a step, a pure function of the step (it may run ahead in a thread of its
        own, and must draw nothing from the global generator). target: a tensor or a tuple of tensors, N rows each.
    loss_fn(logits, target) -> the mean over the images. lr(step) -> the rate. Steps count from 0.
    micro_batch: work through the batch in parts of at most this many images, and add up their gradients.
    parameters: which of the model's to train; all that require a gradient by default.
    amp: bfloat16 autocast; by default on a GPU that has it.

    run_dir: a folder for checkpoints (every `save_every` steps, the last `keep`) and log.jsonl. Where it holds a
        checkpoint of the same configuration, training goes on from it and ends with the same bits as a run that was
        never stopped. config: JSON-able facts that must be the same then; a difference raises TrainingError.
    eval_fn(model) -> a dict of numbers, every `eval_every` steps and at the end. keep_best names one of them: the
        model ends with the weights that had it highest.
    on_step(step, model): called after each update; step is the number of updates done.
    progress: a bar on the terminal; by default where stderr is one (else lines, if there is a run_dir). False: none.

    In a process group (torchrun), batch_fn gives this process's share of the batch and gradients are averaged by
    DistributedDataParallel. Raises TrainingError (a loss that is not finite, a disk that is full, a configuration
    that differs) and, after SIGINT or SIGTERM with a run_dir, TrainingInterrupted.
    """
    rank, world = _rank_and_world()
    device = next(model.parameters()).device
    if amp is None:
        amp = device.type == "cuda" and torch.cuda.is_bf16_supported()
    own = {id(p) for p in model.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad] if parameters is None else list(parameters)
    if not trained or any(id(p) not in own for p in trained):
        raise ValueError("nothing to train: `parameters` must be parameters of the model, at least one")
    if device.type == "cpu":
        _keep_freed_memory()
    if device.type == "cpu" and isinstance(model, ResNetV2):
        model.lay_out_filters()
    else:
        _channels_last(model)
    optimizer = SGD(trained, momentum=momentum, weight_decay=weight_decay)
    settings = {"steps": steps, "momentum": momentum, "weight_decay": weight_decay, "clip_norm": clip_norm}
    place = {"torch": torch.__version__, "device": device.type, "amp": amp, "threads": torch.get_num_threads()}
    place |= {"processes": world, "micro_batch": micro_batch}
    state = _State(model, optimizer, settings | (config or {}), place)
    run = _Run(run_dir, steps, keep, progress, tensorboard)
    best = None

    def load(step: int):
        x, target = batch_fn(step)
        x = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        return (x.pin_memory() if device.type == "cuda" else x), target

    try:
        with _only(model, trained), _signals(run.dir is not None) as received, _deterministic(device):
            if (checkpoint := run.find()) is None:
                run.save(state)  # step 0: shows that the folder can be written to before an hour is spent
            else:
                about = state.unpack(checkpoint, lr)
                run.seconds, run.last_saved = about["seconds"], about["step"]
                if keep_best and state.history.best:
                    best = load_state(run.dir / "best.safetensors")[0]
                if rank == 0:
                    note = _differences(about["place"], place)
                    note = f". Equal to a run without the stop to rounding only, for:{note}" if note else ""
                    print(f"going on from step {state.step} of {steps} in {run.dir}{note}", file=sys.stderr)
            run.open(state.step)
            net = DistributedDataParallel(model) if world > 1 else model
            model.train()
            optimizer.zero_grad()  # of gradients that the caller may have left
            rows: list[tuple[float, Tensor]] = []
            lap_images, lap_seconds = 0, 0.0
            with _ahead(load, steps, device) as batch:
                while state.step < steps:
                    x, target = batch(state.step)
                    stop, total = _agree(received[0] if received else 0, len(x), device)
                    if stop:
                        state.record(rows, run.kept())
                        run.lap()
                        run.save(state)
                        raise TrainingInterrupted(
                            f"stopped by {signal.Signals(stop).name}, saved at step {state.step} of {steps} "
                            f"in {run.dir}; the same command goes on from there",
                            stop,
                        )

                    optimizer.lr = lr(state.step)
                    loss = accumulate(net, x, target, loss_fn, total, micro_batch, amp)
                    norm = clip_gradients([p.grad for p in trained if p.grad is not None], clip_norm)
                    optimizer.step()
                    optimizer.zero_grad()

                    state.step += 1
                    state.images += total
                    lap_images += total
                    rows.append((optimizer.lr, torch.stack([loss, norm])))
                    if on_step is not None:
                        on_step(state.step, model)
                    if run.bar is not None:
                        run.bar.update()
                    end = state.step == steps
                    log_now = end or state.step % log_every == 0
                    eval_now = eval_fn is not None and (end or bool(eval_every) and state.step % eval_every == 0)
                    save_now = end or state.step % save_every == 0
                    if device.type == "cpu" or log_now or eval_now or save_now:  # a GPU need not wait at every step
                        state.record(rows, run.kept())
                    lap_seconds += run.lap()
                    if log_now:
                        row = state.history.recent((state.step - 1) % log_every + 1)
                        run.report(
                            state.step, row | {"images_per_second": round(lap_images / max(lap_seconds, 1e-9), 1)}
                        )
                        lap_images, lap_seconds = 0, 0.0
                    if eval_now:
                        model.eval()
                        metrics = _from_first(eval_fn(model) if rank == 0 else None)
                        model.train()
                        run.lap()
                        state.history.evals.append({"step": state.step, **metrics})
                        run.report(state.step, {f"eval/{name}": value for name, value in metrics.items()})
                        if keep_best and (
                            state.history.best is None or metrics[keep_best] > state.history.best["value"]
                        ):
                            state.history.best = {"step": state.step, "value": metrics[keep_best]}
                            best = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
                            if run.dir is not None and rank == 0:
                                with run.writing("best.safetensors"):
                                    save_state(run.dir / "best.safetensors", best, state.history.best)
                    if save_now:
                        run.save(state)
            if best is not None:
                model.load_state_dict(best)
    finally:
        run.close()
    return state.history


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that the result of a pre-training run follows from."""

    model: str = "R26x0.25"
    data: str = "M"  # the size of GlyphNet, S, M or L; or a name for data of your own
    steps: int = 5_500
    batch_size: int = 128
    lr: float | None = None  # None: in proportion to the batch, from 0.1 at 128 (minis) or the paper's 0.03 at 256
    warmup_steps: int = 100
    decay: str = "step"  # step, cosine or polynomial (a line)
    decay_at: tuple[float, ...] = (30 / 90, 60 / 90, 80 / 90)  # where "step" divides the rate by 10: the paper's
    weight_decay: float = 1e-4
    momentum: float = 0.9
    label_smoothing: float = 0.0
    loss: str = "softmax"
    group_weights: tuple[float, ...] | None = None  # instead of the weights that the data set gives its groups
    clip_norm: float | None = None
    image_size: int = 64
    seed: int = 0
    init: str | None = None  # a checkpoint to start from: a path or a name; its head is kept where it fits
    crop: float = 1.0  # of each image a random window, at least this share of its area; 1: the whole image
    val_images: int = 2_000

    def __post_init__(self):
        for name in ("steps", "batch_size", "image_size", "val_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop is {self.crop}; it is the least share of an image that a window keeps, up to 1")
        if self.decay not in ("step", "cosine", "polynomial"):
            raise ValueError(f"no schedule {self.decay!r}; use step, cosine or polynomial")
        if self.loss not in ("softmax", "sigmoid"):
            raise ValueError(f"no loss {self.loss!r}; use softmax or sigmoid")
        if self.loss == "sigmoid" and self.label_smoothing:
            raise ValueError("label smoothing is for the softmax loss; use loss='softmax' or label_smoothing=0")

    @property
    def base_lr(self) -> float:
        if self.lr is not None:
            return self.lr
        mini = float(self.model.partition("x")[2]) < 1
        return linear_scaling(self.batch_size, 0.1, 128) if mini else linear_scaling(self.batch_size)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if self.decay == "cosine":
            return warmup_cosine_lr(step, self.base_lr, self.warmup_steps, self.steps)
        if self.decay == "polynomial":
            return warmup_polynomial_lr(step, self.base_lr, self.warmup_steps, self.steps)
        decay_steps = [round(fraction * self.steps) for fraction in self.decay_at]
        return warmup_step_lr(step, self.base_lr, self.warmup_steps, decay_steps)

    def command(self) -> str:
        """The command line that trains this model."""
        words = [f"--model {self.model} --data {self.data} --steps {self.steps}"]
        for item in dataclasses.fields(self)[3:]:
            value = getattr(self, item.name)
            if value != item.default:
                text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
                words.append(f"--{item.name.replace('_', '-')} {text}")
        return "python -m bitlib.pretrain " + " ".join(words)


@functools.lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))


def _share(batch_size: int, rank: int, world: int) -> slice:
    """The part of a batch that one of `world` processes works on."""
    return slice(rank * batch_size // world, (rank + 1) * batch_size // world)


def shard_indices(step: int, batch_size: int, n: int, seed: int = 0, rank: int = 0, world: int = 1) -> Tensor:
    """Which examples of n a process sees at a step: its share of the batch, by arithmetic alone.

    The shares of all the processes, one after the other, are the batch of a single process, so the number of
    processes may change between two steps. Every epoch is a new permutation; more than 2^24 examples are taken
    in order, which for an endless stream of independent samples is as good.
    """
    position = step * batch_size + torch.arange(batch_size)[_share(batch_size, rank, world)]
    if n > 2**24:
        return position % n
    epoch, offset = position // n, position % n
    index = torch.empty_like(position)
    for e in epoch.unique().tolist():
        index[epoch == e] = _epoch_order(n, seed, e)[offset[epoch == e]]
    return index


def step_windows(
    step: int, batch_size: int, image: tuple[int, int], smallest: float, seed: int = 0, rank: int = 0, world: int = 1
) -> Tensor:
    """The random window of each of this process's images (height, width) in a step: long (n, 4), as in Inception crop.

    smallest: the least share of the area. A function of (seed, step) and of the image's place in the whole batch, so
    that neither a stop nor another number of processes changes a window.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    boxes = resized_crop_boxes(batch_size, *image, scale=(smallest, 1.0), generator=generator)
    return boxes[_share(batch_size, rank, world)]


def enlarge(images: Tensor, size: int) -> Tensor:
    """uint8 (N, 3, H, W) -> float32 in [-1, 1], (N, 3, size, size), bilinear; channels innermost in memory."""
    x = normalize(images.contiguous(memory_format=torch.channels_last))
    return x if x.shape[-1] == size else F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)


def upstream_batches(
    upstream, config: PretrainConfig, rank: int = 0, world: int = 1
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A function of the step: this process's share of the batch, float (n, 3, size, size), and its labels (n, groups).

    upstream.together: up to how many images are made in one call of `upstream.batch`; without it, a share at a time.
    Where shares are smaller, those of the next steps are made too. Steps may be asked for in any order, by one thread
    at a time.
    """
    shape = (config.batch_size, len(upstream), config.seed, rank, world)
    share = len(range(config.batch_size)[_share(config.batch_size, rank, world)])
    at_once = max(1, getattr(upstream, "together", 0) // share)
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def batch_fn(step: int) -> tuple[Tensor, Tensor]:
        if step not in made:
            made.clear()
            steps = range(step, max(step + 1, min(step + at_once, config.steps)))
            images, targets = upstream.batch(torch.cat([shard_indices(s, *shape) for s in steps]))
            made.update(zip(steps, zip(images.split(share), targets.split(share), strict=True), strict=True))
        images, targets = made.pop(step)
        if config.crop < 1:
            frame = tuple(images.shape[-2:])
            boxes = step_windows(step, config.batch_size, frame, config.crop, config.seed, rank, world)
            images = cut_and_resize(images, boxes, config.image_size)
        return enlarge(images, config.image_size), targets

    return batch_fn


@torch.no_grad()
def group_accuracy(
    model: nn.Module, images: Tensor, targets: Tensor, groups: Sequence, image_size: int, batch_size: int = 250
) -> dict[str, float]:
    """Top-1 accuracy within each group of labels, over the images that have one: {"character": 0.81, ...}."""
    device = next(model.parameters()).device
    right = torch.zeros(len(groups))
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        blocks = model(enlarge(images[part], image_size).to(device)).split([g.n_classes for g in groups], dim=1)
        for i, block in enumerate(blocks):
            right[i] += (block.argmax(dim=1).cpu() == targets[part, i]).sum()  # an absent label, -1, never matches
    known = (targets >= 0).sum(dim=0).clamp(min=1)
    return {group.name: round(value, 4) for group, value in zip(groups, (right / known).tolist(), strict=True)}


@dataclass
class Pretrained:
    """What `pretrain` gives back."""

    model: nn.Module
    history: History
    val: dict[str, float]


def pretrain(
    config: PretrainConfig,
    run_dir: str | os.PathLike | None = None,
    *,
    upstream=None,
    held_out=None,
    device: str | torch.device | None = None,
    micro_batch: int | None = None,
    save_every: int = 500,
    eval_every: int | None = 500,
    log_every: int = 50,
    keep: int = 2,
    progress: bool | None = None,
    tensorboard: bool = False,
) -> Pretrained:
    """Pre-train a model on GlyphNet. With a run folder it can be stopped at any moment and called again.

    The folder receives checkpoints, log.jsonl and, at the end, model.safetensors and card.json. Under torchrun
    every process calls this, each works on its share of every batch, and the first one writes.
    upstream, held_out: your own data instead of GlyphNet's two splits. Like those they need a length, `groups`
    and `batch(indices) -> (uint8 images (N, 3, H, W), long labels (N, groups))`, a pure function of the indices.
    """
    rank, world, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if device is None:
        device = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"no device {device!r}; use cpu, cuda or cuda:1, for example") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{device} is asked for, but PyTorch sees no GPU here")
    if config.batch_size < world:
        raise ValueError(f"a batch of {config.batch_size} cannot be shared by {world} processes")
    joined = world > 1 and not dist.is_initialized()
    if joined:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        if upstream is None:
            upstream = GlyphNet(config.data, split="train", seed=config.seed)
        if held_out is None:
            held_out = GlyphNet(config.data, split="val", seed=config.seed)
        groups = list(upstream.groups)
        if config.group_weights is not None:
            if len(config.group_weights) != len(groups):
                raise ValueError(
                    f"{len(config.group_weights)} group weights for {len(groups)} groups: "
                    + ", ".join(g.name for g in groups)
                )
            groups = [dataclasses.replace(g, weight=w) for g, w in zip(groups, config.group_weights, strict=True)]
        if config.val_images > len(held_out):
            raise ValueError(f"val_images is {config.val_images}; there are {len(held_out)}")
        classes = sum(group.n_classes for group in groups)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = load_pretrained(config.init) if config.init else create_model(config.model, classes)
        if model.name != config.model:
            raise ValueError(f"{config.init} is a {model.name}, not a {config.model}")
        if model.num_classes != classes:
            model.reset_head(classes)
        model.image_size = config.image_size
        model.to(device)

        # A group's weight is meant for the images that have a label in it; upstream_loss averages over all images.
        weighted = groups
        if config.loss == "softmax":
            share = (upstream.batch(torch.arange(min(2_000, len(upstream))))[1] >= 0).float().mean(dim=0).tolist()
            weighted = [
                dataclasses.replace(g, weight=g.weight / max(s, 1e-3)) for g, s in zip(groups, share, strict=True)
            ]

        def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
            return upstream_loss(logits, targets, weighted, config.loss, config.label_smoothing)

        val_images, val_targets = held_out.batch(torch.arange(config.val_images)) if rank == 0 else (None, None)

        def eval_fn(model: nn.Module) -> dict[str, float]:
            return group_accuracy(model, val_images, val_targets, groups, config.image_size)

        history = train(
            model,
            upstream_batches(upstream, config, rank, world),
            loss_fn,
            config.lr_at,
            config.steps,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            micro_batch=micro_batch,
            run_dir=run_dir,
            config=dataclasses.asdict(config),
            save_every=save_every,
            keep=keep,
            log_every=log_every,
            eval_fn=eval_fn,
            eval_every=eval_every,
            progress=progress,
            tensorboard=tensorboard,
        )
        model.eval()
        val = {name: value for name, value in history.evals[-1].items() if name != "step"}
        if run_dir is not None and rank == 0:
            write_model(Path(run_dir), model, config, groups, val)
        return Pretrained(model, history, val)
    finally:
        if joined:
            dist.destroy_process_group()


def write_model(run_dir: Path, model: nn.Module, config: PretrainConfig, groups: Sequence, val: dict) -> None:
    """Write model.safetensors and its card: the command, the figures, the hash."""
    about = {
        "command": config.command(),
        "config": dataclasses.asdict(config),
        "groups": [{"name": g.name, "n_classes": g.n_classes, "weight": g.weight} for g in groups],
        "images_seen": config.steps * config.batch_size,
        "val": val,
    }
    path = run_dir / "model.safetensors"
    save_checkpoint(model, path, {name: v if isinstance(v, str) else json.dumps(v) for name, v in about.items()})
    card = {
        "architecture": config.model,
        "parameters": sum(p.numel() for p in model.parameters()),
        **about,
        "torch": torch.__version__,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    text = json.dumps(card, indent=2) + "\n"
    write_atomically(run_dir / "card.json", lambda temporary: temporary.write_text(text))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: python -m bitlib.pretrain --model R26x0.25 --data M --steps 5500 --out RUN."""
    parser = argparse.ArgumentParser(
        prog="python -m bitlib.pretrain",
        description="Pre-train a model on GlyphNet. Stop it at any moment; the same command goes on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    about = {
        "model": "the architecture, such as R26x0.25 or R50x1",
        "data": "the size of GlyphNet: S, M or L",
        "steps": "optimiser steps",
        "batch_size": "images a step, over all processes",
        "lr": "the highest learning rate; left out, 0.1 x batch / 128 for minis and the paper's 0.03 x batch / 256",
        "warmup_steps": "steps of linear warm-up",
        "decay": "step, cosine or polynomial",
        "decay_at": "the shares of the steps at which --decay step divides the rate by 10",
        "weight_decay": "the factor of half the squared norm of the weights",
        "label_smoothing": "the share of probability that the softmax targets spread over all classes",
        "loss": "softmax (one a group of labels) or sigmoid (one question a class)",
        "group_weights": "a weight for each group of labels, instead of the data set's",
        "clip_norm": "scale gradients down to this norm",
        "image_size": "enlarge the images to this many pixels a side",
        "init": "a checkpoint to start from: a path or a name",
        "crop": "show a random window of each image, at least this share of its area; 1 shows all of it",
        "val_images": "how many validation images",
    }
    kinds = {"group_weights": float, "decay_at": float, "lr": float, "clip_norm": float}
    for item in dataclasses.fields(PretrainConfig):
        many = {"nargs": "+"} if item.name in ("decay_at", "group_weights") else {}
        kind = kinds.get(item.name, str if item.default is None else type(item.default))
        parser.add_argument(
            f"--{item.name.replace('_', '-')}", type=kind, default=item.default, help=about.get(item.name, " "), **many
        )
    parser.add_argument("--out", required=True, metavar="RUN", help="the run folder")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; the GPU where there is one by default")
    parser.add_argument("--micro-batch", type=int, help="work through a batch in parts of at most this many images")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--eval-every", type=int, default=500, help="steps between evaluations")
    parser.add_argument("--log-every", type=int, default=50, help="steps between lines of the log")
    parser.add_argument("--keep", type=int, default=2, help="how many checkpoints to keep")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard files to RUN/tensorboard")
    args = vars(parser.parse_args(argv))
    out = args.pop("out")
    chosen = {item.name: args.pop(item.name) for item in dataclasses.fields(PretrainConfig)}
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        config = PretrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()})
        result = pretrain(config, out, **args)
    except TrainingInterrupted as stop:
        if first:
            print(stop, file=sys.stderr)
        sys.exit(128 + stop.signum)
    except (TrainingError, ValueError, ImportError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if first:
        figures = ", ".join(f"{name} {100 * value:.1f} %" for name, value in result.val.items())
        print(f"{out}/model.safetensors: {config.model} after {config.steps} steps; validation top-1: {figures}")


if __name__ == "__main__":
    main()
