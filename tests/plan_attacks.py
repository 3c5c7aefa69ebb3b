"""Changed plans, by a schema that knows what plans are made of and at random, through every use."""

from __future__ import annotations

import copy
import json
import random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import prunus
from prunus.errors import PrunusError
from prunus.graph.plans import Plan
from tests.attacks import BUILDS, NAMES, Observer, Tally, inputs_of, outside, scramble
from tests.file_attacks import saved, with_plan
from tests.snapshots import same, snapshot

NUMBERS = (-1, 0, 1, 2, 3, 4, 5, 7, 8, 9, 64, 1 << 31, 1 << 62, 1 << 70)


class PlanAttacks:
    """Changed plans of one model: by a schema that knows what plans are made of, or at random."""

    def __init__(self, name: str, dice: random.Random) -> None:
        self.name, self.dice = name, dice
        model = BUILDS[name]()
        plan = prunus.plan(prunus.trace(model, inputs_of(name)), model, ratio=0.3)
        self.document: dict[str, Any] = json.loads(plan.to_json())
        self.modules = [path for path, _ in model.named_modules()]
        self.tensors = list(self.document["shapes"])
        self.typed = (
            *(self._keep, self._keep_elsewhere, self._shape, self._edit, self._edit, self._edit),
            *(self._value, self._scaling, self._drop, self._bias, self._group, self._cost),
            *(self._inputs, self._outputs, self._caches, self._entry, self._names, self._origin),
        )

    def draw(self) -> dict[str, Any]:
        """A plan with one to three changes."""
        document = copy.deepcopy(self.document)
        for _ in range(self.dice.choice((1, 1, 2, 3))):
            if self.dice.random() < 0.2:
                scramble(document, self.dice)
            else:
                try:
                    self.dice.choice(self.typed)(document)
                except (KeyError, IndexError, TypeError, AttributeError, ValueError):
                    scramble(document, self.dice)  # an earlier change has left nothing to change
        return document

    def _ranges(self, size: int) -> list[list[int]]:
        size = min(size, 1 << 16)  # a mutation before this one may have made it anything
        kept = sorted(self.dice.sample(range(size), self.dice.randint(1, size)))
        return [[at, at + 1] for at in kept]

    def _keep(self, document: dict[str, Any]) -> None:
        axis = self.dice.choice(list(document["keep"]))
        name, _, dim = axis.removesuffix("]").rpartition("[")
        document["keep"][axis] = self._ranges(document["shapes"][name][int(dim)])

    def _keep_elsewhere(self, document: dict[str, Any]) -> None:
        name = self.dice.choice(self.tensors)
        dim = self.dice.randrange(max(1, len(document["shapes"][name])))
        document["keep"][f"{name}[{dim}]"] = self._ranges(document["shapes"][name][dim])
        if self.dice.random() < 0.5:
            del document["keep"][self.dice.choice(list(document["keep"]))]

    def _shape(self, document: dict[str, Any]) -> None:
        shape = document["shapes"][self.dice.choice(self.tensors)]
        shape[self.dice.randrange(len(shape))] = self.dice.choice(NUMBERS)

    def _edit(self, document: dict[str, Any]) -> None:
        before, after = self.dice.choice(
            (
                (8, 5),
                (8, 8),
                (1, 1),
                ([8, 8], [5, 8]),
                (True, False),
                (["x", "y", "x"], ["x", "x"]),
                (2, 1),
                (30, 10),
            )
        )
        document["edits"].append(
            {
                "module": self.dice.choice(self.modules),
                "attribute": self.dice.choice(NAMES),
                "before": before,
                "after": after,
            }
        )

    def _value(self, document: dict[str, Any]) -> None:
        edit = self.dice.choice(document["edits"])
        if self.dice.random() < 0.3:
            edit["module"] = self.dice.choice(self.modules)
        elif self.dice.random() < 0.5:
            edit["attribute"] = self.dice.choice(NAMES)
        else:
            edit[self.dice.choice(("before", "after"))] = self.dice.choice(NUMBERS)

    def _scaling(self, document: dict[str, Any]) -> None:
        name = self.dice.choice(self.tensors)
        dim = self.dice.randrange(len(document["shapes"][name]))
        factor = self.dice.choice((0.5, 2.0, 1e30, 1e-30, 1e308, 0.0, -1.0))
        positions = self._ranges(document["shapes"][name][dim])
        document["scalings"].append(
            {"tensor": name, "dim": dim, "positions": positions, "factor": factor}
        )

    def _drop(self, document: dict[str, Any]) -> None:
        document["drops"] = self.dice.sample(self.modules, min(2, len(self.modules)))[
            : self.dice.randint(1, 2)
        ]

    def _bias(self, document: dict[str, Any]) -> None:
        weight = self.dice.choice([name for name in self.tensors if name.endswith("weight")])
        name, dim = weight.removesuffix("weight") + "bias", self.dice.randrange(2)
        document["biases"] = {name: dim}
        document["shapes"][name] = [document["shapes"][weight][dim]]

    def _group(self, document: dict[str, Any]) -> None:
        group = self.dice.choice(document["groups"])
        group["name"] = self.dice.choice((*self.tensors, "x[0]", "[", "a[9999999999999999999]"))
        group["size"] = self.dice.choice(NUMBERS[2:10])

    def _cost(self, document: dict[str, Any]) -> None:
        costs = document["costs"]
        costs[self.dice.choice(list(costs))] = [
            self.dice.choice(NUMBERS),
            self.dice.choice(NUMBERS),
        ]

    def _inputs(self, document: dict[str, Any]) -> None:
        traced = document["origin"]["traced"]
        tensor = {
            "tensor": [
                self.dice.choice((0, 1, 2, 5, 6, 8, 10**9)) for _ in range(self.dice.randint(0, 4))
            ],
            "dtype": self.dice.choice(
                ("float32", "int64", "bool", "float64", "complex64", "uint16", "nn", "Tensor")
            ),
        }
        if self.dice.random() < 0.3:
            tensor |= {"low": self.dice.choice(NUMBERS), "high": self.dice.choice(NUMBERS)}
        args: Any = self.dice.choice(
            (
                [tensor],
                [tensor, tensor],
                [3],
                [None],
                ["written"],
                [[tensor]],
                [{"dict": {"x": tensor}}],
                [True, 1.5],
                [],
            )
        )
        traced["inputs"] = {
            "args": args,
            "kwargs": self.dice.choice(({}, {}, {"x": tensor}, {"path": "w"})),
        }

    def _outputs(self, document: dict[str, Any]) -> None:
        document["origin"]["traced"]["outputs"] = self.dice.choice(
            ({}, {"output": [5, 4]}, {"output": []}, {"x": [1]}, {"output": [1 << 70]})
        )

    def _caches(self, document: dict[str, Any]) -> None:
        path = self.dice.choice(self.modules)
        document["origin"]["traced"]["caches"] = [f"{path}:{self.dice.choice(NAMES)}"]

    def _entry(self, document: dict[str, Any]) -> None:
        method = self.dice.choice(
            ("export", "load_state_dict", "half", "__setattr__", "requires_grad_", "forward")
        )
        document["origin"]["traced"]["forward_fn"] = self.dice.choice(
            ({"method": method}, {"function": method})
        )

    def _names(self, document: dict[str, Any]) -> None:
        field_ = self.dice.choice(("written", "unread", "released"))
        document["origin"]["traced"][field_] = self.dice.sample(self.tensors, 2)

    def _origin(self, document: dict[str, Any]) -> None:
        origin = document["origin"]
        document["origin"] = self.dice.choice(
            (
                {},
                {"steps": [origin, origin]},
                {"steps": [origin, {}]},
                {"steps": []},
                {"traced": {}},
            )
        )


def attack_with_plans(
    count: int, observer: Observer, seed: int = 0, attacks: Sequence[PlanAttacks] = ()
) -> Tally:
    """Changed plans, of all models in turn by default, through apply, verify, mask and load."""
    tally, dice = Tally(), random.Random(seed)
    attacks = attacks or [PlanAttacks(name, dice) for name in BUILDS]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        files = {name: saved(name, Path(folder)) for name in BUILDS}
        before = outside()
        for n in range(count):
            attack = attacks[n % len(attacks)]
            document = attack.draw()
            problem = _try_plan(attack.name, document, files[attack.name], folder, observer, tally)
            after = outside()
            if not problem and not same(before, after):
                problem = f"changed outside: {[k for k in before if not same(before[k], after[k])]}"
            before = after
            tally.add(problem, f"{attack.name} {_difference(attack.document, document)}")
    return tally


def _try_plan(
    name: str, document: dict[str, Any], file: bytes, folder: str, observer: Observer, tally: Tally
) -> str:
    """What went wrong; empty where nothing did."""
    text, x = json.dumps(document), inputs_of(name)
    path = Path(folder, "attack.safetensors")
    path.write_bytes(with_plan(file, text))
    uses: dict[str, Callable[[Plan, nn.Module], Any]] = {
        "apply": lambda plan, model: prunus.apply(plan, model),
        "verify": lambda plan, model: prunus.verify(plan, model),
        "mask": lambda plan, model: _masked(plan, model, x),
        "load": lambda plan, model: prunus.load(path, build=BUILDS[name]),
    }
    try:
        with observer.watching():
            plan = Plan.from_json(text)
        tally.notes["valid by the schema"] += 1
    except PrunusError:
        uses, plan = {"load": uses["load"]}, None
    except Exception as error:
        return f"from_json: {type(error).__name__}: {error}"
    for use, run in uses.items():
        model = BUILDS[name]()
        before, drawn = snapshot(model), torch.get_rng_state()
        refused = False
        try:
            with observer.watching():
                run(plan, model)  # type: ignore[arg-type]
        except PrunusError:
            refused = True
        except Exception as error:
            return f"{use}: {type(error).__name__}: {error}"
        tally.notes[f"{use} {'refused' if refused else 'done'}"] += 1
        if (refused or use != "apply") and not same(before, snapshot(model)):
            return f"{use}: the model was changed"
        if use != "load" and not torch.equal(drawn, torch.get_rng_state()):
            return f"{use}: random numbers were drawn"
        if observer.seen:
            return f"{use}: {observer.seen.pop()}"
    return ""


def _masked(plan: Plan, model: nn.Module, x: Tensor) -> None:
    with prunus.mask(plan, model):
        model(x)


def _difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return json.dumps({key: after.get(key) for key in keys})
