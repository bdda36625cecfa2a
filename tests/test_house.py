"""The rules of the house: import directions, exported symbols, file lengths, no machine's paths."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import svf_fast
from svf_fast import _C

ROOT = Path(__file__).resolve().parents[1]
CODE = {".py", ".pyi", ".cpp", ".h", ".cu", ".cuh"}
TEXT = CODE | {".md", ".toml", ".yaml", ".yml", ".map", ".in", ".txt", ".json", ".csv", ""}
FOLDERS = (".ci", "csrc", "svf_fast", "fss", "benchmarks", "docs", "examples", "tests")


def files(suffixes: set[str], *folders: str) -> list[Path]:
    found = [] if folders else [path for path in ROOT.iterdir() if path.name != ".git"]
    for folder in folders or FOLDERS:
        found += (ROOT / folder).rglob("*")
    return sorted(
        path
        for path in found
        if path.is_file() and path.suffix in suffixes and "__pycache__" not in path.parts
    )


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules imported anywhere in a tree, absolute, with the names taken from each."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            module = ".".join([*parents, node.module or ""]).strip(".")
            yield module, tuple(alias.name for alias in node.names)


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


def imported_modules(source: str, package: str) -> set[str]:
    found = set()
    for module, names in imports(ast.parse(source), package):
        found |= {module, *(f"{module}.{name}" for name in names)}
    return found


def is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_imports_are_seen() -> None:
    source = "import fss.x as y\ndef f():\n    from ..ops import z\n    from . import w\n"
    assert imported_modules(source, "svf_fast.layers") == {
        "fss.x",
        "svf_fast.ops",
        "svf_fast.ops.z",
        "svf_fast.layers",
        "svf_fast.layers.w",
    }


@pytest.mark.parametrize(
    "folder, forbidden",
    [
        ("svf_fast", ("fss", "benchmarks", "tests")),
        ("fss", ("benchmarks", "tests")),
        ("tests/svf_fast", ("benchmarks",)),
        ("tests/fss", ("benchmarks",)),
        ("tests/gpu", ("benchmarks",)),
        ("tests/robustness", ("benchmarks",)),
        ("tests/pages", ("benchmarks",)),
        ("benchmarks", ("tests",)),
        ("examples", ("benchmarks", "tests")),
    ],
)
def test_import_directions(folder: str, forbidden: tuple[str, ...]) -> None:
    sources = files({".py", ".pyi"}, folder)
    assert sources
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources
        for module in imported_modules(path.read_text(), package_of(path))
        if any(is_inside(module, name) for name in forbidden)
    ]
    assert not wrong


def test_reference_imports_nothing_of_ours() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in files({".py"}, "svf_fast/reference")
        for module in imported_modules(path.read_text(), package_of(path))
        if is_inside(module, "svf_fast") and not is_inside(module, "svf_fast.reference")
    ]
    assert not wrong


# Storeys of a package from the ground up: rooms and modules that import only what is below them.
STOREYS = {
    "svf_fast": (
        "_C",
        "reference",
        "_library",
        "svd files",
        "ops",
        "triton layers",
        "fusion",
        "report capture",
        "budget",
        "convert",
        "adapter",
        "__init__ __main__",
    ),
    "fss": (
        "colors files",
        "config",
        "settings processes",
        "captured",
        "data",
        "models",
        "runs",
        "evaluation",
        "segment",
        "report",
        "training",
        "paper",
        "cli",
    ),
}


def room(module: str) -> str:
    """Return the part of a package in which a module is: "fss.data.coco" is in "data"."""
    return module.partition(".")[2].partition(".")[0]


@pytest.mark.parametrize("package", STOREYS)
def test_imports_point_down(package: str) -> None:
    level = {name: at for at, names in enumerate(STOREYS[package]) for name in names.split()}
    top = len(STOREYS[package])  # of a name that the package itself offers
    wrong = []
    for path in files({".py"}, package):
        own = room(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if own == "__init__" and package == "fss":  # its names are imported when first asked for
            continue
        assert own in level, f"{path.relative_to(ROOT)}: give its room a storey in {__file__}"
        for module in imported_modules(path.read_text(), package_of(path)):
            other = room(module)
            up = other not in (own, "") and level.get(other, top) >= level[own]
            if is_inside(module, package) and up:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


ROOMS = {
    "svf_fast": "reference ops triton layers fusion",
    "fss": "config data models runs evaluation segment report training paper",
    "benchmarks": "race gpu few_shot",
}


@pytest.mark.parametrize("package, modules", [("fss", 8), ("svf_fast", 10), ("benchmarks", 6)])
def test_rooms_are_described_and_few_modules_are_outside(package: str, modules: int) -> None:
    rooms = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert rooms == set(ROOMS[package].split())
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.split(f"| `{package}/` | |")[1].partition("\n\n")[0]
    assert not [room for room in rooms if f"`{room}/`" not in section]
    assert len(list((ROOT / package).glob("*.py"))) <= modules


def test_fss_uses_only_the_public_names_of_svf_fast() -> None:
    wrong = []
    for path in files({".py"}, "fss"):
        tree = ast.parse(path.read_text())
        used = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "svf_fast"
        }
        for module, names in imports(tree, package_of(path)):
            if module == "svf_fast":
                used |= set(names)
            elif is_inside(module, "svf_fast"):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
        private = used - set(svf_fast.__all__)
        wrong += [f"{path.relative_to(ROOT)} uses svf_fast.{name}" for name in sorted(private)]
    assert not wrong


def libraries() -> list[Path]:
    folder = Path(_C.__file__).parent
    return [Path(_C.__file__), *sorted(folder.glob("_C_cuda*.so"))]


def symbols(library: Path, option: str) -> set[str]:
    if shutil.which("nm") is None:
        pytest.skip("nm (binutils) is not installed")
    command = ["nm", "-D", option, "--format=posix", str(library)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[0].partition("@")[0] for line in lines}


@pytest.mark.parametrize("library", libraries(), ids=lambda path: path.name.split(".")[0])
def test_compiled_library_needs_only_the_stable_symbols_of_torch(library: Path) -> None:
    undefined = symbols(library, "--undefined-only")
    mangled = [
        name for name in undefined if re.match(r"_Z\w*?N(K?)(3c10|2at|5torch|5caffe2)", name)
    ]
    assert not mangled
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in undefined)


@pytest.mark.parametrize("library", libraries(), ids=lambda path: path.name.split(".")[0])
def test_compiled_library_exports_only_its_entry_point(library: Path) -> None:
    expected = {"PyInit__C"} if library.name.startswith("_C.") else set()
    assert symbols(library, "--defined-only") == expected


def test_files_are_short() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for path in files(CODE)
        if (lines := len(path.read_text().splitlines())) >= 600
    }
    assert not long


def test_no_path_of_a_machine() -> None:
    roots = "|".join(["home", "work", "root", "tmp", "Users"])
    absolute = re.compile(rf"(?<![\w.$}})/-])/(?:{roots})/\w")
    assert absolute.search("see /" + "home/someone/x")
    assert not absolute.search("runs/" + "work/x and https://example.org/" + "home/x")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in files(TEXT)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if absolute.search(line)
    ]
    assert not found
