"""Chapter 11: what fine-tuning R50x1 at the rule's batch takes in memory, and that a stand-in is called one."""

import subprocess
import sys
import textwrap

import nbformat
import pytest
from book import ROOT

from bitlib.checks.official import check_batch_loss, check_hours, check_micro_batch
from bitlib.hyperrule import hyperrule

FINETUNE = """
    import dataclasses, torch
    from bitlib.data import ImageTensorDataset
    from bitlib.finetune import finetune
    from bitlib.hyperrule import hyperrule
    from bitlib.resnet import create_model

    torch.manual_seed(0)
    images = torch.randint(256, (512, 3, 32, 32), dtype=torch.uint8)
    data = ImageTensorDataset(images, torch.arange(512) % 10)
    rule = hyperrule(len(data), (32, 32)).with_steps(1)
    assert (rule.batch_size, rule.resize, rule.crop) == (512, 160, 128)
    result = finetune(create_model("R50x1", num_classes=10), data, rule, micro_batch=16, progress=False)
    assert abs(result.history.loss[0] - 2.302585) < 1e-4
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            print(int(line.split()[1]) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from /proc")
@pytest.mark.timeout(3000)
def test_a_batch_of_512_at_128_pixels_stays_under_4_gigabytes():
    """One step of R50x1 by the unscaled rule, forward and backward, on the CPU, in parts of 16."""
    code = textwrap.dedent(FINETUNE)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=2900)
    assert done.returncode == 0, done.stderr
    assert 0.5 < float(done.stdout) < 4, f"{done.stdout} GB"


def test_the_committed_page_calls_its_stand_in_one():
    notebook = nbformat.read(ROOT / "chapters" / "11_official_models.ipynb", as_version=4)
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", ()))
    assert "running on: a STAND-IN, R50x1 with random weights" in printed
    assert printed.count("not a result") == 2 and printed.count("its accuracy means nothing") == 2
    ours = [line for line in printed.splitlines() if line.startswith("this run")]
    assert len(ours) == 2 and not any("%" in line for line in ours)


def test_checkers_accept_and_refuse(capsys):
    def hours(n, size, speed):
        rule = hyperrule(n, size)
        return rule.steps * rule.batch_size / speed / 3_600

    def part(budget, fixed, per_image, batch):
        return max(m for m in range(1, batch + 1) if batch % m == 0 and fixed + m * per_image <= budget)

    check_batch_loss(lambda losses, sizes: sum(a * n for a, n in zip(losses, sizes, strict=True)) / sum(sizes))
    check_hours(hours)
    check_micro_batch(part)
    assert capsys.readouterr().out.count(": correct") == 3
    for check, wrong, words in (
        (check_batch_loss, lambda losses, sizes: sum(losses) / len(losses), "as much as it has images"),
        (check_hours, lambda n, size, speed: 500 * 512 / speed / 3_600, "10000 steps of 512"),
        (check_micro_batch, lambda b, f, p, batch: int((b - f) / p), "fits and divides it"),
    ):
        with pytest.raises(AssertionError, match=words):
            check(wrong)
    for check in (check_batch_loss, check_hours, check_micro_batch):
        with pytest.raises(AssertionError, match="returned nothing"):
            check(lambda *args: None)
