"""The zoo's models have their textbook shapes, and what ships with them is what it claims."""

from __future__ import annotations

import doctest
import gzip
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file

import models_zoo
from models_zoo import data, mobilenetv2, train

WEIGHTS = Path(models_zoo.__file__).parent / "weights" / "resnet_fmnist.safetensors"

# Parameters, and the shapes of the outputs for the example inputs.
EXPECTED = {
    "bert_base": (109_482_240, [(2, 16, 768), (2, 768)]),
    "bert_tiny": (557_952, [(2, 16, 128), (2, 128)]),
    "hrnet_w18": (9_906_700, [(2, 1000)]),
    "hrnet_w18_small": (2_302_612, [(2, 1000)]),
    "llama_tiny": (483_968, [(2, 16, 512)]),
    "mobilenetv2": (3_504_872, [(2, 1000)]),
    "resnet18": (11_689_512, [(2, 1000)]),
    "resnet20": (272_474, [(2, 10)]),
    "resnet50": (25_557_032, [(2, 1000)]),
    "resnet56": (855_770, [(2, 10)]),
    "resnet_fmnist": (173_842, [(2, 10)]),
    "vit_tiny": (5_581_480, [(2, 1000)]),
    "yolov3_tiny": (8_852_366, [(2, 255, 3, 3), (2, 255, 6, 6)]),
    "yolov8n": (3_157_184, [(2, 144, 12, 12), (2, 144, 6, 6), (2, 144, 3, 3)]),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Run on one thread, as training does; the models are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_table_is_complete() -> None:
    assert models_zoo.names() == sorted(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_builds_and_runs(name: str) -> None:
    model = models_zoo.build(name)
    with torch.inference_mode():
        output = model(*models_zoo.example_inputs(name))
    outputs = [output] if isinstance(output, torch.Tensor) else list(output)
    parameters, shapes = EXPECTED[name]
    assert sum(value.numel() for value in model.parameters()) == parameters
    assert [tuple(value.shape) for value in outputs] == shapes
    assert all(bool(value.isfinite().all()) for value in outputs)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_example_inputs_are_the_same_every_time(name: str) -> None:
    before = torch.get_rng_state()
    first, second = models_zoo.example_inputs(name), models_zoo.example_inputs(name)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_overrides_reach_the_model() -> None:
    model = models_zoo.build("vit_tiny", num_classes=7, depth=1, num_heads=6)
    with torch.inference_mode():
        assert model(*models_zoo.example_inputs("vit_tiny")).shape == (2, 7)
    with pytest.raises(TypeError, match="num_clases"):
        models_zoo.build("resnet20", num_clases=7)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="no model 'resnet_50'; did you mean 'resnet50'") as error:
        models_zoo.build("resnet_50")
    assert all(name in str(error.value) for name in models_zoo.names())
    with pytest.raises(ValueError, match="no model 'qqq'; it has: bert_base"):
        models_zoo.example_inputs("qqq")


def test_no_trained_weights() -> None:
    with pytest.raises(ValueError, match="ship for 'resnet18', only for: resnet_fmnist"):
        models_zoo.build("resnet18", pretrained=True)


def test_import_is_cheap() -> None:
    code = "import models_zoo, sys; models_zoo.names(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=WEIGHTS.parents[2])


def test_documented_examples() -> None:
    for module in (models_zoo, mobilenetv2):
        result = doctest.testmod(module)
        assert result.attempted
        assert not result.failed


def test_mobilenetv2_has_the_names_of_torchvision() -> None:
    names = set(models_zoo.build("mobilenetv2").state_dict())
    assert len(names) == 314
    assert {
        "features.0.1.running_var",
        "features.1.conv.1.weight",
        "features.2.conv.0.0.weight",
        "features.17.conv.3.bias",
        "features.18.0.weight",
        "classifier.1.bias",
    } <= names


def test_yolov3_tiny_has_the_floats_of_darknet() -> None:
    state = models_zoo.build("yolov3_tiny").state_dict()
    assert sum(value.numel() for value in state.values() if value.is_floating_point()) == 8_858_734


def test_bert_does_not_see_padding() -> None:
    model = models_zoo.build("bert_tiny")
    ids, mask = models_zoo.example_inputs("bert_tiny")
    with torch.inference_mode():
        hidden, _ = model(ids, mask)
        changed, _ = model(torch.where(mask == 1, ids, 5), mask)
        unmasked, _ = model(torch.where(mask == 1, ids, 5))
    torch.testing.assert_close(hidden[mask == 1], changed[mask == 1])
    assert not torch.allclose(hidden[mask == 1], unmasked[mask == 1])


def test_llama_does_not_see_the_future() -> None:
    model = models_zoo.build("llama_tiny")
    (ids,) = models_zoo.example_inputs("llama_tiny")
    later = ids.clone()
    later[:, 10] = (later[:, 10] + 1) % 512
    with torch.inference_mode():
        logits, changed = model(ids), model(later)
    torch.testing.assert_close(logits[:, :10], changed[:, :10])
    assert not torch.allclose(logits[:, 10:], changed[:, 10:])


def test_llama_ties_its_head() -> None:
    tied = models_zoo.build("llama_tiny", tied=True)
    assert tied.get_parameter("lm_head.weight") is tied.get_parameter("embed_tokens.weight")


def test_subsets_have_the_documented_form() -> None:
    for subset, count in ((data.calibration(), 512), (data.test(), 2000)):
        assert subset.images.shape == (count, 28, 28)
        assert subset.labels.shape == (count,)
        assert subset.images.dtype == subset.labels.dtype == np.uint8
        assert set(subset.labels.tolist()) == set(range(len(data.CLASSES)))


def test_calibration_and_test_are_disjoint() -> None:
    calibration, held_out = (
        {image.tobytes() for image in subset.images} for subset in (data.calibration(), data.test())
    )
    assert len(calibration) == 512
    assert calibration.isdisjoint(held_out)


def test_batches_with_and_without_labels() -> None:
    images, labels = data.calibration()
    inputs = list(data.batches(images, batch_size=200))
    assert [tuple(x.shape) for x in inputs] == [
        (200, 1, 28, 28),
        (200, 1, 28, 28),
        (112, 1, 28, 28),
    ]
    assert inputs[0].dtype == torch.float32
    pairs = list(data.batches(images, labels, batch_size=200))
    assert torch.equal(pairs[2][0], inputs[2])
    assert pairs[2][1].tolist() == labels[400:].tolist()


def test_trained_weights_score_as_recorded() -> None:
    images, labels = data.test()
    with safe_open(WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert float(metadata["accuracy_10000"]) >= 91.0
    assert WEIGHTS.stat().st_size < 2_000_000
    model = models_zoo.build("resnet_fmnist", pretrained=True)
    score = data.accuracy(model, images, labels)
    assert score >= float(metadata["accuracy_2000"]) - 0.1
    # The same measure must be able to fail.
    assert data.accuracy(models_zoo.build("resnet_fmnist"), images[:500], labels[:500]) < 50.0


def test_readme_quotes_the_recorded_accuracy() -> None:
    readme = Path(models_zoo.__file__).with_name("README.md").read_text(encoding="utf-8")
    with safe_open(WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert f"{metadata['accuracy_10000']} %" in readme
    assert f"{metadata['accuracy_2000']} %" in readme
    assert metadata["command"] in readme


# Training, on a made-up set that is learnt in seconds.


def write_idx(path: Path, values: NDArray[np.uint8]) -> None:
    header = struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """A folder like the full set's, with 128 training images, one batch, and 32 for testing."""
    random = np.random.default_rng(0)
    for part, count in (("train", 128), ("t10k", 32)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    return tmp_path


def test_training_resumes_where_it_was_killed(
    made_up: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(out: Path, epochs: int = 3) -> None:
        train.main(["--data", str(made_up), "--out", str(out), "--epochs", str(epochs)])

    whole, resumed = made_up / "whole.safetensors", made_up / "resumed.safetensors"
    run(whole)
    assert "epoch 3/3" in capsys.readouterr().out

    original = train.train_epoch

    def killed_in_the_last_epoch(*arguments: object) -> float:
        if arguments[-1] == 2:
            raise KeyboardInterrupt
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(train, "train_epoch", killed_in_the_last_epoch)
    with pytest.raises(KeyboardInterrupt):
        run(resumed)
    assert not resumed.exists()
    with pytest.raises(ValueError, match="belongs to another recipe"):
        run(resumed, epochs=4)
    monkeypatch.undo()
    run(resumed)
    assert "going on after epoch 2" in capsys.readouterr().out

    first, second = load_file(whole), load_file(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list(made_up.glob("*.checkpoint"))
    assert not list(made_up.glob("*.partial"))


def test_augmentation_moves_and_mirrors() -> None:
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, 10, 5] = 255
    moved = train.augment(np.repeat(image, 500, axis=0), 1, np.random.default_rng(0))
    _, rows, columns = np.nonzero(moved)
    assert set(rows.tolist()) == {9, 10, 11}
    assert set(columns.tolist()) == {4, 5, 6, 21, 22, 23}


def test_full_set_is_read_back(made_up: Path) -> None:
    full, held_out = data.load_full(made_up)
    assert full.images.shape == (128, 28, 28)
    assert held_out.labels.shape == (32,)
    data.make_subsets(made_up, made_up / "subsets")
    with np.load(made_up / "subsets" / "calibration.npz", allow_pickle=False) as subset:
        assert subset["images"].shape == (128, 28, 28)


def test_files_that_are_not_idx_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(gzip.compress(b"\0\0\x0d\x01" + bytes(8)))
    with pytest.raises(ValueError, match="not an idx file of unsigned bytes"):
        data.read_idx(path)
    path.write_bytes(gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, 9) + bytes(4)))
    with pytest.raises(ValueError, match=re.escape("4 bytes where the header promises shape (9,)")):
        data.read_idx(path)
