"""VTAB-1k through TensorFlow Datasets, offline: every task's pipeline on made-up examples, splits, labels, refusals."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from bitlib import evaluate as module
from bitlib.evaluate import (
    CLEVR_DISTANCES,
    KITTI_DISTANCES,
    VTAB_1K,
    VtabImages,
    evaluate_suite,
    load_vtab_task,
    suite_tasks,
    vtab_label,
)
from bitlib.resnet import create_model

tfds = pytest.importorskip("tensorflow_datasets")


class Trimmed:
    """A mock source whose objects are as a real example's: as many of each kind, and 3 to 10 in Clevr."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        example = self.source[index]
        if "objects" in example:
            n = 3 + index % 8
            grown = {k: np.resize(v, (n, *np.shape(v)[1:])) for k, v in example["objects"].items() if len(v)}
            example = example | {"objects": grown}
        return example


@pytest.fixture
def mocked():
    with tfds.testing.mock_data(num_examples=1000):
        yield


def test_there_are_nineteen_tasks_in_three_groups():
    groups = list(suite_tasks("vtab-1k").values())
    assert [groups.count(g) for g in ("natural", "specialized", "structured")] == [7, 4, 8] and len(groups) == 19


@pytest.mark.parametrize("name", VTAB_1K)
def test_the_pipeline_of_every_task(name, mocked, tmp_path):
    task = load_vtab_task(name, data_dir=tmp_path)
    group, dataset, n_classes, test_split, left_out = VTAB_1K[name]
    assert task.name == name and task.group == group and len(task.classes) == n_classes == task.train.n_classes
    assert len(task.train) == 1000 and task.chance == 1 / n_classes
    train, val = task.train_val()
    assert list(train.indices) == list(range(800)) and list(val.indices) == list(range(800, 1000))
    for part in (task.train, task.test):
        images = VtabImages(Trimmed(part.source), name)
        for index in (0, 7, 999):
            image, label = images[index]
            assert image.dtype == torch.uint8 and image.ndim == 3 and image.shape[0] == 3
            assert isinstance(label, int) and 0 <= label < n_classes
    assert task.flip == ("flip" not in left_out) and task.crop == ("crop" not in left_out)
    assert dataset in task.source and test_split in task.source and len(task.card().splitlines()) >= 5


@pytest.mark.parametrize("name", VTAB_1K)
def test_the_number_of_classes_is_the_data_sets(name):
    builder = tfds.builder(VTAB_1K[name][1])
    if "label" in builder.info.features:
        assert builder.info.features["label"].num_classes == VTAB_1K[name][2]
    elif name.startswith("smallnorb"):
        assert builder.info.features["label_" + name.split("_")[1]].num_classes == VTAB_1K[name][2]


def test_the_exceptions_are_the_papers():
    assert {n for n, row in VTAB_1K.items() if "flip" in row[4]} == {
        "dsprites_location",
        "dsprites_orientation",
        "smallnorb_azimuth",
    }
    assert {n for n, row in VTAB_1K.items() if "crop" in row[4]} == {
        "clevr_count",
        "clevr_distance",
        "dmlab",
        "kitti_distance",
        "dsprites_location",
    }


def by_thresholds(edges, value):
    """The benchmark's own rule: the last of the thresholds that the value exceeds."""
    return int(np.max(np.where(np.array(edges) - value < 0)))


@pytest.mark.parametrize("value", [0.1, 7.999, 8.0, 8.001, 8.5, 9.2, 10.0, 10.1, 40.0])
def test_distances_are_cut_as_the_benchmark_cuts_them(value):
    value = np.float64(value)
    clevr = {"objects": {"pixel_coords": [[0, 0, 50.0], [1, 2, value]]}}
    assert vtab_label("clevr_distance", clevr) == by_thresholds([0.0, *CLEVR_DISTANCES, 100.0], value)
    kitti = {"objects": {"type": [7, 0, 2], "location": [[0, 0, 0.5], [0, 0, value], [0, 0, 60.0]]}}
    assert vtab_label("kitti_distance", kitti) == by_thresholds([-100.0, *KITTI_DISTANCES], value)


def test_kitti_without_a_vehicle_is_a_class_of_its_own():
    assert vtab_label("kitti_distance", {"objects": {"type": [4, 3], "location": [[0, 0, 2.0], [0, 0, 3.0]]}}) == 3
    assert vtab_label("kitti_distance", {"objects": {"type": [], "location": []}}) == 3


def test_sprites_and_norb_labels():
    for label in range(40):
        assert vtab_label("dsprites_orientation", {"label_orientation": np.int64(label)}) == int(label // 2.5)
    assert [vtab_label("dsprites_location", {"label_x_position": x}) for x in (0, 1, 2, 31)] == [0, 0, 1, 15]
    norb = {"label_azimuth": 17, "label_elevation": 3, "label_category": 1}
    assert vtab_label("smallnorb_azimuth", norb) == 17 and vtab_label("smallnorb_elevation", norb) == 3
    assert vtab_label("clevr_count", {"objects": {"size": [0] * 10}}) == 7


def test_sprites_are_black_and_white_and_of_three_channels():
    sprite = np.zeros((64, 64, 1), np.uint8)
    sprite[10] = 1
    image, _ = VtabImages([{"image": sprite, "label_x_position": 3}], "dsprites_location")[0]
    assert image.shape == (3, 64, 64) and image.unique().tolist() == [0, 255]


def test_a_label_outside_the_classes_is_an_error_that_names_the_example():
    images = VtabImages([{"image": np.zeros((4, 4, 3), np.uint8), "objects": {"size": [0]}}], "clevr_count")
    with pytest.raises(ValueError, match="example 0 of clevr_count has label -2, outside its 8 classes"):
        images[0]


@pytest.mark.parametrize("name", ["resisc45", "diabetic_retinopathy"])
def test_what_must_be_fetched_by_hand_says_what_and_where(name, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_vtab_task(name, data_dir=tmp_path, download=False)
    text = str(error.value)
    assert f"{name} must be downloaded by hand" in text and str(tmp_path / "downloads" / "manual") in text
    assert "http" in text and "\n" not in text


def test_other_failures_name_the_task_and_the_reason(tmp_path):
    with pytest.raises(RuntimeError, match=r"svhn \(svhn_cropped\) could not be loaded: "):
        load_vtab_task("svhn", data_dir=tmp_path, download=False)
    with pytest.raises(ValueError, match="no task 'imagenet' in vtab-1k; there are caltech101, cifar100"):
        load_vtab_task("imagenet")


def test_a_data_set_that_tensorflow_must_prepare_says_how(tmp_path, monkeypatch):
    def needs_tensorflow(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    monkeypatch.setattr(tfds, "data_source", needs_tensorflow)
    with pytest.raises(RuntimeError, match=r"`tfds build svhn_cropped --file_format=array_record`.*data_dir"):
        load_vtab_task("svhn", data_dir=tmp_path)


def test_without_tensorflow_datasets_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match=r'svhn needs TensorFlow Datasets; pip install "bitlib\[vtab\]"'):
        load_vtab_task("svhn")


class TinySquares(tfds.core.GeneratorBasedBuilder):
    """Bright and dark squares, for a data set that is really written to disk and read."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = tfds.core.Path(__file__).parent  # a test module is no package

    def _info(self):
        features = {"image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.ClassLabel(num_classes=10)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(1500)}

    def _generate_examples(self, n):
        for i in range(n):
            noise = np.random.RandomState(i).randint(0, 20, (8, 8, 3))
            yield i, {"image": Image.fromarray((23 * (i % 10) + noise).astype(np.uint8)), "label": i % 10}


@pytest.fixture
def tiny_on_disk(tmp_path, monkeypatch):
    monkeypatch.setitem(module.VTAB_1K, "eurosat", ("specialized", "tiny_squares", 10, "train[80%:]", ""))
    builder = TinySquares(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    return tmp_path


def test_array_records_are_written_and_read_without_tensorflow(tiny_on_disk):
    assert "tensorflow" not in sys.modules and list(tiny_on_disk.rglob("*.array_record*"))
    task = load_vtab_task("eurosat", data_dir=tiny_on_disk)
    assert len(task.train) == 1000 and len(task.test) == 300
    train = {task.train[i][0].numpy().tobytes() for i in range(1000)}
    test = {task.test[i][0].numpy().tobytes() for i in range(300)}
    assert len(train) == 1000 and len(test) == 300 and not train & test
    image, label = task.train[5]
    assert abs(image.float().mean() - (23 * label + 9.5)) < 3 and task.train.labels[5] == label


def test_the_suite_runs_what_can_be_loaded_and_names_what_cannot(tiny_on_disk, monkeypatch):
    real = load_vtab_task
    monkeypatch.setattr(module, "load_vtab_task", lambda name, data_dir: real(name, data_dir, download=False))
    torch.manual_seed(0)
    model = create_model("R14x0.25", 10)
    model.image_size = 16
    out, kept = tiny_on_disk / "vtab.json", tiny_on_disk / "predictions"
    results = evaluate_suite(
        model,
        "vtab-1k",
        methods=("ridge",),
        tasks=("eurosat", "svhn"),
        out=out,
        data_dir=tiny_on_disk,
        predictions=kept,
    )
    assert [row["task"] for row in results["rows"]] == ["eurosat"] and results["rows"][0]["top1"] > 0.5
    assert list(results["failed"]) == ["svhn"] and "could not be loaded" in results["failed"]["svhn"]
    assert all(score is None for score in results["summary"][0]["scores"].values())  # no mean without all tasks
    assert "could not be loaded: svhn" in str(results) and "not run: " in str(results)
    (file,) = kept.iterdir()
    again = module.score_predictions(file)
    assert again["top1"] == pytest.approx(results["rows"][0]["top1"], abs=1e-6) and again["task"] == "eurosat"


def test_nothing_imports_tensorflow():
    code = (
        "import sys\nimport tensorflow_datasets as tfds\nfrom bitlib.evaluate import load_vtab_task\n"
        "with tfds.testing.mock_data(num_examples=1000):\n    task = load_vtab_task('cifar100', data_dir='nowhere')\n"
        "    print(tuple(task.train[0][0].shape), 'tensorflow' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "(3, 32, 32) False", out.stderr
