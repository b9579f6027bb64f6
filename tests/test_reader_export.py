"""A reader changes attention in chapter 06, exports it, and chapter 13 paints with it."""

import ast
import json
import subprocess
import sys

from tree import ROOT, copy_tree, environment, make

PAINT = """
import sys, torch, sdlib
from sdlib import StableDiffusion
from sdlib.attention import Attention
assert sdlib.__file__.startswith(sys.argv[1]), sdlib.__file__
pipe = StableDiffusion.from_pretrained("models/emoji-sd")
image = pipe("a fox to the left of a pizza, blue background", seed=0, output_type="pt",
             num_inference_steps=2, progress=False)
print("calls of theirs:", getattr(Attention, "calls", None))
print("finite:", bool(torch.as_tensor(image).isfinite().all()))
"""


def paint(folder) -> str:
    done = subprocess.run([sys.executable, "-c", PAINT, str(folder)], cwd=folder,
                          env=environment(PYTHONPATH=str(folder)),
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def change_attention(path) -> None:
    """Make the class Attention of the chapter count its calls, as a reader's edit would."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code" and "class Attention(" in source:
            tree = ast.parse(source)
            cls = next(n for n in tree.body if isinstance(n, ast.ClassDef))
            forward = next(n for n in cls.body if getattr(n, "name", "") == "forward")
            lines = source.splitlines(keepends=True)
            after = forward.body[0].end_lineno  # the docstring
            lines.insert(after, "        Attention.calls = getattr(Attention, 'calls', 0) + 1\n")
            cell["source"] = "".join(lines)
            path.write_text(json.dumps(notebook), encoding="utf-8")
            return
    raise AssertionError("chapter 06 defines no class Attention")


def test_readers_attention_paints_and_ours_comes_back(tmp_path):
    folder = copy_tree(tmp_path / "course")
    chapter = folder / "chapters" / "06_attention.ipynb"
    assert "calls of theirs: None" in paint(folder)

    change_attention(chapter)
    mine = chapter.read_bytes()
    done = make(folder, "export")
    assert done.returncode == 0, done.stderr
    assert "sdlib/attention.py: changed" in done.stdout
    said = paint(folder)
    calls = int(said.split("calls of theirs: ")[1].split()[0])
    assert calls > 10 and "finite: True" in said

    done = make(folder, "restore")
    assert done.returncode == 0, done.stderr
    assert "restored sdlib/attention.py" in done.stdout
    ours = (ROOT / "sdlib" / "attention.py").read_bytes()
    assert (folder / "sdlib" / "attention.py").read_bytes() == ours
    assert chapter.read_bytes() == mine, "the reader's work is untouched"
    assert "calls of theirs: None" in paint(folder)


def test_a_mistake_in_an_exported_cell_is_named(tmp_path):
    folder = copy_tree(tmp_path / "course",
                       only=("Makefile", "pyproject.toml", "chapters", "sdlib", "tools"))
    chapter = folder / "chapters" / "06_attention.ipynb"
    source = chapter.read_text(encoding="utf-8")
    assert "class Attention(" in source
    chapter.write_text(source.replace("class Attention(", "clas Attention("),
                       encoding="utf-8")
    done = make(folder, "export")
    assert done.returncode != 0
    assert "06_attention.ipynb" in done.stderr and "clas Attention" in done.stderr
