"""Edit and run the chapters: notebook <-> jupytext percent text, with stable cell ids.

    python tools/nb.py text chapters/06_attention.ipynb 06.py       notebook -> text
    python tools/nb.py notebook 06.py chapters/06_attention.ipynb   text -> notebook
    python tools/nb.py run chapters/06_attention.ipynb              execute in place
    python tools/nb.py figures chapters/06_attention.ipynb folder   every picture as PNG

In the text a cell starts with `# %% id="name"`, optionally with `tags=[...]` and with
`alt="..."`, the alternative text of the picture that the cell draws.
"""

import argparse
import base64
import re
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {"name": "python", "pygments_lexer": "ipython3"}  # knows ! and % lines
FOLDED = {"hide-input", "hide-cell"}


def read(path: str):
    return nbformat.read(path, as_version=4)


def write(nb, path: str) -> None:
    nbformat.validate(nb)
    nbformat.write(nb, path)


def to_text(source: str, target: str) -> None:
    nb = read(source)
    for cell in nb.cells:
        meta = {"id": cell.id}
        if cell.metadata.get("tags"):
            meta["tags"] = list(cell.metadata["tags"])
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt")
        if alt:
            meta["alt"] = alt
        cell.metadata = nbformat.from_dict(meta)
    filters = {"cell_metadata_filter": "id,tags,alt", "notebook_metadata_filter": "-all"}
    nb.metadata = nbformat.from_dict({"jupytext": filters})
    Path(target).write_text(jupytext.writes(nb, fmt="py:percent"), encoding="utf-8")


def to_notebook(source: str, target: str) -> None:
    nb = jupytext.reads(Path(source).read_text(encoding="utf-8"), fmt="py:percent")
    old = {c.id: c for c in read(target).cells} if Path(target).exists() else {}
    nb.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": LANGUAGE}
    )
    nb.nbformat, nb.nbformat_minor = 4, 5
    seen = set()
    for number, cell in enumerate(nb.cells):
        meta = dict(cell.metadata)
        name = meta.pop("id", None)
        if not name or not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", name) or name in seen:
            sys.exit(f"{source}: cell {number} ({cell.source[:50]!r}) needs a unique id "
                     f"of lower-case letters, digits and dashes; it has {name!r}")
        seen.add(name)
        alt = meta.pop("alt", None)
        if alt:
            meta["mystnb"] = {"image": {"alt": alt}}
        if cell.cell_type == "code" and FOLDED & set(meta.get("tags", [])):
            meta["jupyter"] = {"source_hidden": True}
        cell.id, cell.metadata = name, nbformat.from_dict(meta)
        before = old.get(name)
        if cell.cell_type == "code" and before is not None and before.source == cell.source:
            cell.outputs = before.outputs
            cell.execution_count = before.execution_count
    write(nb, target)


def run(path: str, timeout: int = 600) -> None:
    nb = read(path)
    NotebookClient(nb, timeout=timeout, kernel_name="python3",
                   resources={"metadata": {"path": str(Path(path).parent)}}).execute()
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
    kept = ("kernelspec", "language_info", "widgets")
    nb.metadata = nbformat.from_dict({k: v for k, v in nb.metadata.items() if k in kept})
    nb.metadata["language_info"] = dict(LANGUAGE)
    write(nb, path)


def figures(path: str, folder: str) -> None:
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for cell in read(path).cells:
        for k, output in enumerate(cell.get("outputs", [])):
            png = output.get("data", {}).get("image/png")
            if png:
                name = out / f"{cell.id}-{k}.png"
                name.write_bytes(base64.b64decode(png))
                print(name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["text", "notebook", "run", "figures"])
    parser.add_argument("paths", nargs="+")
    args = parser.parse_args()
    verbs = {"text": to_text, "notebook": to_notebook, "run": run, "figures": figures}
    verbs[args.verb](*args.paths)
