"""The rooms keep their doors: who may import what, what gets installed, what is pinned."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"lowvram": "lowvram", "quant": "lowvram.quant", "offload": "lowvram.offload"}
LONGEST_FILE = 400

IMPORT_NAMES = {"pillow": "PIL"}
"""Distributions whose import name is not their own."""

WHERE_PRESENT = {"torch_npu", "triton", "llama_cpp", "sounddevice"}
"""Libraries that are used only where they are installed, and never required."""


@dataclass(frozen=True)
class Import:
    """One imported name: `from module import name`, or `import module` where `name` is empty."""

    file: Path
    line: int
    module: str
    name: str

    @property
    def room(self) -> str:
        return room_of(f"{self.module}.{self.name}")

    @property
    def top(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        return (
            f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module} {self.name}".strip()
        )


def room_of(module: str) -> str:
    """The room a dotted name lies in, or "" for anything outside the project."""
    for room in ("lowvram.quant", "lowvram.offload", "lowvram"):
        if f"{module}.".startswith(f"{room}."):
            return room
    return ""


def source_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    folder, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS.get(folder, folder), *rest]).removesuffix(".__init__")


@cache
def imports_of(folder: str) -> tuple[Import, ...]:
    """Every import below `folder`, those inside functions and under TYPE_CHECKING included."""
    return tuple(found for path in source_files(folder) for found in _imports_in(path))


def _imports_in(path: Path) -> Iterator[Import]:
    package = module_name(path)
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(path, node.lineno, alias.name, "")
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base]).rstrip(".")
            for alias in node.names:
                yield Import(path, node.lineno, base, alias.name)
        elif _is_import_call(node):
            name = ast.literal_eval(node.args[0])
            yield Import(path, node.lineno, package + name if name.startswith(".") else name, "")


def _is_import_call(node: ast.AST) -> bool:
    """`import_module("name")` or `importlib.import_module("name")`: an import in disguise."""
    return (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("import_module", "importlib.import_module", "__import__")
        and bool(node.args)
        and isinstance(node.args[0], ast.Constant)
    )


def test_the_import_reader_sees_every_spelling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "lowvram" / "engine" / "probe.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import torch.nn\n"
        "from ..quant import packing\n"
        "from . import talk\n"
        "def late():\n"
        "    from lowvram.offload.store import Store\n"
        "    importlib.import_module('torch_npu')\n"
        "    import_module('.speech', __name__)\n"
    )
    seen = [(i.module, i.name, i.room) for i in _imports_in(path)]
    assert sorted(seen) == [
        ("lowvram.engine", "talk", "lowvram"),
        ("lowvram.engine.speech", "", "lowvram"),
        ("lowvram.offload.store", "Store", "lowvram.offload"),
        ("lowvram.quant", "packing", "lowvram.quant"),
        ("torch.nn", "", ""),
        ("torch_npu", "", ""),
    ]


@pytest.mark.parametrize(
    ("folder", "allowed"),
    [
        ("quant", {"torch", "numpy", "triton"}),
        ("offload", {"torch", "torch_npu", "safetensors", "psutil", "numpy"}),
    ],
)
def test_leaf_rooms_import_only_their_own_and_a_few_libraries(
    folder: str, allowed: set[str]
) -> None:
    strangers = [
        str(found)
        for found in imports_of(folder)
        if found.room != FOLDERS[folder]
        and found.module != "lowvram.errors"
        and found.top not in allowed
        and found.top not in sys.stdlib_module_names
    ]
    assert not strangers


def test_nobody_reaches_past_a_door() -> None:
    doors = {room: _public_names(folder) for folder, room in FOLDERS.items() if folder != "lowvram"}
    trespassers = [
        str(found)
        for found in imports_of("lowvram")
        if found.room in doors
        and (found.module not in doors or found.name not in doors[found.module])
    ]
    assert not trespassers


def test_demos_use_only_the_public_package() -> None:
    public = _public_names("lowvram")
    assert imports_of("demos")
    for found in imports_of("demos"):
        assert not found.room or (found.module == "lowvram" and found.name in public), found


def _public_names(folder: str) -> set[str]:
    """`__all__` of a room's `__init__.py`, read without importing it."""
    for node in ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{folder}/__init__.py has no literal __all__")


def test_every_library_imported_is_a_declared_dependency() -> None:
    declared = {
        IMPORT_NAMES.get(canonicalize_name(name), name) for name in _requirements("dependencies")
    }
    undeclared = {
        str(found)
        for folder in FOLDERS
        for found in imports_of(folder)
        if not found.room
        and found.top not in sys.stdlib_module_names
        and found.top not in declared | WHERE_PRESENT
    }
    assert not undeclared


def test_torch_npu_is_imported_in_one_place() -> None:
    places = {
        found.file.relative_to(ROOT).as_posix()
        for folder in FOLDERS
        for found in imports_of(folder)
        if found.top == "torch_npu"
    }
    assert len(places) == 1
    assert places.pop().startswith("offload/")


def test_every_package_is_listed_for_installation() -> None:
    """`packages` is written out because of `package-dir`; the wheel lacks a forgotten one."""
    found = {module_name(path) for path in source_files(*FOLDERS) if path.name == "__init__.py"}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_no_file_grows_past_one_sitting() -> None:
    long = {
        path.relative_to(ROOT).as_posix(): lines
        for path in source_files(*FOLDERS, "demos", "tests")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    }
    assert not long


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-5.17.txt"])
def test_every_requirement_has_a_pin_inside_its_range(file: str) -> None:
    pins = _pins(file)
    wanted = _requirements("dependencies") | _requirements("test")
    for name, requirement in wanted.items():
        assert pins[canonicalize_name(name)] in requirement.specifier, requirement


def test_both_ends_share_all_but_transformers_and_its_hub() -> None:
    """What the second environment takes from the first must satisfy both lists of pins."""
    newest, oldest = _pins("constraints.txt"), _pins("constraints-5.17.txt")
    assert oldest["transformers"] == "5.17.0"
    moved = {name for name in newest if newest[name] != oldest.get(name)}
    assert moved == {"transformers", "huggingface-hub"}


def _requirements(group: str) -> dict[str, Requirement]:
    project = PROJECT["project"]
    lines = project[group] if group in project else project["optional-dependencies"][group]
    return {requirement.name: requirement for requirement in map(Requirement, lines)}


def _pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}
