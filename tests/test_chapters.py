"""The form of the chapters: what a reader may rely on in each of them."""

import inspect
import re
from importlib import import_module

import nbformat
import pytest
from tree import (
    PYPROJECT,
    REPOSITORY,
    ROOT,
    chapters,
    code_cells,
    export_target,
    read,
    tags,
    toc_chapters,
)

CHAPTERS = chapters()
IN_BOOK = [path for path in CHAPTERS if path.stem in toc_chapters()]
SETUP = f'''\
# Set-up: in Colab, fetch the course and install it; elsewhere nothing is downloaded.
import os, sys
if "google.colab" in sys.modules:
    if not os.path.exists("/content/course"):
        !git clone -q --depth 1 {REPOSITORY} /content/course
        !pip install -q -e /content/course
    os.chdir("/content/course/chapters")
    sys.path.insert(0, "/content/course")'''
BADGE = ("[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
         "(https://colab.research.google.com/github/{owner}/blob/main/chapters/{name})")
PICTURES = {"image/png", "image/jpeg", "image/svg+xml"}

every = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
in_book = pytest.mark.parametrize("path", IN_BOOK, ids=lambda p: p.stem)


def by_id(path) -> dict:
    return {cell.id: cell for cell in read(path).cells}


def no(faults: list[str]) -> None:
    assert not faults, "\n".join(faults)


def test_the_table_of_contents_lists_chapters_that_exist_in_order():
    names = toc_chapters()
    assert names == sorted(names)
    missing = [n for n in names if not (ROOT / "chapters" / f"{n}.ipynb").exists()]
    assert not missing


@every
def test_notebook_is_valid_and_small(path):
    notebook = read(path)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    nbformat.validate(notebook)
    size = path.stat().st_size
    assert size < 1.2e6, f"{size / 1e6:.2f} MB with its outputs"
    assert notebook.metadata.kernelspec.name == "python3"


@every
def test_ids_are_unique_and_mean_something(path):
    ids = [cell.id for cell in read(path).cells]
    assert len(ids) == len(set(ids))
    no([f"id {i!r}" for i in ids
        if not re.fullmatch(r"[a-z][a-z0-9-]{1,63}", i) or re.fullmatch(r"[0-9a-f-]{8,}", i)
        or re.fullmatch(r"(cell|untitled)-?\d*", i)])


@every
def test_title_carries_the_files_number_and_a_summary(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and first.id == "title"
    lines = first.source.splitlines()
    assert re.fullmatch(rf"# {int(path.stem[:2])}\. \S.*", lines[0]), lines[0]
    assert any(line.startswith("> ") for line in lines), "no one-sentence summary"


@in_book
def test_badge_opens_this_file_in_colab(path):
    owner = REPOSITORY.removeprefix("https://github.com/")
    assert BADGE.format(owner=owner, name=path.name) in read(path).cells[0].source


@in_book
def test_opening_and_closing_cells(path):
    cells, source = by_id(path), "\n".join(c.source for c in read(path).cells)
    exports = any(export_target(cell) == "" for cell in code_cells(path))
    wanted = ["title", "default-exp", "setup", "imports", "road-map", "opening"]
    wanted = [i for i in wanted if exports or i != "default-exp"]
    order = [i for i in cells if i in wanted]
    assert order == wanted
    assert cells["setup"].source.strip() == SETUP, "the set-up cell is the same everywhere"
    assert "hide-input" in tags(cells["setup"])
    assert f'road_map("{path.stem[:2]}")' in cells["road-map"].source
    assert re.search(r"\d+ minutes|a minute|an hour|\d+ hours", cells["opening"].source)
    headings = re.findall(r"^## (.+)$", source, re.M)
    wanted = ["Exercises", "What we built"]
    if not path.stem.startswith("00"):
        wanted.insert(0, "When it breaks")
    assert [h for h in headings if h in wanted] == wanted, headings
    if exports:
        assert "make export" in source and "make restore" in source


@every
def test_executed_top_to_bottom_without_errors(path):
    cells = [cell for cell in code_cells(path) if cell.source.strip()]
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "run it: python tools/nb.py run ..."
    for cell in cells:
        for output in cell.outputs:
            assert output.output_type != "error", f"{cell.id}: {output.get('evalue')}"
            text = output.get("text", "")
            if output.output_type == "stream" and output.name == "stderr":
                assert not re.search(r"Warning|Traceback|Error", text), f"{cell.id}: {text}"


@every
def test_every_picture_has_alternative_text(path):
    faults = []
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            for alt in re.findall(r"!\[([^\]]*)\]\(", cell.source):
                if len(alt) < 4:
                    faults.append(f"{cell.id}: a picture with the text {alt!r}")
            for image in re.findall(r"<img [^>]*>", cell.source):
                if not re.search(r'alt="[^"]{4,}"', image):
                    faults.append(f"{cell.id}: {image[:60]}")
        elif cell.cell_type == "code":
            drawn = {kind for o in cell.outputs for kind in o.get("data", {})} & PICTURES
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            if drawn and len(alt) < 20:
                faults.append(f"{cell.id}: a picture with the text {alt!r}")
    no(faults)


@every
def test_cells_are_short(path):
    faults = []
    for cell in code_cells(path):
        if cell.id == "setup":
            continue
        lines = [x for x in cell.source.strip().splitlines() if not x.startswith("#|")]
        if len(lines) > 40:
            faults.append(f"{cell.id}: {len(lines)} lines")
        faults += [f"{cell.id}: {len(x)} columns: {x[:60]}" for x in lines if len(x) > 88]
    no(faults)


@every
def test_most_cells_are_compared(path):
    cells = [cell for cell in code_cells(path) if cell.source.strip()]
    ignored = [c.id for c in cells if tags(c) & {"nbval-ignore-output", "nbval-skip"}]
    assert 4 * len(ignored) <= len(cells), f"{len(ignored)} of {len(cells)}: {ignored}"
    for cell in cells:
        assert ("nbval-skip" in tags(cell)) == ("skip-execution" in tags(cell)), cell.id


@every
def test_folded_cells_are_folded_in_jupyterlab_too(path):
    no([cell.id for cell in code_cells(path)
        if tags(cell) & {"hide-input", "hide-cell"}
        and not cell.metadata.get("jupyter", {}).get("source_hidden")])


@every
def test_plots_end_with_show(path):
    """Or the cell's value, a list of artists, would be compared and printed."""
    no([cell.id for cell in code_cells(path)
        if re.search(r"<matplotlib\.|<Figure size|\[<", "".join(
            o.get("data", {}).get("text/plain", "") for o in cell.outputs
            if o.output_type == "execute_result"))])


@every
def test_markdown_of_a_chapter_has_no_leftovers(path):
    faults = []
    for cell in read(path).cells:
        for word in ("TODO", "FIXME", "XXX", "lorem ipsum"):
            if word in cell.source:
                faults.append(f"{cell.id}: {word}")
    no(faults)


def exported():
    """(module, name, object) of every exported name that is a function or a class."""
    for path in sorted((ROOT / "sdlib").glob("[a-z]*.py")):
        module = import_module(f"sdlib.{path.stem}")
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isfunction(thing) or inspect.isclass(thing):
                yield path.stem, name, thing


def test_exported_names_have_docstrings():
    faults = [f"{m}.{n}" for m, n, thing in exported()
              if not (thing.__doc__ or "").strip() or
              (inspect.isclass(thing) and thing.__doc__.startswith(f"{n}("))]
    for path in sorted((ROOT / "sdlib").glob("[a-z]*.py")):
        if not (import_module(f"sdlib.{path.stem}").__doc__ or "").strip():
            faults.append(f"{path.stem} itself")
    no(faults)


def test_exported_functions_have_type_hints():
    faults = []
    for module, name, thing in exported():
        if inspect.isfunction(thing):
            bare = [p.name for p in inspect.signature(thing).parameters.values()
                    if p.annotation is p.empty and not p.name.startswith("_")]
            if bare:
                faults.append(f"{module}.{name}: {bare}")
    no(faults)


@pytest.mark.parametrize("path", sorted((ROOT / "sdlib").glob("[a-z]*.py")),
                         ids=lambda p: p.stem)
def test_modules_stay_readable(path):
    """One idea each: a module of more than 400 lines should be two."""
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{path.stem} has {lines} lines"


def test_repository_address_is_one():
    assert re.fullmatch(r"https://github\.com/[\w-]+/[\w-]+", REPOSITORY)
    for name in ("_config.yml", "CITATION.cff"):
        assert REPOSITORY in (ROOT / name).read_text(encoding="utf-8"), name
    assert PYPROJECT["project"]["name"] == "sdlib"
