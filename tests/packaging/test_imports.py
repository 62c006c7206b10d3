"""What imports what: one way, without a cycle, and nothing that people run rests on the oracle."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Layers, from those that know of nobody to those that know of all. A module may import from its own layer and those before.
LAYERS = (
    ("hicl_fast._checks",),
    ("hicl_fast.ops.common.constants",),
    ("hicl_fast.kernels", "hicl_fast.ops", "hicl_fast.pairs"),
    ("hicl_fast.functional", "hicl_fast.reference"),
    ("hicl_fast.distributed",),
    ("hicl_fast.analysis.terms",),  # what the paradigm's loss logs
    ("hicl_fast.losses",),
    ("hicl_fast.integrations", "hicl_fast.mine", "hicl_fast.evaluation", "hicl_fast.trainer", "hicl_fast.analysis"),
)


def modules() -> dict[str, Path]:
    found = {}
    for folder, name in (("hicl_fast", "hicl_fast"), ("kernels", "hicl_fast.kernels")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((name, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str, *, lazy: bool) -> set[str]:
    """The modules that a module imports; with ``lazy`` those inside its functions too."""
    tree = ast.parse(MODULES[name].read_text())
    nodes = ast.walk(tree) if lazy else _outside_functions(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    found &= MODULES.keys()
    # ``from package import module`` runs the package as well, which is no use of it.
    return {one for one in found if not any(other.startswith(f"{one}.") for other in found)} - {name}


def _outside_functions(node: ast.AST) -> list[ast.AST]:
    children = [
        child
        for child in ast.iter_child_nodes(node)
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not _is_for_types(child)
    ]
    return children + [found for child in children for found in _outside_functions(child)]


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def layer(name: str) -> int | None:
    """The number of its layer; ``None`` for commands and other modules at the top, which may import anything."""
    ranks = [
        (len(prefix), rank)
        for rank, prefixes in enumerate(LAYERS)
        for prefix in prefixes
        if name == prefix or name.startswith(f"{prefix}.")
    ]
    return max(ranks)[1] if ranks else None


def test_there_is_no_cycle() -> None:
    """Not even through imports inside functions."""
    graphlib.TopologicalSorter({name: imports(name, lazy=True) for name in MODULES}).prepare()  # raises CycleError


def test_they_point_one_way() -> None:
    wrong = [
        f"{name} imports {imported}"
        for name in MODULES
        for imported in imports(name, lazy=True)
        if (here := layer(name)) is not None and (there := layer(imported)) is not None and there > here
    ]
    assert not wrong


def test_nothing_depends_on_the_oracle() -> None:
    """But derivatives that no backend has, checks of a training run, and pictures of the equations."""

    def is_oracle(name: str) -> bool:
        return name == "hicl_fast.reference" or (name.startswith("hicl_fast.ops.") and name.endswith(".reference"))

    wrong = [
        f"{name} imports {imported}"
        for name in MODULES
        for imported in imports(name, lazy=True)
        if is_oracle(imported)
        and not is_oracle(name)
        and name != "hicl_fast"  # whose users ask for it
        and not name.endswith(".by_reference")
        and not name.startswith(("hicl_fast.trainer.", "hicl_fast.analysis."))
    ]
    assert not wrong


def test_constants_import_nothing_of_ours() -> None:
    assert imports("hicl_fast.ops.common.constants", lazy=True) == set()
