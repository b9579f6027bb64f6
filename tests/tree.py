"""What the tests of the house share: the repository's files and its chapters."""

import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = PYPROJECT["project"]["urls"]["Repository"]


def toc_chapters() -> list[str]:
    """Names (00_welcome, ...) of the chapters that the table of contents lists."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    files = [toc["root"]] + [c["file"] for part in toc["parts"] for c in part["chapters"]]
    return [Path(file).name for file in files if file.startswith("chapters/")]


def chapters() -> list[Path]:
    """Every chapter's notebook, in the order of the course."""
    return sorted((ROOT / "chapters").glob("[0-9][0-9]_*.ipynb"))


@functools.cache
def read(path: Path) -> nbformat.NotebookNode:
    """A chapter, read once."""
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    """The chapter's code cells in order."""
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def tags(cell) -> set[str]:
    """The cell's tags."""
    return set(cell.metadata.get("tags", []))


def export_target(cell) -> str | None:
    """"" for a cell exported to the default module, "name" for another, None for none."""
    found = re.search(r"^#\|\s*exporti?(?:[ \t]+([\w.]+))?[ \t]*$", cell.source, re.M)
    return None if found is None else found.group(1) or ""


def plain_python(source: str) -> str:
    """The cell without IPython's own syntax: shell and magic lines become `pass`."""
    return re.sub(r"^(\s*)[!%].*$", r"\1pass", source, flags=re.M)


def files() -> list[Path]:
    """The working tree as git would commit it: tracked or new, not ignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True).stdout.decode()
    paths = {ROOT / name for name in listed.split("\0") if name}
    return sorted(path for path in paths if path.is_file())


def copy_tree(target: Path, only: tuple[str, ...] = ()) -> Path:
    """A copy of the working tree, as a fresh clone would have it, in its own git.

    `only` names the top folders and files that are needed; the default is all.
    """
    for path in files():
        if only and path.relative_to(ROOT).parts[0] not in only:
            continue
        copy = target / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "as it was"]):
        subprocess.run(["git", "-c", "user.name=Reader", "-c", "user.email=r@example.org",
                        *command], cwd=target, check=True)
    return target


def environment(**changes: str) -> dict[str, str]:
    """Environment for a command as a user would start it, not as a child of make."""
    hidden = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")
    return {k: v for k, v in os.environ.items() if k not in hidden} | changes


def make(folder: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
    """Run make in `folder` with the environment that runs the tests, installing nothing."""
    return subprocess.run(
        ["make", *arguments, f"VENV={sys.prefix}", "INSTALL=:"], cwd=folder,
        env=environment(PYTHONPATH=str(folder), **changes), capture_output=True, text=True)
