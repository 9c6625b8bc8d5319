"""The house: no file imports from a higher floor, no folders import each other in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lowest first; rooms of one floor may import each other, but not in a circle.
FLOORS = (
    ("config", "config_keys", "errors", "durable", "blas", "precision", "submission", "user_files"),
    ("formats",),
    ("custom_kernels",),
    ("state", "weights"),
    ("text", "chat"),
    ("model",),
    ("store",),
    ("convert",),
    ("engine", "imatrix"),
    ("evaluation", "bench", "research"),
    ("server",),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FOLDERS = {
    "ds4mlx": ROOT / "ds4mlx",
    "ds4mlx.convert": ROOT / "convert",
    "ds4mlx.custom_kernels": ROOT / "custom_kernels",
}


def files() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if package != "ds4mlx" or parts[0] not in ("convert", "custom_kernels"):
                found[".".join((package, *parts))] = path
    return found


FILES = files()


def room(module: str) -> str:
    """The room a dotted name lies in; "" for the package itself, which only hands names out."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOOR else ""


def imports(path: Path) -> Iterator[str]:
    """What a file imports of this project, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "ds4mlx":
                yield from (f"ds4mlx.{alias.name}" for alias in node.names)
            elif node.module and node.module.startswith("ds4mlx."):
                whole = (f"{node.module}.{alias.name}" for alias in node.names)
                yield from (name if name in FILES else node.module for name in whole)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] == "ds4mlx")


def arrows() -> set[tuple[str, str]]:
    """(room, room it imports from), for every import between rooms."""
    pairs = {(room(module), room(name)) for module, path in FILES.items() for name in imports(path)}
    return {(a, b) for a, b in pairs if a and b and a != b}


def test_every_file_has_a_floor():
    outside = {"ds4mlx.__init__", "ds4mlx.__main__"}
    assert [m for m in FILES if m not in outside and not room(m)] == []


@pytest.mark.parametrize("module", [m for m in FILES if room(m)])
def test_no_file_imports_from_a_higher_floor(module: str):
    here = FLOOR[room(module)]
    higher = [name for name in imports(FILES[module]) if room(name) and FLOOR[room(name)] > here]
    assert higher == []
    # Public names of the package are for its users; inside, a name comes from its own room.
    public = [n for n in imports(FILES[module]) if n.count(".") == 1 and not room(n)]
    assert set(public) <= {"ds4mlx.__version__"}


def test_the_store_needs_no_model():
    """A kind is enough, so that states can be kept where no weights are."""
    assert ("store", "model") not in arrows()


def test_rooms_have_no_circle():
    left = arrows()
    while left:
        sources = {a for a, _ in left}
        leaves = {b for _, b in left} - sources
        assert leaves, f"rooms import each other in a circle: {sorted(left)}"
        left = {(a, b) for a, b in left if b not in leaves}


def test_files_of_a_room_have_no_circle():
    graph = {m: {n for n in imports(p) if n in FILES and n != m} for m, p in FILES.items()}
    left = {m: set(found) for m, found in graph.items()}
    while left:
        free = [m for m, found in left.items() if not found & left.keys()]
        assert free, f"files import each other in a circle: {sorted(left)}"
        for m in free:
            del left[m]
