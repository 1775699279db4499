"""How fast R50x1 is, beside timm's resnetv2_50x1_bit and the plain formula of the released code; on a CPU, in float32.

    python tests/bench/bench_resnet.py [--quick] [--compile] [--out data/results/bench_resnet.json]

All times are taken in one process, one call of each contestant after the other, round after round, so that whatever
slows the machine down for a while slows all of them down. Reported are medians over the rounds, and their ratios.
The peak memory of a training step is taken in a fresh process for each contestant.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitlib.conv import StdConv2d, fold_weight_standardization
from bitlib.resnet import PreActBottleneck, ResNetV2, create_model

CLASSES = 1000
NEEDED = {
    "training step 8x3x128x128, against timm": (1.10, 1.30),
    "training step 8x3x128x128, against the formula": (1.5, 2.0),
    "inference 1x3x224x224, folded, against timm": (1.6, 2.5),
    "inference 8x3x128x128, folded, against timm": (1.3, 2.0),
    "peak memory of a training step, against timm": (1.0, 1.5),
}


class FormulaConv2d(nn.Conv2d):
    """Weight standardization as the equation has it, mean and variance first: what the released code computes."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-10)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def seeded(model: nn.Module) -> nn.Module:
    """The model with a head that is not zero, so that the whole network gets gradients."""
    for name, parameter in model.named_parameters():
        if name.startswith("head") and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.01)
    return model


def book() -> nn.Module:
    return seeded(create_model("R50x1", CLASSES))


def book_plain() -> nn.Module:
    """Our model with every block as the derivation writes it, its weights channels-last."""
    model = book()
    for module in model.modules():
        if isinstance(module, PreActBottleneck):
            module.fused = False
    return model


class ContiguousResNetV2(ResNetV2):
    """The network with its images laid out as the released code has them, channel by channel."""

    def features(self, x: Tensor) -> Tensor:
        x = self.root(x)
        x = self.block4(self.block3(self.block2(self.block1(x))))
        return F.relu(self.norm(x))


def formula() -> nn.Module:
    """The derivation, nothing else: var_mean, contiguous weights and images, no fused step."""
    model = book_plain().to(memory_format=torch.contiguous_format)
    model.__class__ = ContiguousResNetV2
    for module in model.modules():
        if isinstance(module, StdConv2d):
            module.__class__ = FormulaConv2d
    return model


def timm_model() -> nn.Module:
    return seeded(timm.create_model("resnetv2_50x1_bit", pretrained=False, num_classes=CLASSES))


def timm_channels_last() -> nn.Module:
    return timm_model().to(memory_format=torch.channels_last)


MODELS = {
    "book": book,
    "timm": timm_model,
    "formula": formula,
    "book, block as derived": book_plain,
    "timm, channels_last": timm_channels_last,
}


def training_step(model: nn.Module, x: Tensor, autocast: bool = False) -> Callable[[], None]:
    """A function that takes one step of SGD with momentum."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    target = torch.arange(len(x)) % CLASSES

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()

    return step


def inference(model: nn.Module, x: Tensor, autocast: bool = False) -> Callable[[], None]:
    model.eval()

    @torch.inference_mode()
    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(x)

    return step


def alternate(contestants: dict[str, Callable[[], None]], rounds: int, warmup: int) -> dict[str, dict]:
    """Time each in turn, rounds times, changing who goes first; seconds."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for i in range(warmup + rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            contestants[name]()
            elapsed = time.perf_counter() - start
            if i >= warmup:
                times[name].append(elapsed)
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> dict:
    """Median, minimum and the middle half's ends of some times, in milliseconds."""
    ms = sorted(1000 * value for value in values)
    quartiles = statistics.quantiles(ms, n=4) if len(ms) > 1 else [ms[0]] * 3
    return {
        "median_ms": round(statistics.median(ms), 2),
        "min_ms": round(ms[0], 2),
        "quartiles_ms": [round(quartiles[0], 2), round(quartiles[2], 2)],
        "rounds": len(ms),
    }


def peak_kib() -> int:
    """The most memory that this process has held. On Linux ru_maxrss starts from the parent's, so VmHWM is read."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))


def peak_memory(name: str, size: int) -> float:
    """MiB that building the model and taking three training steps add to this process, at the highest."""
    x = torch.randn(8, 3, size, size)
    before = peak_kib()
    step = training_step(MODELS[name](), x)
    for _ in range(3):
        step()
    return (peak_kib() - before) / 1024


def peak_memory_in_fresh_process(name: str, size: int, return_memory: bool) -> float:
    """The same, measured by a process of its own.

    return_memory: have the C library give every freed tensor back to the system at once, so that the peak is what
    the tensors need. By default it keeps much of it, and the peak depends on the order of its gaps as well.
    """
    environment = dict(os.environ)
    if return_memory:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, __file__, "--memory-of", name, "--size", str(size)]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return round(float(output.split()[-1]), 1)


def run(quick: bool, compiled: bool, rounds: int) -> dict:
    torch.manual_seed(0)
    rounds, warmup = (2, 1) if quick else (rounds, 2)
    batch, single = torch.randn(8, 3, 128, 128), torch.randn(1, 3, 224, 224)
    if quick:
        batch, single = batch[:2, :, :64, :64].clone(), single[:, :, :64, :64].clone()
    results: dict[str, dict] = {}

    print("peak memory ...", file=sys.stderr)
    size = batch.shape[-1]
    memory = {}
    for name in ("book", "timm", "formula", "book, block as derived"):
        memory[name] = {
            "peak_mib": peak_memory_in_fresh_process(name, size, return_memory=True),
            "peak_mib_default_allocator": peak_memory_in_fresh_process(name, size, return_memory=False),
        }

    print("training step ...", file=sys.stderr)
    contestants = {name: training_step(build(), batch) for name, build in MODELS.items()}
    contestants["book, bfloat16 autocast"] = training_step(book(), batch, autocast=True)
    contestants["timm, bfloat16 autocast"] = training_step(timm_model(), batch, autocast=True)
    results["training step 8x3x128x128"] = alternate(contestants, rounds, warmup)

    models = {
        "book, folded": fold_weight_standardization(book()),
        "timm": timm_model(),
        "formula": formula(),
        "book, not folded": book(),
        "book, folded, block as derived": fold_weight_standardization(book_plain()),
        "timm, channels_last": timm_channels_last(),
    }
    if compiled:
        models["book, folded, torch.compile"] = torch.compile(copy.deepcopy(models["book, folded"]))
    for title, x in {"inference 1x3x224x224": single, "inference 8x3x128x128": batch}.items():
        print(f"{title} ...", file=sys.stderr)
        contestants = {name: inference(model, x) for name, model in models.items()}
        for name in ("book, folded", "timm"):
            contestants[f"{name}, bfloat16 autocast"] = inference(models[name], x, autocast=True)
        results[title] = alternate(contestants, 2 * rounds, warmup)

    def ratio(task: str, ours: str, other: str) -> float:
        return round(results[task][other]["median_ms"] / results[task][ours]["median_ms"], 3)

    values = (
        ratio("training step 8x3x128x128", "book", "timm"),
        ratio("training step 8x3x128x128", "book", "formula"),
        ratio("inference 1x3x224x224", "book, folded", "timm"),
        ratio("inference 8x3x128x128", "book, folded", "timm"),
        round(memory["timm"]["peak_mib"] / memory["book"]["peak_mib"], 3),
    )
    ratios = {
        name: {"ratio": value, "needed": NEEDED[name][0], "aim": NEEDED[name][1]}
        for name, value in zip(NEEDED, values, strict=True)
    }
    metadata = {
        "model": "R50x1, 1000 classes, float32 unless said",
        "torch": torch.__version__.split("+")[0],
        "timm": timm.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "quick": quick,
    }
    return {"metadata": metadata, "ratios": ratios, "times": results, "memory": memory}


def report(result: dict) -> None:
    for task, times in result["times"].items():
        print(f"\n{task}")
        for name, row in times.items():
            low, high = row["quartiles_ms"]
            print(f"  {name:36s} {row['median_ms']:9.1f} ms  (middle half {low:.1f} to {high:.1f})")
    print("\npeak memory of a training step")
    for name, row in result["memory"].items():
        print(f"  {name:36s} {row['peak_mib']:9.1f} MiB  (default allocator {row['peak_mib_default_allocator']:.1f})")
    print(f"\n{'ratio, larger is better':50s} measured  needed   aim")
    for name, row in result["ratios"].items():
        print(f"{name:50s} {row['ratio']:8.2f}  {row['needed']:6.2f}  {row['aim']:4.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small images, few rounds: does it run at all?")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too (needs a C++ compiler)")
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    parser.add_argument(
        "--rounds", type=int, default=15, help="of training; inference takes twice as many (%(default)s)"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", choices=MODELS, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=128, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(peak_memory(arguments.memory_of, arguments.size))
        return
    result = run(arguments.quick, arguments.compile, arguments.rounds)
    report(result)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"\nwrote {arguments.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
