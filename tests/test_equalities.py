"""Each displayed equality has a label, and the next code cell computes both its sides."""

import ast
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tree import chapters, plain_python, read, tags

from sdlib.exercises import attempt, check, relative_error, verdict

DISPLAY = re.compile(r"\$\$(?P<math>.+?)\$\$[ \t]*(?:\((?P<label>[^()\s]+)\))?", re.S)
LABEL = re.compile(r"(def|eq|bound)-(\d\d)-[a-z0-9]+(-[a-z0-9]+)*")
OTHER_DISPLAY = re.compile(
    r"\\\[|\\begin\{(equation|align|gather|multline|eqnarray)\*?\}|```\{math\}|:::\{math\}")


def without_code(markdown: str) -> str:
    """Markdown less its code blocks and inline code, which may quote dollars."""
    markdown = re.sub(r"^(```+|~~~+)(?!\{).*?^\1[ \t]*$", "", markdown, flags=re.S | re.M)
    return re.sub(r"`[^`\n]*\$[^`\n]*`", "", markdown)


def displayed(markdown: str) -> list[tuple[str, str | None]]:
    """(TeX, label or None) of each displayed equation."""
    found = DISPLAY.finditer(without_code(markdown))
    return [(m["math"].strip(), m["label"]) for m in found]


def check_calls(source: str) -> list[ast.Call]:
    """The calls of `check` in a cell, wherever they stand."""
    tree = ast.parse(plain_python(source))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] == "check"]


def is_demonstration(path, call: ast.Call) -> bool:
    """Chapter 00 shows readers a check that is refused; it claims no equality."""
    label = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else ""
    return path.stem.startswith("00") and not re.match("def-|eq-|bound-", str(label))


def labels_of(path) -> list[str]:
    return [label for cell in read(path).cells if cell.cell_type == "markdown"
            for _, label in displayed(cell.source) if label]


def stored_text(cell) -> str:
    return "".join(o.text for o in cell.outputs if o.output_type == "stream")


# ------------------------------------------------------------------- the chapters
@pytest.mark.parametrize("path", chapters(), ids=lambda p: p.stem)
def test_every_displayed_equation_has_a_label(path):
    faults = []
    for cell in read(path).cells:
        if cell.cell_type != "markdown":
            continue
        text = without_code(cell.source)
        if text.count("$$") % 2:
            faults.append(f"{cell.id}: an odd number of $$")
        for found in OTHER_DISPLAY.finditer(re.sub(DISPLAY, "", text)):
            faults.append(f"{cell.id}: {found.group()} outside $$: it cannot be labeled")
        for math, label in displayed(cell.source):
            match = LABEL.fullmatch(label or "")
            if not match:
                faults.append(f"{cell.id}: label {label!r} of {math[:50]!r}")
            elif match.group(2) != path.stem[:2]:
                faults.append(f"{cell.id}: {label} carries another chapter's number")
            if label and re.search(r"\\tag\b|\\label\b", math):
                faults.append(f"{cell.id}: {label} has a second tag")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", chapters(), ids=lambda p: p.stem)
def test_the_next_code_cell_checks_each_equality(path):
    faults, cells = [], read(path).cells
    for position, cell in enumerate(cells):
        if cell.cell_type != "markdown":
            continue
        wanted = [label for _, label in displayed(cell.source)
                  if label and label.startswith("eq-")]
        following = [c for c in cells[position + 1:] if c.cell_type == "code"][:1]
        if wanted and not following:
            faults.append(f"{cell.id}: {wanted} with no code cell after")
        for code in following:
            checked = [call.args[0].value for call in check_calls(code.source)
                       if call.args and isinstance(call.args[0], ast.Constant)]
            for label in wanted:
                if label not in checked:
                    faults.append(f"{cell.id}: {label} is not checked in {code.id}")
                elif f"{label}: both sides agree within" not in stored_text(code):
                    faults.append(f"{code.id}: no output shows that {label} was checked")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", chapters(), ids=lambda p: p.stem)
def test_checks_are_honest(path):
    """Literal label that exists, a tolerance that notices 2 %, two different sides."""
    faults, labels = [], set(labels_of(path))
    for cell in read(path).cells:
        if cell.cell_type != "code" or tags(cell) & {"exercise-stub"}:
            continue
        calls = [c for c in check_calls(cell.source) if not is_demonstration(path, c)]
        if calls and tags(cell) & {"nbval-skip", "skip-execution", "nbval-raises-exception",
                                   "raises-exception", "nbval-ignore-output"}:
            faults.append(f"{cell.id}: a check in a cell that is not compared")
        for call in calls:
            values = dict(zip(("label", "lhs", "rhs", "tol"), call.args))
            values |= {keyword.arg: keyword.value for keyword in call.keywords}
            shown = f"{cell.id}: {ast.unparse(call)[:70]}"
            label, tol = values.get("label"), values.get("tol")
            if set(values) != {"label", "lhs", "rhs", "tol"}:
                faults.append(f"{shown}: not check(label, lhs, rhs, tol)")
            elif not (isinstance(label, ast.Constant) and label.value in labels):
                faults.append(f"{shown}: its label stands at no equation of this chapter")
            elif not (isinstance(tol, ast.Constant) and 0 <= tol.value < 0.015):
                faults.append(f"{shown}: tol must be a number below 0.015")
            elif ast.dump(values["lhs"]) == ast.dump(values["rhs"]):
                faults.append(f"{shown}: both sides are the same expression")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("path", chapters(), ids=lambda p: p.stem)
def test_no_chapter_redefines_or_disarms_check(path):
    guarded = {"check", "attempt", "relative_error"}
    faults = []
    for cell in read(path).cells:
        if cell.cell_type != "code":
            continue
        home = path.stem.startswith("00") and cell.source.startswith("#| export")
        for node in ast.walk(ast.parse(plain_python(cell.source))):
            names = set()
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names = {node.name}
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names = {node.id}
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names = {node.attr}
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                origin = getattr(node, "module", None)
                names = {alias.asname or alias.name for alias in node.names
                         if not (origin == "sdlib.exercises"
                                 and alias.asname in (None, alias.name))}
            elif isinstance(node, ast.Try):
                claims = [c for c in check_calls(ast.unparse(node))
                          if not is_demonstration(path, c)]
                names = {"check"} if claims else set()
            if names & guarded and not home:
                faults.append(f"{cell.id}: {ast.unparse(node)[:60]!r}")
    assert not faults, "\n".join(faults)


def test_labels_are_unique_in_the_course():
    where: dict[str, list[str]] = {}
    for path in chapters():
        for label in labels_of(path):
            where.setdefault(label, []).append(path.stem)
    twice = {label: places for label, places in where.items() if len(places) > 1}
    assert not twice
    assert sum(label.startswith("eq-") for label in where) >= 20


# ------------------------------------------------------------- the tests' own tools
def test_the_readers_of_markdown_see_what_they_should():
    text = ("a\n$$\nx=1\n$$ (eq-06-a)\n`$$`\n```\n$$y$$\n```\n"
            "$$\\begin{aligned}z\\end{aligned}$$")
    assert displayed(text) == [("x=1", "eq-06-a"),
                               ("\\begin{aligned}z\\end{aligned}", None)]
    assert OTHER_DISPLAY.search(r"\begin{align*}x\end{align*}")
    assert not LABEL.fullmatch("eq-6-a") and LABEL.fullmatch("bound-06-a-2")
    assert len(check_calls("%matplotlib inline\nfor i in x:\n    check('a', 1, 2, 3)")) == 1


# --------------------------------------------------------------------- check itself
SHAPES = st.sampled_from([(), (1,), (7,), (3, 4), (2, 3, 4)])


def numbers(shape, seed, scale):
    rng = np.random.default_rng(seed)
    return scale * (rng.normal(size=shape) + rng.choice([-1.0, 1.0], size=shape))


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.integers(0, 10**6), st.floats(1e-6, 1e6), st.floats(1e-9, 0.0135))
def test_check_accepts_truth_and_refuses_two_percent(shape, seed, scale, tol):
    """Whatever the size of the numbers and the tolerance."""
    rhs = numbers(shape, seed, scale)
    check("eq-00-true", rhs.copy(), rhs, tol)
    check("eq-00-near", rhs * (1 + 0.4 * tol), rhs, tol)
    with pytest.raises(AssertionError, match="the sides differ by"):
        check("eq-00-spoiled", rhs, 1.02 * rhs, tol)
    with pytest.raises(AssertionError, match="the sides differ by"):
        check("eq-00-spoiled", 1.02 * rhs, rhs, tol)


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.integers(0, 10**6), st.floats(-0.02, 0.02), st.floats(1e-4, 0.05))
def test_whatever_check_accepts_fails_when_spoiled(shape, seed, off, tol):
    """The promise to the reader: no call passes that would also pass 2 % off."""
    rhs = numbers(shape, seed, 1.0)
    lhs = rhs * (1 + off)
    try:
        check("eq-00-any", lhs, rhs, tol)
    except AssertionError:
        return
    for factor in (0.98, 1.02):
        with pytest.raises(AssertionError):
            check("eq-00-any", lhs, factor * rhs, tol)


@pytest.mark.parametrize("tol", [0.02, 0.021, 0.1, 1.0, float("inf")])
def test_check_refuses_tolerances_that_prove_nothing(tol):
    with pytest.raises(AssertionError, match="would not notice an error of 2 %"):
        check("eq-00-loose", 1.0, 1.0, tol)


@pytest.mark.parametrize("lhs", [1.01, 0.99])
def test_check_refuses_an_equality_that_a_spoiled_side_would_fit_as_well(lhs):
    with pytest.raises(AssertionError, match="would not notice"):
        check("eq-00-between", lhs, 1.0, 0.0103)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), [1.0, float("nan")]])
def test_check_refuses_what_is_not_finite(bad):
    with np.errstate(invalid="ignore"):
        for lhs, rhs in ((bad, np.ones_like(bad)), (np.ones_like(bad), bad), (bad, bad)):
            with pytest.raises((AssertionError, ValueError)):
                check("eq-00-nan", lhs, rhs, 0.01)


def test_check_refuses_zero_and_different_shapes():
    with pytest.raises(ValueError, match="zero everywhere"):
        check("eq-00-zero", np.zeros(3), np.zeros(3), 0.01)
    with pytest.raises(ValueError, match="different shapes"):
        check("eq-00-shape", np.ones(3), np.ones((3, 1)), 0.01)
    with pytest.raises(ValueError):
        check("eq-00-empty", np.ones(0), np.ones(0), 0.01)


@pytest.mark.parametrize("number", [
    1.5, np.float32(1.5), [1.5, -2.0], np.array([1.5]), torch.tensor([1.5, 2.0]),
    torch.tensor(1.5, dtype=torch.bfloat16), torch.nn.Parameter(torch.ones(2)), 3,
], ids=lambda n: type(n).__name__)
def test_check_takes_all_kinds_of_numbers(number, capsys):
    check("eq-00-kind", number, number, 1e-6)
    assert capsys.readouterr().out == "eq-00-kind: both sides agree within 1e-06\n"


def test_relative_error_is_the_one_of_the_course():
    assert relative_error([1.0, 2.0], [1.0, 4.0]) == 0.5
    assert relative_error(torch.tensor([0.0, -3.0]), np.array([0.0, -2.0])) == 0.5


# ------------------------------------------------------------------- attempt itself
def test_attempt_reports_and_never_raises(capsys):
    def right(x):
        return 2 * x

    def stub(x):
        raise NotImplementedError("your turn")

    def crash(x):
        return 1 / 0

    def exam(answer):
        assert answer(2) == 4, "it should double"

    assert verdict(right, exam) == "passed"
    assert verdict(stub, exam) == "not attempted"
    assert verdict(abs, exam).startswith("not yet: it should double")
    assert verdict(crash, exam).startswith("not yet: your code raised ZeroDivisionError: ")
    assert verdict(lambda: 4, exam).startswith("not yet: your code raised TypeError")
    for answer in (right, stub, abs):
        assert attempt("0.1", answer, exam) is None
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["Exercise 0.1: passed", "Exercise 0.1: not attempted",
                         "Exercise 0.1: not yet: it should double"]
