"""A reader's first minute: `make lab`, Run All in chapter 00, pictures appear."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from tree import copy_tree, environment

CHAPTER = "chapters/00_welcome.ipynb"
IDLE = ("document.querySelector('.jp-Notebook-ExecutionIndicator')"
        "?.dataset.status === 'idle'")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def forget_outputs(path: Path) -> None:
    """So that every picture seen later was painted here."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(folder, address with token) of the JupyterLab of `make lab PORT=a busy one`."""
    folder = copy_tree(tmp_path_factory.mktemp("lab") / "course")
    forget_outputs(folder / CHAPTER)
    flags = "--no-browser" + " --allow-root" * (os.geteuid() == 0)
    home = folder.parent / "home"
    home.mkdir()
    with socket.socket() as busy, open(folder.parent / "log", "w+") as log:
        busy.bind(("127.0.0.1", free_port()))
        busy.listen()
        port = busy.getsockname()[1]
        server = subprocess.Popen(
            ["make", "lab", f"VENV={sys.prefix}", "INSTALL=:", f"PORT={port}",
             f"LAB_ARGS={flags}"],
            cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment(PYTHONPATH=str(folder), HOME=str(home)))
        try:
            address, end = None, time.time() + 90
            while address is None and time.time() < end and server.poll() is None:
                time.sleep(0.5)
                said = Path(log.name).read_text()
                address = re.search(r"http://[\w.]+:\d+/\S*token=\w+", said)
            assert address, f"no JupyterLab:\n{said}"
            assert f":{port}/" not in address.group(), "that port was taken"
            yield folder, address.group()
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
                try:
                    server.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(server.pid, signal.SIGKILL)


def test_busy_port_is_announced_and_the_token_is_on(lab):
    folder, address = lab
    said = (folder.parent / "log").read_text()
    assert "takes the next free one" in said
    assert re.search(r"port \d+ is already in use|The port \d+ is already in use", said)
    base = address.split("/lab")[0]
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{base}/api/contents", timeout=20)
    assert f"/lab/tree/{CHAPTER}" in address


def test_run_all_paints(lab):
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert browser, f"none of {BROWSERS} is installed: .ci/run does that"
    folder, address = lab
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = chromium.new_page(viewport={"width": 1300, "height": 1000})
        page.goto(address, timeout=90_000)
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=90_000)
        wait_for_kernel(page, address)
        cells = run_all(page, folder / CHAPTER)
        shown = page.locator(".jp-OutputArea-output img").count()
        chromium.close()
    errors = [f"{cell.id}: {output.ename}: {output.evalue}" for cell in cells
              for output in cell.outputs if output.output_type == "error"]
    assert not errors, "\n".join(errors)
    painted = sum("image/png" in output.get("data", {}) for cell in cells
                  for output in cell.outputs)
    assert painted >= 2, f"{painted} pictures"
    assert shown >= 1, "no picture on the screen"
    assert "?token=" in address


def wait_for_kernel(page, address: str, patience: float = 90.0) -> None:
    """Until the notebook has a kernel and listens to it.

    The indicator says "idle" before there is a kernel; Run All would then ask for one.
    """
    page.wait_for_selector(".jp-Toolbar-kernelName >> text=Python 3", timeout=90_000)
    base, token = address.split("/lab")[0], address.split("token=")[1]
    end = time.time() + patience
    while time.time() < end:
        with urllib.request.urlopen(f"{base}/api/kernels?token={token}") as answer:
            kernels = json.load(answer)
        if any(k["connections"] and k["execution_state"] == "idle" for k in kernels):
            page.wait_for_function(IDLE, timeout=90_000)
            return
        time.sleep(0.5)
    pytest.fail(f"no kernel was ready after {patience:.0f} seconds: {kernels}")


def choose(page, menu: str, entry: str) -> None:
    """Click an entry of JupyterLab's menu; a dialog in the way is an error, and quoted."""
    from playwright.sync_api import TimeoutError

    page.keyboard.press("Escape")
    try:
        page.locator("#jp-MainMenu").get_by_role(
            "menuitem", name=menu, exact=True).click()
        page.get_by_role("menuitem", name=re.compile(rf"^{entry}\b")).first.click()
    except TimeoutError:
        for dialog in page.locator("dialog.jp-Dialog").all():
            pytest.fail(f"{menu}, {entry}: JupyterLab asks {dialog.inner_text()!r}")
        raise


def save(page, path: Path, patience: float = 60.0) -> list:
    """The code cells of the notebook's file, once it was written again."""
    before, end = path.stat().st_mtime_ns, time.time() + patience
    choose(page, "File", "Save Notebook")
    while path.stat().st_mtime_ns == before:
        assert time.time() < end, f"{path} was not written in {patience:.0f} seconds"
        time.sleep(0.5)
    time.sleep(1)  # until the page has heard of it: a save during another one asks
    return [cell for cell in nbformat.read(path, as_version=4).cells
            if cell.cell_type == "code" and cell.source.strip()]


def run_all(page, path: Path, patience: float = 240.0) -> list:
    """Run All, then save until the file shows that every code cell has run."""
    choose(page, "Run", "Run All Cells")
    end = time.time() + patience
    while time.time() < end:
        time.sleep(2)
        if not page.evaluate(IDLE):
            continue
        cells = save(page, path)
        failed = any(o.output_type == "error" for c in cells for o in c.outputs)
        if failed or all(c.execution_count for c in cells):
            return cells
    page.screenshot(path=str(path.parent / "stuck.png"))
    pytest.fail(f"Run All did not finish in {patience:.0f} seconds: see {path.parent}")
