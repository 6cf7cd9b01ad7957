"""Who may import whom, read from the source."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mechdiff"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 350

LEAVES = {"config", "errors", "files", "results"}
ALL = {
    p.stem if p.is_file() else p.name
    for p in PACKAGE.iterdir()
    if p.suffix == ".py" or (p / "__init__.py").exists()
}
MAY_IMPORT = {
    "__init__": ALL - {"__main__", "cli", "commands"},  # imported when first used
    "__main__": {"commands"},
    "commands": ALL,
    "cli": ALL - {"commands", "__main__"},
    "parser": {"pairs.spec"},  # how a command line is read
    "checkpoints": {"data.store", "interventions.sites"},  # what a checkpoint says of itself
    "prepare": {"pairs", "data", "extraction", "interventions.sites"},  # what a run needs before it is built
    "costs": {"prepare", "pairs", "data", "extraction", "interventions"},  # what a run would cost
    "rehearsal": {"prepare", "pairs", "data.prompts", "interventions.sites"},  # what is wrong with it
    "study": {"prepare", "parser", "pairs.spec", "reporting.report"},  # what a study consists of
    "contrasts": {"functional", "reporting.report"},  # numbers that compare its pairs
    "calibration": ALL - {"cli", "__main__"},  # tries everything out
    "callbacks": {"modules.base", "interventions", "pairs", "data", "functional"},
    "extraction": {"interventions", "pairs", "data", "functional"},
    "modules": {"functional", "interventions.sites"},
    "reporting": {"data.store"},
    "data": {"functional", "interventions.sites"},
    "pairs": {"interventions", "functional"},
    "interventions": {"functional"},
    "handles": {"functional", "interventions"},  # what a handle needs once it has left its pair
    "lm_eval": {"handles", "pairs", "study"},  # a model of a pair in a harness that knows no pairs
    "functional": set(),
    "provenance": {"pairs"},  # what a run says of its models
    "config": set(),
    "errors": set(),
    "files": set(),
    "results": set(),
}
"""A room, or one module of a room; besides these a room may import itself and the leaves."""
FOREIGN = {
    "functional": {"torch"},
    "interventions": {"torch", "transformers"},
    "handles": {"torch", "transformers", "safetensors", "xxhash", "gguf"},
    "reporting": {"jinja2", "matplotlib", "numpy", "pyarrow", "rich", "torch", "tensorboard", "lightning"},
}
"""Libraries a room may import beside the standard one; rooms not named here are free but for FORBIDDEN."""
FORBIDDEN = {"modules": {"transformers", "peft", "datasets", "h5py"}, "data": {"transformers", "peft"}}


def imports(tree: ast.AST, module: str) -> Iterator[str]:
    """Absolute names of all imports, also those inside functions; not those under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from imports(ast.Module(node.orelse, []), module)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [base])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node, module)


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(module: str) -> str:
    return module.split(".")[1]


def allowed(module: str, target: str) -> bool:
    """Whether ``mechdiff.a.b`` may import ``mechdiff.c.d.name``."""
    room, inner = room_of(module), target.removeprefix("mechdiff").removeprefix(".")
    if inner in ("", "__version__") or inner.split(".")[0] in LEAVES | {room}:
        return True
    return any(inner == gate or inner.startswith(f"{gate}.") for gate in MAY_IMPORT[room])


def is_ours(target: str) -> bool:
    return target.split(".")[0] == "mechdiff"


def test_every_room_is_in_the_table() -> None:
    assert set(MAY_IMPORT) >= ALL


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_only_what_the_table_allows(path: Path) -> None:
    module = name_of(path)
    found = set(imports(ast.parse(path.read_text(encoding="utf-8")), module))
    wrong = {target for target in found if is_ours(target) and not allowed(module, target)}
    room = room_of(module)
    foreign = {t.split(".")[0] for t in found if not is_ours(t)} - set(sys.stdlib_module_names)
    if room in FOREIGN:
        wrong |= foreign - FOREIGN[room]
    if room in LEAVES:
        wrong |= foreign
    wrong |= foreign & FORBIDDEN.get(room, set())
    assert not wrong, f"{module} must not import {sorted(wrong)}"


@pytest.mark.parametrize(
    ("module", "target", "verdict"),
    [
        ("mechdiff.modules.clt", "mechdiff.interventions.sites.Site", True),
        ("mechdiff.modules.clt", "mechdiff.interventions.hooks.record", False),
        ("mechdiff.modules.clt", "mechdiff.modules.base.DiffModule", True),
        ("mechdiff.functional.clt", "mechdiff.errors.FitError", True),
        ("mechdiff.functional.clt", "mechdiff.data.prompts.Prompt", False),
        ("mechdiff.callbacks.patching", "mechdiff.modules.clt.CLTMap", False),
        ("mechdiff.callbacks.patching", "mechdiff.modules.base.DiffModule", True),
        ("mechdiff.reporting.plotting", "mechdiff.data.store.ActivationStore", True),
        ("mechdiff.reporting.plotting", "mechdiff.data.stores.ActivationStore", False),
        ("mechdiff.cli", "mechdiff.commands.extract", False),
        ("mechdiff.results", "mechdiff.config.SEED", True),
    ],
)
def test_the_rule_itself(module: str, target: str, verdict: bool) -> None:
    assert allowed(module, target) is verdict


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import exempt
else:
    import otherwise
def lazy():
    from .sibling import thing
    with open("x"):
        import torch.nn
from ..data import store
"""
    found = set(imports(ast.parse(source), "mechdiff.modules.clt"))
    assert found == {
        "typing.TYPE_CHECKING",
        "otherwise",
        "mechdiff.modules.sibling.thing",
        "torch.nn",
        "mechdiff.data.store",
    }


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    "path", [p for p in FILES if name_of(p) != "mechdiff.interventions.hooks"], ids=name_of
)
def test_hooks_are_registered_in_one_place(path: Path) -> None:
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Attribute)]
    assert not [
        c.attr
        for c in calls
        if c.attr.startswith("register_") and c.attr.endswith("_hook") and "forward" in c.attr
    ]


@pytest.mark.parametrize("module", ["", ".config", ".errors", ".results", ".pairs.spec"])
def test_light_modules_do_not_load_torch(module: str) -> None:
    heavy = ["torch", "transformers", "lightning", "h5py", "matplotlib", "datasets"]
    code = f"import sys, mechdiff{module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
