"""The web pages: built without a warning, complete, readable."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tree import ROOT, copy_tree, environment, read, toc_chapters


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built pages; beside the chapters an environment with strange pages in it."""
    folder = copy_tree(tmp_path_factory.mktemp("site") / "course", only=(
        "_config.yml", "_toc.yml", "_static", "bibliography.md", "book", "chapters",
        "references.bib"))
    for environment_folder in (".venv", "env"):
        strange = folder / environment_folder / "lib" / "site-packages" / "any"
        strange.mkdir(parents=True)
        (strange / "README.md").write_text("---\n[]: {}: broken\n---\n{ref}`nowhere`\n")
    done = subprocess.run(
        [str(Path(sys.prefix) / "bin" / "jupyter-book"), "build", ".", "-W", "-n",
         "--keep-going"],
        cwd=folder, env=environment(), capture_output=True, text=True)
    said = (done.stdout + done.stderr).splitlines()
    faults = [line for line in said if "WARNING" in line or "ERROR" in line]
    assert done.returncode == 0, "\n".join(faults or said[-60:])
    return folder / "_build" / "html"


def test_builds_and_every_chapter_has_its_page(site):
    for name in toc_chapters():
        page = (site / "chapters" / f"{name}.html").read_text(encoding="utf-8")
        title = read(ROOT / "chapters" / f"{name}.ipynb").cells[0].source.splitlines()[0]
        text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
        assert title.removeprefix("# ") in text
    assert (site / "index.html").exists()


def test_equations_pictures_and_citations_are_rendered(site):
    for name in toc_chapters():
        page = (site / "chapters" / f"{name}.html").read_text(encoding="utf-8")
        body = page[page.index("<article"):page.index("</article>")]
        prose = re.sub(r"<(pre|code)\b.*?</\1>", "", body, flags=re.S)
        assert "$$" not in prose, f"{name}: an equation was not rendered"
        assert "{cite" not in prose, f"{name}: a citation was not rendered"
        assert "{ref}" not in prose and "{eq}" not in prose, f"{name}: a reference"
        for image in re.findall(r"<img [^>]*>", body):
            alt = re.search(r'alt="([^"]*)"', image)
            assert alt and alt.group(1) and not alt.group(1).startswith("../"), (
                f"{name}: {image[:90]}")


def test_nothing_of_the_machine_is_on_the_pages(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"/(tmp|root|home)/\w+/|site-packages/", text), page.name
