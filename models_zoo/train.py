"""Train ``resnet_fmnist`` on the 60,000 training images of Fashion-MNIST, on one core.

``python -m models_zoo.train --data FOLDER --epochs 8 --out weights.safetensors --seed 0``

A run that was killed goes on from its last whole epoch when the same command is given again;
the order of the images and their augmentation depend on the seed and the epoch alone, so the
result is that of an undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn

from models_zoo.data import TEST_IMAGES, Images, accuracy, load_full, normalise
from models_zoo.resnet import resnet_fmnist


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, apart from the data."""

    epochs: int = 8
    seed: int = 0
    batch_size: int = 128
    peak_lr: float = 0.15
    warmup: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05
    shift: int = 1

    def learning_rate(self, progress: float) -> float:
        """Return the one-cycle rate at ``progress`` in 0..1: linear up, cosine down to zero."""
        if progress < self.warmup:
            return self.peak_lr * progress / self.warmup
        fall = (progress - self.warmup) / (1.0 - self.warmup)
        return self.peak_lr * 0.5 * (1.0 + math.cos(math.pi * fall))


def augment(
    images: NDArray[np.uint8], shift: int, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Move each of [N, 28, 28] by up to ``shift`` pixels and mirror half of them."""
    count, height, width = images.shape
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift)))
    windows = sliding_window_view(padded, (height, width), axis=(1, 2))
    down, right = random.integers(0, 2 * shift + 1, (2, count))
    moved: NDArray[np.uint8] = windows[np.arange(count), down, right]
    mirrored = random.random(count) < 0.5
    moved[mirrored] = moved[mirrored, :, ::-1]
    return moved


def epoch_batches(train: Images, recipe: Recipe, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over one epoch of shuffled, augmented batches; the short last one is left out."""
    random = np.random.default_rng((recipe.seed, epoch))
    order = random.permutation(len(train.images))
    for step in range(len(order) // recipe.batch_size):
        chosen = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        images = augment(train.images[chosen], recipe.shift, random)
        yield normalise(images), torch.from_numpy(train.labels[chosen].astype(np.int64))


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    train: Images,
    recipe: Recipe,
    epoch: int,
) -> float:
    """Train for one epoch and return its mean loss."""
    model.train()
    steps = len(train.images) // recipe.batch_size
    total = 0.0
    for step, (inputs, targets) in enumerate(epoch_batches(train, recipe, epoch)):
        rate = recipe.learning_rate((epoch + (step + 1) / steps) / recipe.epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model(inputs), targets, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += loss.item()
    return total / steps


class Checkpoint:
    """The state after a whole epoch: one safetensors file, and the JSON that names it.

    The JSON is replaced last, so a kill at any moment leaves a pair that belongs together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state.json"

    def save(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe, epochs_done: int
    ) -> None:
        """Keep the weights and the momentum; drop the tensors of the epoch before."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        for name, parameter in model.named_parameters():
            tensors[f"momentum.{name}"] = optimizer.state[parameter]["momentum_buffer"]
        current = self.folder / f"epoch{epochs_done}.safetensors"
        write_tensors(current, tensors, {})
        state = {"epochs_done": epochs_done, "tensors": current.name, "recipe": asdict(recipe)}
        partial = self.state.with_suffix(".partial")
        partial.write_text(json.dumps(state, indent=2), encoding="utf-8")
        os.replace(partial, self.state)
        for stale in self.folder.glob("epoch*"):
            if stale != current:
                stale.unlink()

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: Recipe) -> int:
        """Load the last whole epoch, if there is one, and return how many are done."""
        if not self.state.exists():
            return 0
        state = json.loads(self.state.read_text(encoding="utf-8"))
        if state["recipe"] != asdict(recipe):
            raise ValueError(
                f"{self.state} belongs to another recipe, {state['recipe']}; give the arguments "
                f"of that run to go on with it, or remove {self.folder} to start again"
            )
        tensors = load_file(self.folder / state["tensors"])
        model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
        for name, parameter in model.named_parameters():
            optimizer.state[parameter]["momentum_buffer"] = tensors[f"momentum.{name}"]
        return int(state["epochs_done"])

    def remove(self) -> None:
        """Delete the folder, after the result has been written."""
        shutil.rmtree(self.folder, ignore_errors=True)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors so that ``path`` is either the old file or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    dense = {name: value.detach().contiguous() for name, value in tensors.items()}
    partial.write_bytes(save(dense, metadata=metadata))
    os.replace(partial, path)


def fit(train: Images, held_out: Images, recipe: Recipe, checkpoint: Checkpoint) -> nn.Module:
    """Train from the last checkpoint to the end of the recipe, one printed line per epoch."""
    torch.manual_seed(recipe.seed)
    model: nn.Module = resnet_fmnist()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=recipe.peak_lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    done = checkpoint.restore(model, optimizer, recipe)
    if done:
        print(f"going on after epoch {done}", flush=True)
    for epoch in range(done, recipe.epochs):
        start = time.perf_counter()
        loss = train_epoch(model, optimizer, train, recipe, epoch)
        seconds = time.perf_counter() - start
        checkpoint.save(model, optimizer, recipe, epoch + 1)
        # The first test images only show progress; nothing is chosen by this figure.
        score = accuracy(model, held_out.images[:TEST_IMAGES], held_out.labels[:TEST_IMAGES])
        print(
            f"epoch {epoch + 1}/{recipe.epochs}  loss {loss:.4f}  "
            f"first {TEST_IMAGES} test images {score:.2f} %  {seconds:.0f} s",
            flush=True,
        )
    return model


def main(arguments: Sequence[str] | None = None) -> None:
    """Train resnet_fmnist on the full Fashion-MNIST and write its weights."""
    defaults = Recipe()
    parser = argparse.ArgumentParser(prog="python -m models_zoo.train", description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the idx .gz files")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--epochs", type=int, default=defaults.epochs)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    options = parser.parse_args(arguments)
    recipe = Recipe(epochs=options.epochs, seed=options.seed)

    torch.set_num_threads(1)  # one core, and sums in the same order every time
    train, held_out = load_full(options.data)
    checkpoint = Checkpoint(options.out.with_suffix(".checkpoint"))
    model = fit(train, held_out, recipe, checkpoint)

    full = accuracy(model, held_out.images, held_out.labels)
    subset = accuracy(model, held_out.images[:TEST_IMAGES], held_out.labels[:TEST_IMAGES])
    print(f"test accuracy: {full:.2f} % of {len(held_out.images)}, {subset:.2f} % of {TEST_IMAGES}")
    metadata = {
        "model": "resnet_fmnist",
        "accuracy_10000": f"{full:.2f}",
        "accuracy_2000": f"{subset:.2f}",
        "recipe": json.dumps(asdict(recipe)),
        "command": f"python -m models_zoo.train --data FOLDER --epochs {recipe.epochs} "
        f"--out {options.out.name} --seed {recipe.seed}",
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(options.out, dict(model.state_dict()), metadata)
    checkpoint.remove()


if __name__ == "__main__":
    main()
