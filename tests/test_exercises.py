"""Stubs are unsolved, solutions pass, wrong answers hear what is wrong with them.

The exercise cells are executed as a reader would meet them: after the chapter's imports
and exported cells, and nothing else.
"""

import contextlib
import importlib.util
import io
import re
import sys
import types
from pathlib import Path

import matplotlib
import pytest
from tree import (
    ROOT,
    chapters,
    code_cells,
    export_target,
    plain_python,
    read,
    tags,
    toc_chapters,
)

from sdlib.exercises import verdict

FORM = {"task": None, "stub": {"exercise-stub"},
        "check": {"exercise-check", "hide-input"},
        "solution": {"exercise-solution", "hide-cell"}}


def exercises(path: Path) -> dict[str, dict]:
    """"06_1" -> kind -> cell, in the chapter's order."""
    found: dict[str, dict] = {}
    for cell in read(path).cells:
        match = re.fullmatch(r"ex-(\d\d)-(\d+)-(\w+)", cell.id)
        if match:
            kinds = found.setdefault(f"{match.group(1)}_{match.group(2)}", {})
            kinds[match.group(3)] = cell
    return found


def wrong_answers(path: Path) -> dict[str, list[tuple[str, str]]]:
    """WRONG of tests/exercises/ex_NN.py."""
    file = ROOT / "tests" / "exercises" / f"ex_{path.stem[:2]}.py"
    assert file.exists(), f"{file.name} with the wrong answers is missing"
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WRONG


def dotted(key: str) -> str:
    """"06_1" -> "6.1"."""
    chapter, number = key.split("_")
    return f"{int(chapter)}.{number}"


def run(source: str, namespace: dict) -> str:
    """Execute a cell; returns what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(plain_python(source), "<cell>", "exec"), namespace)
    return out.getvalue()


@pytest.fixture(scope="module", params=[p for p in chapters() if p.stem in toc_chapters()],
                ids=lambda p: p.stem)
def chapter(request):
    """(path, module): the chapter with its imports and exported cells executed."""
    path = request.param
    matplotlib.use("agg")
    module = types.ModuleType(f"chapter_{path.stem}")
    sys.modules[module.__name__] = module
    with contextlib.chdir(ROOT / "chapters"):
        for cell in code_cells(path):
            if cell.id in ("setup", "imports") or export_target(cell) is not None:
                run(cell.source, module.__dict__)
        yield path, module
    del sys.modules[module.__name__]


def test_form(chapter):
    path, _ = chapter
    found, number = exercises(path), int(path.stem[:2])
    least = 5 if number == 6 else 2
    assert len(found) >= least, f"{len(found)} exercises; at least {least} are wanted"
    assert list(found) == [f"{number:02d}_{k}" for k in range(1, len(found) + 1)]
    order = [c.id for c in read(path).cells if c.id.startswith("ex-")]
    assert order == [f"ex-{key.replace('_', '-')}-{kind}" for key in found for kind in FORM]
    for key, cells in found.items():
        for kind, wanted in FORM.items():
            kind_is = "markdown" if kind == "task" else "code"
            assert cells[kind].cell_type == kind_is, f"{key} {kind}"
            if wanted:
                assert wanted <= tags(cells[kind]), f"{key} {kind} lacks the tags {wanted}"
        title = rf"### Exercise {re.escape(dotted(key))}: .+ \(\d+ minutes?[\w, -]*\)"
        task = cells["task"].source
        assert re.fullmatch(title, task.splitlines()[0]), f"{key}: {task.splitlines()[0]!r}"
        assert re.search(r"<details>\s*<summary>Hint", task), f"{key}: no hint"
        assert 'raise NotImplementedError("your turn")' in cells["stub"].source, key
        assert '"""' in cells["stub"].source, f"{key}: the stub needs a docstring"


def test_stored_outputs_are_those_of_an_unsolved_chapter(chapter):
    path, _ = chapter
    for key, cells in exercises(path).items():
        number = dotted(key)
        shown = {kind: "".join(o.get("text", "") for o in cells[kind].outputs)
                 for kind in ("check", "solution")}
        assert shown["check"] == f"Exercise {number}: not attempted\n", key
        assert shown["solution"] == f"Exercise {number} (solution): passed\n", key


def test_stub_solution_and_wrong_answers(chapter):
    path, module = chapter
    wrong, found = wrong_answers(path), exercises(path)
    assert set(wrong) == set(found), "WRONG must name each exercise of the chapter"
    faults = []
    for key, cells in found.items():
        number, names = dotted(key), module.__dict__
        run(cells["stub"].source, names)
        said = run(cells["check"].source, names)
        if said != f"Exercise {number}: not attempted\n":
            faults.append(f"{key}: the stub got {said!r}")
        exam = names[f"test_{key}"]
        said = run(cells["solution"].source, names)
        if said != f"Exercise {number} (solution): passed\n":
            faults.append(f"{key}: the solution got {said!r}")
        if len(wrong[key]) < 2:
            faults.append(f"{key}: fewer than two wrong answers")
        heard = []
        for source, fragment in wrong[key]:
            local = dict(names)
            run(source, local)
            with contextlib.redirect_stdout(io.StringIO()):
                result = verdict(local[f"ex_{key}"], exam)
            heard.append(result)
            if not result.startswith("not yet: ") or fragment not in result:
                faults.append(f"{key}: wanted {fragment!r}, got {result!r} for\n{source}")
            elif "your code raised" in result and "your code raised" not in fragment:
                faults.append(f"{key}: a wrong answer crashed: {result!r}")
        if len(set(heard)) < len(heard):
            faults.append(f"{key}: two wrong answers get the same message: {heard}")
    assert not faults, "\n".join(faults)
