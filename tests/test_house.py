"""The house: which file may import which, read from the imports themselves, those inside functions included."""

from __future__ import annotations

import ast
import sys
from collections.abc import Set
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = (
    {"reference", "images", "config", "categories", "boxes", "files", "resampling", "visualize"},
    {"kernels"},
    {"ops"},
    {"detr", "preprocess"},
    {"postprocess", "checkpoint", "data"},
    {"predictor", "compat", "position"},
    {"explanation", "evaluation", "training", "labeling"},
    {"", "__main__", "cli"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
TORCH_FREE = {"images", "files", "resampling", "config", "categories", "visualize"}

# Of each file of the package; our names are without "detr_fast.", the package's own is "".
Imports = dict[str, set[str]]
Edge = tuple[str, str]  # a file and one that it imports

EXCEPTIONS: set[Edge] = set()  # imports that the rules do not allow yet


def read_imports(root: Path) -> Imports:
    files = {".".join(path.relative_to(root).with_suffix("").parts): path for path in root.glob("detr_fast/**/*.py")}
    files |= {f"detr_fast.kernels.{path.stem}": path for path in root.glob("kernels/*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    return {own(name): imports_of(ast.parse(path.read_text()), files.keys()) for name, path in files.items()}


def imports_of(tree: ast.Module, files: Set[str]) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            found = {f"{node.module}.{alias.name}" for alias in node.names}
            found.discard("detr_fast.__version__")  # a constant, there before any other file is imported
            names |= {name if name in files else str(node.module) for name in found}
    return {own(name) if name in files else name.split(".")[0] for name in names}


def own(name: str) -> str:
    return name.removeprefix("detr_fast").removeprefix(".")


def room(file: str) -> str:
    return file.split(".")[0]


def goes_wrong(edge: Edge) -> bool:
    """Upwards, or to a neighbour; the files of the ground floor, and those of the top, are one room."""
    here, there = map(room, edge)
    neighbours = here != there and 0 < FLOOR[here] < len(FLOORS) - 1
    return FLOOR[here] < FLOOR[there] or (FLOOR[here] == FLOOR[there] and neighbours)


def reachable(imports: Imports, file: str) -> set[str]:
    """All names that a file imports, directly or not."""
    seen: set[str] = set()
    waiting = [file]
    while waiting:
        new = imports.get(waiting.pop(), set()) - seen
        seen |= new
        waiting += new
    return seen


def check_floors(imports: Imports, exceptions: set[Edge]) -> None:
    assert not {file for file in imports if room(file) not in FLOOR}, "files on no floor"
    edges = {(file, name) for file, names in imports.items() for name in names & imports.keys()}
    wrong = {edge for edge in edges if goes_wrong(edge)}
    assert not wrong - exceptions, "imports upwards or from a neighbour"
    allowed = {file: {name for name in names if (file, name) not in exceptions} for file, names in imports.items()}
    assert not [file for file in imports if file in reachable(allowed, file)], "files in a circle"
    in_circles = {(file, name) for file, name in edges if file in reachable(imports, name)}
    assert not exceptions - wrong - in_circles, "exceptions that nothing needs"


def check_torch_free(imports: Imports) -> None:
    light = {*sys.stdlib_module_names, "numpy", "PIL", *imports}
    heavy = {(file, name) for file in imports if room(file) in TORCH_FREE for name in reachable(imports, file) - light}
    assert not heavy, "more than numpy and Pillow"


def test_imports_go_down_and_never_in_a_circle() -> None:
    check_floors(read_imports(ROOT), EXCEPTIONS)


def test_the_torch_free_rooms() -> None:
    check_torch_free(read_imports(ROOT))


@pytest.mark.parametrize(
    ("fault", "files"),
    [
        ("no floor", {"attic": ""}),
        ("upwards", {"boxes": "def f():\n    import detr_fast.ops", "ops": ""}),
        ("neighbour", {"training": "", "evaluation": "if TYPE_CHECKING:\n    from detr_fast import training"}),
        ("circle", {"detr/a": "import detr_fast.detr.b", "detr/b": "from detr_fast.detr.a import x"}),
        ("nothing needs", {"data": "from detr_fast.boxes import x", "boxes": ""}),
        ("more than numpy", {"images/a": "from detr_fast.boxes import x", "boxes": "import torch"}),
    ],
)
def test_each_fault_is_found(fault: str, files: dict[str, str], tmp_path: Path) -> None:
    for name, text in files.items():
        path = tmp_path / "detr_fast" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with pytest.raises(AssertionError, match=fault):
        check_floors(read_imports(tmp_path), {("data", "boxes")} if fault == "nothing needs" else set())
        check_torch_free(read_imports(tmp_path))
