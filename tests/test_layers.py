"""The house stands as drawn: layers, rooms, names and public API, proven by reading imports.

A module imports only from lower layers or from its own room. Imports inside functions and under
``TYPE_CHECKING`` count like any other. Every check is shown to fail on a planted violation.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import networkx as nx
import pytest
from radon.raw import analyze

ROOT = Path(__file__).parents[1]

# Lowest level first.  A folder inside a package may be a room of its own, as ``planner.search``.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("errors", "files"),
    ("graph",),
    ("tracer",),
    ("surgeon", "calibration", "structures"),
    ("importance", "recovery", "verifier", "checkpoint"),
    ("planner",),
    ("planner.search", "training", "integrations"),
    ("report", "api", "__init__"),
    ("cli", "__main__"),
)
LEVEL_OF = {name: n for n, names in enumerate(LEVELS) for name in names}

LOOSE = {"__init__", "__main__", "api", "errors", "files"}
"""The files at the top of the package."""

PUBLIC_PACKAGES = {
    "api", "errors", "graph", "importance", "integrations", "planner", "recovery",
    "report", "structures", "training", "verifier",
}  # fmt: skip
"""What a user may import beside the names of the package itself."""

WITHIN = {
    ("files", "errors"),
    ("__init__", "api"),
    ("__init__", "report"),
    ("__main__", "cli"),
    ("integrations", "training"),
}
"""Who may import whom on its own level: the ground, the public names, the command's entry, and
the adapters of training frameworks."""

CODE_LINES = {
    ".": 550,
    "calibration": 1220,
    "checkpoint": 400,
    "cli": 1720,
    "graph": 1740,
    "importance": 735,
    "integrations": 960,
    "planner": 3935,
    "recovery": 1970,
    "report": 500,
    "structures": 460,
    "surgeon": 2300,
    "tracer": 6540,
    "training": 640,
    "verifier": 2330,
}
"""Caps of code lines (no docstrings, comments, blank lines) by package, ``.`` for loose files.

Lower a cap in the commit that deletes code; raising one is a decision to be explained in a commit.
"""

NO_FILE_IS_CALLED = {"utils", "util", "common", "helpers", "types", "base", "misc"}
CORE_PACKAGES = {"torch", "networkx", "numpy", "scipy", "safetensors", "rich", "msgspec"}
GUESTS = ("models_zoo", "benchmarks")  # import only the public API


@dataclass(frozen=True)
class Import:
    """One imported module, with where it is written."""

    target: str
    line: int
    functions: tuple[str, ...] = ()  # enclosing classes and functions, outermost first
    lazy: bool = False  # inside a function
    typing_only: bool = False  # under ``if TYPE_CHECKING``


def modules_in(folder: Path) -> dict[str, Path]:
    """Dotted names of the modules under a package folder; a package is named like its folder."""
    names = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imports_of(module: str, path: Path, known: set[str]) -> Iterator[Import]:
    """Every import in a file, relative ones resolved, ``from a import b`` to the module it is."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def targets(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*parents, *filter(None, [source])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in known else source
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            name = node.args[0].value
            if called in {"import_module", "__import__"} and isinstance(name, str):
                yield name if not name.startswith(".") else package + name

    def visit(node: ast.AST, scope: tuple[str, ...], lazy: bool, typing: bool) -> Iterator[Import]:
        for target in targets(node):
            yield Import(target, getattr(node, "lineno", 0), scope, lazy, typing)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            scope = (*scope, node.name)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.iter_child_nodes(node):
            inside = typing or (guarded and isinstance(node, ast.If) and child in node.body)
            yield from visit(child, scope, lazy, inside)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), (), False, False)


def place(module: str) -> str:
    """The name under which a module of ``prunus`` stands in the table of levels."""
    parts = module.split(".")[1:3]
    if ".".join(parts) in LEVEL_OF:
        return ".".join(parts)
    return parts[0] if parts else "__init__"


def layer_violations(root: Path) -> Iterator[str]:
    """Imports from a level above, or from another package of the same level."""
    modules = modules_in(root / "src" / "prunus")
    for module, path in modules.items():
        name = place(module)
        if name not in LEVEL_OF:
            yield f"{module} has no level: give '{name}' a place in LEVELS"
            continue
        for item in imports_of(module, path, set(modules)):
            if item.target.partition(".")[0] != "prunus":
                continue
            other = place(item.target)
            # A public name taken from the package itself, ``from prunus import shrink``.
            level = LEVEL_OF.get(other, LEVEL_OF["__init__"])
            if name != other and level >= LEVEL_OF[name] and (name, other) not in WITHIN:
                yield (
                    f"{module}:{item.line} (level {LEVEL_OF[name]}) imports "
                    f"{item.target} (level {level})"
                )


def loose_violations(root: Path) -> Iterator[str]:
    """Files at the top of the package beside those that stand there for a reason."""
    for path in sorted((root / "src" / "prunus").glob("*.py")):
        if path.stem not in LOOSE:
            yield f"{path.name} stands alone: it belongs into a package"


def code_lines(folder: Path) -> dict[str, int]:
    """Lines of code by package; files at the top of the folder are counted together, as ``.``."""
    counted: dict[str, int] = {}
    for path in sorted(folder.rglob("*.py")):
        package = path.relative_to(folder).parts[0] if path.parent != folder else "."
        lines = analyze(path.read_text(encoding="utf-8")).sloc
        counted[package] = counted.get(package, 0) + lines
    return counted


def size_violations(root: Path) -> Iterator[str]:
    """Packages that have outgrown their cap."""
    for package, lines in code_lines(root / "src" / "prunus").items():
        if lines > CODE_LINES.get(package, 0):
            yield f"{package} has {lines} code lines, and its cap is {CODE_LINES.get(package, 0)}"


def cycle_violations(root: Path) -> Iterator[str]:
    """Modules that import one another in a ring."""
    modules = modules_in(root / "src" / "prunus")
    graph = nx.DiGraph()
    for module, path in modules.items():
        for item in imports_of(module, path, set(modules)):
            if item.target in modules:
                graph.add_edge(module, item.target)
    for ring in nx.strongly_connected_components(graph):
        if len(ring) > 1 or any(graph.has_edge(module, module) for module in ring):
            yield f"import cycle: {', '.join(sorted(ring))}"


def name_violations(root: Path) -> Iterator[str]:
    """Files and folders named after nothing in particular."""
    for folder in ("src/prunus", *GUESTS):
        for path in sorted((root / folder).rglob("*.py")):
            for part in path.relative_to(root).with_suffix("").parts:
                if part in NO_FILE_IS_CALLED:
                    yield f"{path.relative_to(root)}: '{part}' says nothing; name the idea"


def outside_violations(root: Path) -> Iterator[str]:
    """Optional packages imported when the module is, and the project's own outer folders."""
    modules = modules_in(root / "src" / "prunus")
    for module, path in modules.items():
        for item in imports_of(module, path, set(modules)):
            package = item.target.partition(".")[0]
            if package in {"benchmarks", "tests"}:
                yield f"{module}:{item.line} imports {package}"
            elif (
                package not in CORE_PACKAGES | {"prunus", *sys.stdlib_module_names}
                and not item.lazy
                and not item.typing_only
            ):
                yield f"{module}:{item.line} imports {package} outside a function"


def api_violations(root: Path) -> Iterator[str]:
    """What models_zoo and benchmarks take from Prunus beside its public names and packages."""
    init = root / "src" / "prunus" / "__init__.py"
    public = {*public_names(init), "__all__", "__version__"} if init.exists() else set()
    for folder in GUESTS:
        for path in sorted((root / folder).rglob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for line, name in names_taken(tree):
                if name.partition(".")[0] not in public | PUBLIC_PACKAGES:
                    yield f"{path.relative_to(root)}:{line} takes {name}, not in prunus.__all__"


def public_names(init: Path) -> list[str]:
    """``__all__`` as written, which has to be a plain list of strings."""
    for node in ast.parse(init.read_text(encoding="utf-8")).body:
        target = node.target if isinstance(node, ast.AnnAssign) else None
        target = node.targets[0] if isinstance(node, ast.Assign) else target
        if isinstance(target, ast.Name) and target.id == "__all__":
            assert isinstance(node, ast.Assign | ast.AnnAssign)
            assert node.value is not None
            return list(ast.literal_eval(node.value))
    return []


def names_taken(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of all that is taken from ``prunus``: by import, and as attributes of it."""
    aliases = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package, _, rest = alias.name.partition(".")
                if package == "prunus" and rest:
                    yield node.lineno, alias.name
                elif package == "prunus":
                    aliases.add(alias.asname or "prunus")
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            package, _, rest = node.module.partition(".")
            if package == "prunus":
                yield from ((node.lineno, rest or alias.name) for alias in node.names)
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in aliases
        ):
            yield node.lineno, node.attr


CHECKS = [
    layer_violations,
    loose_violations,
    size_violations,
    cycle_violations,
    name_violations,
    outside_violations,
    api_violations,
]


@pytest.mark.parametrize("check", CHECKS)
def test_house(check) -> None:
    assert list(check(ROOT)) == []


def test_house_is_not_empty() -> None:
    modules = modules_in(ROOT / "src" / "prunus")
    assert {"prunus", "prunus.errors", "prunus.graph", "prunus.tracer"} <= set(modules)
    assert list(imports_of("prunus.errors", modules["prunus.errors"], set(modules)))
    assert all(any((ROOT / guest).rglob("*.py")) for guest in GUESTS)


INIT = {"src/prunus/__init__.py": '__all__ = ["trace"]\n'}

# Each breaks one rule in one line; the text is what the check has to say about it.
PLANTED = [
    (
        {"graph/axis.py": "import prunus.tracer"},
        layer_violations,
        r"graph\.axis:1 \(level 1\) imports prunus\.tracer \(level 2\)",
    ),
    ({"graph/axis.py": "from prunus import tracer"}, layer_violations, "imports prunus"),
    ({"graph/axis.py": "from prunus import trace"}, layer_violations, r"prunus \(level 7\)"),
    ({"graph/axis.py": "from ..tracer.labels import L"}, layer_violations, "tracer.labels"),
    ({"graph/__init__.py": "from .. import tracer"}, layer_violations, "graph:1"),
    ({"graph/axis.py": "def f():\n    import prunus.checkpoint"}, layer_violations, "graph.axis:2"),
    (
        {"graph/axis.py": "if TYPE_CHECKING:\n    from prunus.checkpoint import save"},
        layer_violations,
        "graph.axis:2",
    ),
    ({"graph/axis.py": "import_module('prunus.cli')"}, layer_violations, "prunus.cli"),
    ({"graph/plans.py": "import prunus.surgeon"}, layer_violations, "level 1.*level 3"),
    ({"recovery/cost.py": "import prunus.verifier.case"}, layer_violations, "level 4.*level 4"),
    ({"planner/cost.py": "import prunus.planner.search"}, layer_violations, "level 5.*level 6"),
    ({"errors.py": "import prunus.files"}, layer_violations, "level 0.*level 0"),
    ({"errors.py": "import prunus.graph"}, layer_violations, "level 0.*level 1"),
    ({"__init__.py": "import prunus.cli"}, layer_violations, r"prunus:1 \(level 7\)"),
    ({"attic/old.py": ""}, layer_violations, "'attic' a place"),
    ({"old.py": "a = 1\n" * (CODE_LINES["."] + 1)}, size_violations, r"\. has \d+ code lines"),
    ({"attic/old.py": "a = 1"}, size_violations, "attic has 1 code lines, and its cap is 0"),
    ({"old.py": ""}, loose_violations, "old.py.*belongs into a package"),
    (
        {"graph/a.py": "import prunus.graph.b", "graph/b.py": "from . import a"},
        cycle_violations,
        "prunus.graph.a, prunus.graph.b",
    ),
    (
        {"graph/__init__.py": "from .a import A", "graph/a.py": "from prunus.graph import B"},
        cycle_violations,
        "prunus.graph, prunus.graph.a",
    ),
    (
        {"graph/a.py": "def f():\n    import prunus.graph.b", "graph/b.py": "from .a import A"},
        cycle_violations,
        "prunus.graph.a, prunus.graph.b",
    ),
    *(
        ({f"graph/{name}.py": ""}, name_violations, f"'{name}' says nothing")
        for name in ("utils", "common", "helpers", "types", "base", "misc")
    ),
    ({"utils/axis.py": ""}, name_violations, "'utils' says nothing"),
    ({"checkpoint/save.py": "import timm"}, outside_violations, "timm outside a function"),
    ({"checkpoint/save.py": "from timm.models import x"}, outside_violations, "timm outside"),
    ({"checkpoint/save.py": "try:\n    import timm\nfinally: ..."}, outside_violations, "timm"),
    ({"cli/a.py": "import models_zoo"}, outside_violations, "models_zoo outside a function"),
    ({"cli/a.py": "def f():\n    import benchmarks.demo"}, outside_violations, "benchmarks"),
    *(
        ({f"../../{guest}/x.py": code}, api_violations, rf"{guest}.x.py:\d takes {name},")
        for guest in GUESTS
        for code, name in [
            ("import prunus.tracer", "prunus.tracer"),
            ("from prunus import surgeon", "surgeon"),
            ("from prunus.surgeon import cut", "surgeon"),
            ("import prunus\nprunus.tracer.run()", "tracer"),
            ("def f():\n    import prunus as p\n    p.secret()", "secret"),
        ]
    ),
]

ALLOWED = [
    {"graph/a.py": '"""Long.\n' + "\n" * CODE_LINES["graph"] + '"""\n' + "# b\n" * 9000},
    {"planner/search/a.py": "import prunus.planner.cost", "files.py": "import prunus.errors"},
    {"graph/a.py": "from prunus.graph.b import B", "graph/b.py": "import prunus.errors"},
    {"graph/__init__.py": "from prunus.graph.a import A", "graph/a.py": ""},
    {"tracer/rules/view.py": "from ..labels import L\nfrom prunus.graph import Axis\nimport torch"},
    {"integrations/timm.py": "def f():\n    import timm\n    import models_zoo"},
    {"verifier/a.py": "import prunus.tracer\nif TYPE_CHECKING:\n    import timm"},
    {"cli/shrink.py": "import prunus\nfrom prunus import trace\nimport prunus.report, argparse"},
    {"../../models_zoo/a.py": "from prunus import trace\nimport prunus as p, timm\np.trace()"},
    {"../../benchmarks/b.py": "import models_zoo.a\nfrom . import prunus_notes\nx.tracer.y"},
]


def build(root: Path, files: dict[str, str]) -> Path:
    """Write a small tree with an ``__init__`` that makes ``trace`` public."""
    planted = {f"src/prunus/{name}": text for name, text in files.items()}
    for name, text in (INIT | planted).items():
        path = (root / name).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(("files", "check", "text"), PLANTED)
def test_planted_violation_is_found(tmp_path, files, check, text) -> None:
    assert re.search(text, "\n".join(check(build(tmp_path, files))))


@pytest.mark.parametrize("files", ALLOWED)
def test_what_is_allowed_passes(tmp_path, files) -> None:
    root = build(tmp_path, files)
    assert [violation for check in CHECKS for violation in check(root)] == []
