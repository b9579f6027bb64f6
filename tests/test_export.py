"""sdlib is what the chapters export, nothing more and nothing else."""

import json
import subprocess
import sys

import pytest
from tree import ROOT, copy_tree

sys.path.insert(0, str(ROOT / "tools"))
import export  # noqa: E402

BY_HAND = {"__init__.py", "__main__.py"}


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository to change, its sdlib as exported."""
    folder = copy_tree(tmp_path / "clone", only=("pyproject.toml", "chapters", "sdlib"))
    export.export(folder)
    return folder


def add_cell(path, source):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["cells"].append({"cell_type": "code", "id": "added", "metadata": {},
                              "execution_count": None, "outputs": [], "source": source})
    path.write_text(json.dumps(notebook), encoding="utf-8")


def test_package_is_what_the_chapters_export():
    new, errors = export.regenerate(ROOT)
    assert not errors
    assert len(new) >= 10
    assert export.differences(export.generated(ROOT), new) == []


def test_every_other_module_is_generated():
    assert {p.name for p in (ROOT / "sdlib").glob("*.py")} - set(
        export.generated(ROOT)) == BY_HAND
    assert not [p for p in (ROOT / "sdlib").glob("*/**/*.py")], "no packages inside"


def test_difference_and_stale_module_are_noticed(clone):
    module = clone / "sdlib" / "attention.py"
    module.write_text(module.read_text() + "\nEXTRA = 1\n")
    (clone / "sdlib" / "old.py").write_text(f"{export.MARK} File to edit: gone.\n")
    (clone / "sdlib" / "noise.py").unlink()
    new, errors = export.regenerate(clone)
    assert not errors
    assert export.differences(export.generated(clone), new) == [
        "old.py: no chapter exports it", "noise.py: new", "attention.py: changed"]
    with pytest.raises(SystemExit, match="old.py: no chapter exports it"):
        export.check(clone)
    export.export(clone)
    export.check(clone)
    assert not (clone / "sdlib" / "old.py").exists()


def test_broken_chapter_is_named_and_spares_the_others(clone):
    before = (clone / "sdlib" / "attention.py").read_text()
    add_cell(clone / "chapters" / "06_attention.ipynb", "#| export\ndef broken(:\n    pass")
    add_cell(clone / "chapters" / "02_forward_process.ipynb", "#| export\nEXTRA = 1")
    with pytest.raises(SystemExit, match="06_attention.ipynb #added: invalid syntax: def broken"):
        export.export(clone)
    assert (clone / "sdlib" / "attention.py").read_text() == before
    assert "EXTRA = 1" in (clone / "sdlib" / "noise.py").read_text()


def test_two_chapters_cannot_fill_one_module(clone):
    add_cell(clone / "chapters" / "06_attention.ipynb", "#| export noise\nEXTRA = 1")
    with pytest.raises(SystemExit, match="module noise is exported by another chapter"):
        export.check(clone)


def test_restore_brings_the_committed_modules_back(clone, capsys):
    subprocess.run(["git", "-c", "user.name=R", "-c", "user.email=r@example.org", "commit",
                    "-q", "-a", "--allow-empty", "-m", "exported"], cwd=clone, check=True)
    committed = export.generated(clone)
    chapter = clone / "chapters" / "06_attention.ipynb"
    add_cell(chapter, "#| export\nEXTRA = 1")
    add_cell(clone / "chapters" / "02_forward_process.ipynb", "#| export mine\nMINE = 1")
    changed = chapter.read_bytes()
    export.export(clone)
    assert "EXTRA = 1" in (clone / "sdlib" / "attention.py").read_text()
    assert (clone / "sdlib" / "mine.py").exists()
    capsys.readouterr()
    export.restore(clone)
    assert export.generated(clone) == committed
    assert chapter.read_bytes() == changed, "the reader's chapter must stay"
    assert capsys.readouterr().out.startswith(
        "restored sdlib/attention.py\nrestored sdlib/mine.py\nYour chapters are untouched")


def test_docstring_of_a_second_module_moves_to_the_top():
    text = (f"{export.MARK} x.\n\n# %% auto #0\n__all__ = []\n\n# %% c #d\n"
            '"""Words."""\na = 1\n')
    moved = export.hoist_docstring(text)
    assert moved.startswith(f'"""Words."""\n\n{export.MARK}')
    assert moved.count("Words") == 1 and moved.endswith("# %% c #d\na = 1\n")
