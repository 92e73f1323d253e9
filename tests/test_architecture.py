"""Who may import whom, in every file and folder: an import counts wherever it stands, in a function or for types alone."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "stage1_vae": {"stage2_prior", "pipelines", "tests"},
    "stage2_prior": {"stage1_vae", "pipelines", "tests"},
    "pipelines": {"tests"},
}
COMMANDS = {
    "train_all",
    "generate",
    "compare",
    "likelihood",
    "score",
    "study",
    "benchmark",
    "export",
    "publish",
    "reproduce",
    "explore",
}
LAYERS = [
    {"console"},
    {"processes", "grids", "arguments", "command_line"},
    {"files"},
    {"data", "training"},
    {"runs"},
    {"judging"},
    {"pages"},
    {"two_stage"},
    {"studies", "benchmarks", "explorer"},
    COMMANDS,
    {"__main__"},
]
"""What lies in pipelines, from the bottom up: a room imports itself and what lies below, and a command no other command."""


def name_of(path: Path) -> str:
    """The dotted name of a module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for room in FORBIDDEN for path in sorted((ROOT / room).rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """The modules that a file imports, by their dotted names; what else is imported by name is taken for its module."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inner}
    return names


def layer_of(name: str) -> int | None:
    """Where a module of pipelines lies; None for pipelines itself."""
    parts = name.split(".")
    return next(index for index, layer in enumerate(LAYERS) if parts[1] in layer) if len(parts) > 1 else None


def circles(modules: dict[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or through others: of each that reaches itself, a shortest way back."""
    found = []
    for start in modules:
        ways, seen = [[start]], {start}
        while ways:
            way = ways.pop(0)
            if start in modules[way[-1]]:
                found.append([*way, start])
                break
            new = sorted((modules[way[-1]] & modules.keys()) - seen)
            seen |= {*new}
            ways += [[*way, name] for name in new]
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_import_rule(room):
    files = [path for name, path in MODULES.items() if name.split(".")[0] == room]
    assert len(files) > 3
    for path in files:
        assert not {name.split(".")[0] for name in imported(path)} & FORBIDDEN[room], path


def test_imports_within_pipelines_go_one_way():
    for name, path in MODULES.items():
        here = layer_of(name) if name.startswith("pipelines.") else None
        for other in imported(path) if here is not None else ():
            there = layer_of(other) if other.startswith("pipelines.") else None
            same_room = other.split(".")[:2] == name.split(".")[:2]
            assert there is None or there < here or same_room, f"{name} imports {other}"


@pytest.mark.parametrize("room", FORBIDDEN)
def test_no_two_files_import_each_other(room):
    found = circles({name: imported(path) for name, path in MODULES.items() if name.split(".")[0] == room})
    assert not found, [" → ".join(way) for way in found]


def test_a_circle_is_found():
    modules = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": set(), "e": {"a"}}
    assert circles(modules) == [["a", "b", "c", "a"], ["b", "c", "a", "b"], ["c", "a", "b", "c"]]


def test_every_module_of_pipelines_lies_in_a_room_that_says_what_lives_there():
    for name, path in MODULES.items():
        assert not name.startswith("pipelines.") or layer_of(name) is not None
        if path.name == "__init__.py" and name.startswith("pipelines"):
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_nothing_is_read_by_pickle():
    for path in MODULES.values():
        text = path.read_text().replace("from pickle import UnpicklingError", "")
        assert not re.search(r"\bpickle\b.*import|import.*\bpickle\b|allow_pickle=True", text), path
        # torch's restricted reader runs nothing of the file; torch.save only into memory.
        assert all("weights_only=True" in line for line in re.findall(r".*(?<!safetensors\.)torch\.load\b.*", text)), path
        assert all("again)" in line for line in re.findall(r".*(?<!safetensors\.)torch\.save\b.*", text)), path
