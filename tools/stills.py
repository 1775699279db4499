"""Draw the still pictures of the interactive figures, for readers without JavaScript, in print and before it runs.

    python tools/stills.py [--out FOLDER]

Every number in them comes from bitlib, or from what tools/demo.py wrote. Run it after that tool.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from book import ROOT

from bitlib.data import shipped_file
from bitlib.evaluate import reliability_curve, reliability_diagram
from bitlib.hyperrule import hyperrule

STATIC = ROOT / "pages" / "_static"
IMAGES, CHANNELS, POSITIONS, GROUPS = 2, 8, 3, 2


def draw_hyperrule() -> plt.Figure:
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.2))
    for n in (1_000, 50_000, 1_281_167):
        rule = hyperrule(n, 32)
        axes[0].plot([rule.lr(step) for step in range(0, rule.steps, 10)], label=f"{n:,} examples")
        axes[0].lines[-1].set_xdata(range(0, rule.steps, 10))
    axes[0].set(xscale="symlog", yscale="log", xlabel="step", ylabel="learning rate", title="Schedule")
    axes[0].legend()
    sizes = {"below 96 × 96": hyperrule(1_000, 32), "larger": hyperrule(1_000, 224)}
    for place, rule in enumerate(sizes.values()):
        axes[1].bar(place - 0.2, rule.resize, 0.38, color="C0", label="resize" if not place else None)
        axes[1].bar(place + 0.2, rule.crop, 0.38, color="C1", label="crop" if not place else None)
        for shift, side in ((-0.2, rule.resize), (0.2, rule.crop)):
            axes[1].annotate(str(side), (place + shift, side), ha="center", va="bottom", fontsize=9)
    axes[1].set(xticks=range(2), xticklabels=sizes, ylabel="pixels", title="Resolution, by the images' area")
    axes[1].legend()
    return figure


def wave() -> torch.Tensor:
    """The numbers that pages/_static/explore.js shows: (images, channels, positions)."""
    n, c, p = torch.meshgrid(torch.arange(IMAGES), torch.arange(CHANNELS), torch.arange(POSITIONS), indexing="ij")
    return (10 * (torch.sin(3.1 * n + 1.7 * c + 2.3 * p).double() + 0.35 * c)).round() / 10


def draw_norms() -> plt.Figure:
    x = wave()
    y = F.group_norm(x, GROUPS)
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.4))
    for ax, values, title in ((axes[0], x, "What goes in"), (axes[1], y, "What group norm makes of it")):
        for n in range(IMAGES):
            for c in range(CHANNELS):
                for p in range(POSITIONS):
                    colour = f"C{(n * GROUPS + c * GROUPS // CHANNELS) % 7}"
                    ax.add_patch(plt.Rectangle((n * (POSITIONS + 0.4) + p, c), 0.94, 0.9, color=colour, alpha=0.35))
                    at = (n * (POSITIONS + 0.4) + p + 0.47, c + 0.5)
                    ax.annotate(f"{values[n, c, p]:.1f}", at, ha="center", va="center", fontsize=8)
        ax.set(xlim=(0, IMAGES * (POSITIONS + 0.4)), ylim=(CHANNELS, 0), title=title)
        ax.set_xticks([1.5, POSITIONS + 1.9], ["image 1", "image 2"])
        ax.set_yticks([c + 0.5 for c in range(CHANNELS)], [f"channel {c + 1}" for c in range(CHANNELS)])
        ax.grid(False)
    return figure


def read_reliability(folder: Path = STATIC / "demo") -> tuple[torch.Tensor, torch.Tensor, int]:
    """Logits, labels and shots of the few-shot network that tools/demo.py fine-tuned."""
    text = (folder / "reliability.js").read_text(encoding="utf-8")
    data = json.loads(text.removeprefix("window.bitReliability = ").rstrip().removesuffix(";"))
    return torch.tensor(data["logits"]), torch.tensor(data["labels"]), data["shots"]


def draw_reliability() -> plt.Figure:
    logits, labels, _ = read_reliability()
    figure, axes = plt.subplots(figsize=(4.6, 4.0))
    curves = {f"T = {t}": reliability_curve(logits / t, labels) for t in (0.5, 1, 2)}
    reliability_diagram(curves)
    axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
    return figure


def draw_demo() -> plt.Figure:
    vectors = json.loads((STATIC / "demo" / "vectors.json").read_text(encoding="utf-8"))
    place = vectors["labels"].index(3)
    p = torch.tensor(vectors["logits"][place]).softmax(0)
    figure, axes = plt.subplots(1, 2, figsize=(6.4, 2.8), width_ratios=(1, 1.6))
    axes[0].imshow(torch.tensor(vectors["levels"][place]).reshape(8, 8), cmap="gray_r")
    axes[0].set(title="A scanned digit", xticks=(), yticks=())
    axes[0].grid(False)
    axes[1].barh(range(10), p)
    axes[1].set(yticks=range(10), ylim=(9.6, -0.6), xlim=(0, 1), xlabel="probability", title="What the network says")
    return figure


STILLS = {"hyperrule": draw_hyperrule, "norms": draw_norms, "reliability": draw_reliability, "demo": draw_demo}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=STATIC / "stills", help="the folder to write into")
    args = parser.parse_args(argv)
    plt.style.use(shipped_file("book.mplstyle"))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in STILLS.items():
        figure = draw()
        figure.savefig(args.out / f"{name}.png", dpi=150, metadata={"Software": None})
        plt.close(figure)
        print(args.out / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
