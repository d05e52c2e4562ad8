"""The house itself: who may use and import what, and that every name leads somewhere."""

from __future__ import annotations

import ast
import pkgutil
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import miner_lens as ml

ROOT = Path(__file__).resolve().parents[1]
PYTHON_FOLDERS = ("miner_lens", "adapters", "benchmarks", "examples", "tests")
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("miner_lens/organisms/*/README.md"),
]

# Hugging Face's own name for a setting that it has no public name to restore by.
# And what IPython asks an object for.
FOREIGN = {"_attn_implementation", "_repr_html_", "_repr_png_", "_version"}
# Hooks are tried there with tensors that pretend to be on a GPU, where no whole pass could run.
OPENED = {"tests/analyzers/test_devices.py"}
# What a user would write, and so may use the package as a user does.
FRONT_DOORS = ("miner_lens.cli", "miner_lens.training")

Sources = dict[str, ast.Module]  # by path from the root


def sources(*folders: str) -> Sources:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in paths}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


def is_own(attribute: ast.Attribute) -> bool:
    return isinstance(attribute.value, ast.Name) and attribute.value.id in ("self", "cls")


def definitions(tree: ast.Module) -> set[str]:
    """Private names that a file makes: functions, classes, variables, and what `self` is given."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.Attribute(ctx=ast.Store()) if is_own(node):
                names.add(node.attr)
    return {name for name in names if is_private(name)}


def uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Lines and private names of modules and objects, wherever they were made."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom():
                for alias in node.names:
                    if is_private(alias.name):
                        yield node.lineno, alias.name
            case ast.Attribute() if is_private(node.attr):
                yield node.lineno, node.attr
            case ast.Call(
                func=ast.Name(id="getattr" | "setattr" | "hasattr"),
                args=[_, ast.Constant(value=str(name)), *_],
            ) if is_private(name):
                yield node.lineno, name


def private_names_used_elsewhere(trees: Sources) -> list[str]:
    made = {path: definitions(tree) for path, tree in trees.items()}
    found = []
    for path, tree in trees.items():
        elsewhere = set().union(*(names for other, names in made.items() if other != path))
        for line, name in uses(tree):
            if name in elsewhere - made[path] - FOREIGN:
                found.append(f"{path}:{line}: {name}")
    return found


def private_names_hung_on_others(trees: Sources) -> list[str]:
    return [
        f"{path}:{node.lineno}: {ast.unparse(node)}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        if is_private(node.attr) and node.attr not in FOREIGN and not is_own(node)
    ]


def test_private_names_stay_in_their_file() -> None:
    trees = sources(*PYTHON_FOLDERS)
    for path in OPENED:
        del trees[path]
    assert not private_names_used_elsewhere(trees)


def test_nothing_private_is_hung_on_foreign_objects() -> None:
    assert not private_names_hung_on_others(sources("miner_lens", "adapters"))


@pytest.mark.parametrize(
    "use", ["from home import _a", "home._a()", "Home()._b", "getattr(x, '_c')", "self._c"]
)
def test_a_private_name_used_elsewhere_is_found(use: str) -> None:
    home = "def _a(): ...\nclass Home:\n  _b = 1\n  def f(self): self._c = 1"
    trees = {"home.py": ast.parse(home), "guest.py": ast.parse(use)}
    (found,) = private_names_used_elsewhere(trees)
    assert found.startswith("guest.py:1: _")


def test_a_private_name_hung_on_an_object_is_found() -> None:
    (found,) = private_names_hung_on_others({"guest.py": ast.parse("model._ours = self._own = 1")})
    assert found == "guest.py:1: model._ours"


def test_errors_are_no_assertions() -> None:
    """A user who meets an AssertionError is not told what to do, and `python -O` has none."""
    found = [
        f"{path}:{node.lineno}"
        for path, tree in sources("miner_lens", "adapters").items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert not found


FLOORS = sorted(path.parent for path in ROOT.glob("miner_lens/*/__init__.py"))


@pytest.mark.parametrize("folder", FLOORS, ids=lambda path: path.name)
def test_each_folder_says_its_question_and_its_public_names(folder: Path) -> None:
    tree = ast.parse((folder / "__init__.py").read_text())
    docstring = ast.get_docstring(tree) or ""
    assert re.match(r"[^.!?]*\?(\s|$)", docstring), docstring
    assert "__all__" in {
        ast.unparse(target)
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    }


def module_of(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(trees: Sources) -> dict[str, set[str]]:
    """Modules of the package that each module imports, also late and for types alone."""
    modules = {module_of(path) for path in trees}
    graph: dict[str, set[str]] = {}
    for path, tree in trees.items():
        names = graph.setdefault(module_of(path), set())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names} & modules
            elif isinstance(node, ast.ImportFrom) and node.module in modules:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= inner & modules
                if inner - modules:
                    names.add(node.module)
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another, in order, or none."""
    finished: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in finished:
            return []
        for target in sorted(graph[name]):
            if found := walk(target, [*path, name]):
                return found
        finished.add(name)
        return []

    return next((found for name in sorted(graph) if (found := walk(name, []))), [])


def test_no_import_is_in_a_function_to_hide_a_circle() -> None:
    graph = imports(sources("miner_lens"))
    assert sum(map(len, graph.values())) > 50
    del graph["miner_lens"]  # whose names load when first used
    assert not circle({name: targets - {"miner_lens"} for name, targets in graph.items()})


def test_a_circle_by_a_late_import_is_found() -> None:
    trees = {
        "package/__init__.py": ast.parse(""),
        "package/a.py": ast.parse("from package import b"),
        "package/b.py": ast.parse("def f():\n  from package.a import x"),
    }
    assert circle(imports(trees)) == ["package.a", "package.b", "package.a"]


def test_the_package_as_a_user_has_it_is_not_used_below() -> None:
    """By the lazy names of `miner_lens` any floor could reach any other unseen."""
    graph = imports(sources("miner_lens"))
    users = {name for name, targets in graph.items() if "miner_lens" in targets}
    assert users
    assert {name for name in users if not name.startswith(FRONT_DOORS)} == set()


@pytest.mark.parametrize(
    ("path", "line", "broken"),
    [
        ("miner_lens/files.py", "", None),
        ("miner_lens/models/devices.py", "from miner_lens.running import run", "go down"),
        (
            "miner_lens/data/sample.py",
            "def f():\n    from miner_lens.models import load",
            "go down",
        ),
        ("miner_lens/attic/__init__.py", "", "go down"),
        ("miner_lens/files.py", "import miner_lens_adapters", "known by name"),
        ("adapters/miner_lens_adapters/decoder.py", "import miner_lens.files", "no other"),
    ],
)
def test_contracts_can_be_broken(path: str, line: str, broken: str | None, tmp_path: Path) -> None:
    for folder in ("miner_lens", "adapters"):
        for file in (ROOT / folder).rglob("*.py"):
            copy = tmp_path / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / path).parent.mkdir(exist_ok=True)
    with (tmp_path / path).open("a") as file:
        file.write(f"\n{line}\n")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    found = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{tmp_path / 'adapters'}", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == (broken is not None), found.stdout + found.stderr
    broken_ones = re.findall(r"^(.*) BROKEN", found.stdout, re.MULTILINE)
    assert [broken in name for name in broken_ones if broken] == [True] * (broken is not None)


def test_public_names_are_there_and_types_know_them() -> None:
    tree = ast.parse((ROOT / "miner_lens" / "__init__.py").read_text())
    homes: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("_HOMES", "_MODULES"):
            homes |= ast.literal_eval(node.value)
    block = next(node for node in tree.body if isinstance(node, ast.If))
    typed = {
        alias.name: node.module or ""
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(ml.__all__) == set(homes) == set(typed)
    for name in ml.__all__:
        assert getattr(ml, name) is not None
        module = f"{typed[name]}.{name}.".removeprefix("miner_lens.")
        assert module.startswith(f"{homes[name]}."), f"{name} is typed from {typed[name]}"


def documents_and_sources() -> list[Path]:
    folders = ("miner_lens", "adapters", "benchmarks", "examples")
    return [*DOCUMENTS, *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize(
    "path", documents_and_sources(), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_names_lead_somewhere(path: Path) -> None:
    text = path.read_text()
    for name in re.findall(r"(?<![\w/-])(?:docs|tests|miner_lens|adapters)/[\w/.-]+\.\w+", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"\bminer_lens(?:\.[A-Za-z_]\w*)+", text):
        assert leads_somewhere(name), name
    for name in re.findall(r"\bml\.([A-Za-z_]\w*)", text):
        assert name in ml.__all__, name


@cache
def entry_point_groups() -> set[str]:
    """Groups that this project fills, or looks into for what other packages name there."""
    filled = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    asked = {
        ast.literal_eval(node.value)
        for tree in sources("miner_lens").values()
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ENTRY_POINTS"
    }
    return set(filled) | asked


def leads_somewhere(name: str) -> bool:
    module = ROOT / name.replace(".", "/")
    if name in entry_point_groups() or module.is_dir() or module.with_suffix(".py").is_file():
        return True
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return False
    return True


def test_a_name_that_leads_nowhere_is_found() -> None:
    assert not leads_somewhere("miner_lens.modality")
    assert not leads_somewhere("miner_lens.models.sites.Steeple")
    assert leads_somewhere("miner_lens.models.sites.Tower")
