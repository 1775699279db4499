"""The grid of upstream and network sizes: its runs are the book's own command, are not run twice, and are the asked."""

import json

import pytest
import size_grid


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")

    def run(steps: int) -> dict:
        chosen = ["--architectures", "R14x0.25", "--upstreams", "S", "--seeds", "0", "1"]
        size_grid.main(["--runs", str(folder), "--steps", str(steps), "--out", str(folder / "grid.json"), *chosen])
        return json.loads((folder / "grid.json").read_text())

    before, size_grid.UNTRAINED_SEEDS = size_grid.UNTRAINED_SEEDS, (0,)
    yield folder, run
    size_grid.UNTRAINED_SEEDS = before


def test_a_grid_is_run_once_measured_and_checked(grid):
    folder, run = grid
    first = run(2)
    assert len(first["rows"]) == 2 * 2 * 4  # networks, tasks, shots
    assert all(0 <= value <= 1 for row in first["rows"] for value in row["top1"])
    network = first["networks"][0]
    said = "python -m bitlib.pretrain --model R14x0.25 --data S --steps 2 --decay-at 0.7 0.85 0.95"
    assert network["command"] == said
    assert network["images_seen"] == 256 and network["parameters"] > 500_000

    written = (folder / "S-R14x0.25" / "model.safetensors").stat().st_mtime_ns
    assert run(2) == first  # measured again, to the same figures
    assert (folder / "S-R14x0.25" / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(SystemExit, match="another run than asked for"):
        run(3)


def test_a_run_that_fails_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="R99x1.*ended with 1.*last words") as failure:
        size_grid.pretrain(size_grid.command("R99x1", "S", 2), tmp_path / "S-R99x1", threads=1)
    words = tmp_path / "S-R99x1.txt"
    assert str(words) in str(failure.value) and "R99x1" in words.read_text()
