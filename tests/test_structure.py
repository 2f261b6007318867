"""The structure of the Python code: who may import whom. Imports inside functions count, those for types don't."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"gnaforge": "codegen", "gnaforge.build_tools": "build_tools", "gnaforge.templates": "templates"}


def module_files() -> dict[str, Path]:
    """Every module of the package, by name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FILES = module_files()


def import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from import_statements(child)


def imports_of(module: str) -> set[str]:
    """Modules of the package that a module imports, at its top or in its functions."""
    path = FILES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in import_statements(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        above = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        found |= {name if (name := f"{base}.{alias.name}") in FILES else base for alias in node.names}
    return found & FILES.keys() - {module}


IMPORTS = {module: imports_of(module) for module in FILES}


def reachable(start: str) -> set[str]:
    seen: set[str] = set()
    pending = list(IMPORTS[start])
    while pending:
        if (module := pending.pop()) not in seen:
            seen.add(module)
            pending += IMPORTS[module]
    return seen


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert [module for module in FILES if module in reachable(module)] == []


@pytest.mark.parametrize("package", ["gnaforge.build_tools", "gnaforge.runtime"])
def test_lower_packages_import_nothing_from_above(package: str) -> None:
    """``build_tools`` knows compilers and files, not kernels; ``runtime`` is what wheels carry."""
    own = [module for module in FILES if f"{module}.".startswith(f"{package}.")]
    above = {module: {name for name in IMPORTS[module] if not f"{name}.".startswith(f"{package}.")} for module in own}
    assert {module: names for module, names in above.items() if names} == {}


def test_every_package_is_installed() -> None:
    """``pyproject.toml`` lists packages by name; one that is forgotten is missing from installations only."""
    listed = (ROOT / "pyproject.toml").read_text()
    packages = [module for module, path in FILES.items() if path.name == "__init__.py"]
    assert [name for name in packages if f'"{name}"' not in listed] == []


def test_files_stay_small() -> None:
    """A file that is larger than this holds several things."""
    limit = 500
    assert {str(path): n for path in FILES.values() if (n := len(path.read_text().splitlines())) > limit} == {}
