"""The library on a GPU, as far as that can be known without one: see pretended_gpu.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
CASES = """text_to_image weighted_prompts every_scheduler image_to_image inpainting
    inpainting_nine_channels walk previews_and_tiles parts_that_take_turns
    training_the_vae training_clip training_the_unet training_on_close_ups
    training_on_pictures judging refuses_what_a_gpu_refuses""".split()
# What would take too long, or what the pretended GPU cannot do: compile, and half precision in
# a time worth waiting for. Chapter -> (what stands there, what is run).
SHORTER = {
    "04": [("else 20_000, device", "else 500, device")],
    "12": [("steps = 2000 if", "steps = 20 if")],
    "22": [("(20, 3) if on_gpu", "(3, 1) if on_gpu"), ('"float16"}', '"float32"}'),
           ("channels_last=True, compile=True", "channels_last=True")],
}
# The chapters that compute on a GPU where there is one.
CHAPTERS = [next((ROOT / "chapters").glob(f"{number}_*.ipynb"))
            for number in "00 04 07 09 12 13 14 15 16 22".split()]


def run_cases(*arguments):
    done = subprocess.run([sys.executable, str(ROOT / "tests" / "device_cases.py"), *arguments],
                          capture_output=True, text=True, check=False, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    return run_cases()


@pytest.mark.parametrize("case", CASES)
def test_runs_on_a_gpu_as_on_the_cpu(found, case):
    assert not found[case], found[case]


def test_every_case_is_listed(found):
    assert found.keys() == set(CASES)


def test_a_tensor_left_behind_is_noticed():
    """Planted: noise scales that stay where the schedule is."""
    found = run_cases("--plant", "text_to_image", "image_to_image", "inpainting")
    assert "same device" in found["image_to_image"] and "same device" in found["inpainting"]
    assert not found["text_to_image"]


@pytest.mark.gpu
@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_the_chapter_runs_on_a_gpu(path, tmp_path):
    nb = nbformat.read(path, 4)
    for old, new in SHORTER.get(path.name[:2], ()):
        own = [cell for cell in nb.cells
               if old in cell.source and not cell.source.startswith("#| export")]
        assert own, old
        for cell in own:
            cell.source = cell.source.replace(old, new)
    nb.cells.insert(0, nbformat.v4.new_code_cell(
        "import pretended_gpu\npretended_gpu.install((6, 1))  # a card for float32"))
    folders = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    client = NotebookClient(nb, timeout=1200, kernel_name="python3",
                            resources={"metadata": {"path": str(path.parent)}})
    client.execute(env=os.environ | {"PYTHONPATH": folders})
