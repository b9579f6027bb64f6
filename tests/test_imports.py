"""One direction: a module imports modules of its own or of earlier chapters only."""

import ast
import re
import subprocess
import sys

import pytest
from tree import PYPROJECT, ROOT, chapters, code_cells, export_target, plain_python

MODULES = sorted(p for p in (ROOT / "sdlib").glob("*.py") if not p.name.startswith("_"))
REFERENCES = {"diffusers", "transformers", "accelerate", "open_clip", "clip", "k_diffusion"}
# `sdlib verify` compares with the references on the reader's machine. It alone may import
# them, inside of a function, and must say how to install them where they are missing.
COMPARES = "verify"
# Where the import's name is not the package's.
DISTRIBUTION = {"PIL": "pillow", "cycler": "matplotlib", "yaml": "pyyaml"}


def imports(source: str) -> set[str]:
    """Dotted names of everything imported, inside functions and by string too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ("sdlib." if node.level else "") + (node.module or "")
            module = module.rstrip(".")
            if module == "sdlib":
                found |= {f"sdlib.{alias.name}" for alias in node.names}
            else:
                found.add(module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func).split(".")[-1]
            if name in ("import_module", "__import__"):
                assert isinstance(node.args[0], ast.Constant), "import of a computed name"
                found.add(str(node.args[0].value))
    return found


def chapter_of_modules() -> dict[str, int]:
    """Module name -> number of the chapter that exports it."""
    numbers = {}
    for path in MODULES:
        header = re.search(r"File to edit: \.\./chapters/(\d\d)_", path.read_text())
        numbers[path.stem] = int(header.group(1))
    return numbers


def own_modules(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("sdlib.")}


def test_imports_are_found_wherever_they_hide():
    source = ("import a.b\nfrom .c import d\nfrom sdlib import e\n"
              "def f():\n    from sdlib.g import h\n    __import__('diffusers')\n")
    assert imports(source) == {"a.b", "sdlib.c", "sdlib.e", "sdlib.g", "diffusers"}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_module_imports_same_or_earlier_chapters(path):
    number = chapter_of_modules()
    for name in own_modules(imports(path.read_text())):
        assert name in number, f"{path.name} imports sdlib.{name}, which no chapter exports"
        assert number[name] <= number[path.stem], (
            f"{path.name} of chapter {number[path.stem]} imports sdlib.{name} "
            f"of chapter {number[name]}")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_module_needs_declared_dependencies_only(path):
    dependencies = PYPROJECT["project"]["dependencies"]
    declared = {re.match(r"[\w-]+", line).group() for line in dependencies}
    for name in imports(path.read_text()):
        top = name.split(".")[0]
        if top in REFERENCES:
            assert path.stem == COMPARES, f"{path.name} imports {name}: a reference library"
            continue
        if top != "sdlib" and top not in sys.stdlib_module_names:
            assert DISTRIBUTION.get(top, top) in declared, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", chapters(), ids=lambda p: p.stem)
def test_chapter_uses_same_or_earlier_modules(path):
    chapter, number = int(path.stem[:2]), chapter_of_modules()
    for cell in code_cells(path):
        found = imports(plain_python(cell.source))
        if chapter > 0:  # chapter 00 is a preview and may use everything
            late = {m for m in own_modules(found) if number.get(m, 99) > chapter}
            assert not late, f"{path.stem}, cell {cell.id}: {late} come in later chapters"
        if {name.split(".")[0] for name in found} & REFERENCES:
            assert export_target(cell) in (None, COMPARES)
            assert re.search(r"except \(?(ImportError|ModuleNotFoundError)|find_spec",
                             cell.source), (
                f"{path.stem}, cell {cell.id}: needs a reference library without asking")


def test_the_references_are_imported_in_a_function():
    path = ROOT / "sdlib" / f"{COMPARES}.py"
    top = [node for node in ast.parse(path.read_text()).body
           if not isinstance(node, ast.FunctionDef)]
    assert not {name.split(".")[0] for node in top
                for name in imports(ast.unparse(node))} & REFERENCES
    assert {name.split(".")[0] for name in imports(path.read_text())} & REFERENCES


def test_each_module_can_be_imported_first():
    """With none of the others loaded yet, and the references out of reach."""
    code = f"""
import importlib, sys
for name in {sorted(REFERENCES)}:
    sys.modules[name] = None
for module in sys.argv[1:]:
    for name in [n for n in sys.modules if n.split(".")[0] == "sdlib"]:
        del sys.modules[name]
    importlib.import_module("sdlib." + module)
"""
    done = subprocess.run([sys.executable, "-c", code, *(p.stem for p in MODULES)],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_package_is_lazy_and_its_names_exist():
    import sdlib

    code = "import sys, sdlib; assert 'torch' not in sys.modules; print(sdlib.__version__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.stdout.strip() == PYPROJECT["project"]["version"], done.stderr
    for name in sdlib.__all__:
        assert getattr(sdlib, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'StabelDiffusion'"):
        sdlib.StabelDiffusion  # noqa: B018


def test_python_m_sdlib_lists_the_commands():
    from sdlib.cli import COMMANDS

    done = subprocess.run([sys.executable, "-m", "sdlib"], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert re.search(rf"^  {command} +\S", done.stdout, re.M), command
