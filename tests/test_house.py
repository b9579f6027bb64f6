"""The repository around the chapters: versions, commands, installation, sizes."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from tree import PYPROJECT, ROOT, environment, files, read

import sdlib

spec = importlib.util.spec_from_file_location("install", ROOT / "tools" / "install.py")
install = importlib.util.module_from_spec(spec)
spec.loader.exec_module(install)

PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
MIB = 2**20


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def pins() -> dict[str, str]:
    """Package -> exact version of constraints.txt."""
    lines = [x for x in text("constraints.txt").splitlines() if x and not x.startswith("#")]
    found = dict(line.split("==") for line in lines)
    assert len(found) == len(lines)
    return {canonicalize_name(name): version for name, version in found.items()}


# ------------------------------------------------------------------------------ versions
def test_constraints_lie_in_the_declared_ranges():
    requirements = [Requirement(r) for r in sum(EXTRAS.values(), PROJECT["dependencies"])]
    exact = pins()
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        if name == "sdlib":
            continue
        assert name in exact, f"{name} has no tested version in constraints.txt"
        assert requirement.specifier.contains(exact[name], prereleases=True), requirement
        assert "==" not in str(requirement.specifier), f"{requirement}: a range, not a pin"


def test_environment_yml_agrees():
    conda = yaml.safe_load(text("environment.yml"))
    plain = [d for d in conda["dependencies"] if isinstance(d, str)]
    pip = next(d["pip"] for d in conda["dependencies"] if isinstance(d, dict))
    python = next(d.split("=")[1] for d in plain if d.startswith("python="))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    assert f"Python {python}" in text("constraints.txt").split("\n")[0]
    assert "--constraint constraints.txt" in pip
    assert "--editable .[course]" in pip
    assert f"torch=={pins()['torch']}" in pip
    assert f"--extra-index-url {install.CPU_INDEX}" in pip
    assert {"pip", "make", "git"} <= set(plain)
    for line in pip:  # any version repeated here must be the tested one
        found = re.fullmatch(r"([\w-]+)==(.+)", line)
        assert not found or pins()[canonicalize_name(found[1])] == found[2]


def test_versions_are_one():
    assert install.TORCH == pins()["torch"]
    assert ">=" + ".".join(map(str, install.OLDEST)) == PROJECT["requires-python"]
    assert sdlib.__version__ == PROJECT["version"]
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == PROJECT["version"]
    assert citation["title"] == yaml.safe_load(text("_config.yml"))["title"]


def test_the_tests_run_with_the_constraints():
    """Else what is green here says little about what readers install."""
    from importlib.metadata import version

    for name in ("torch", "numpy", "diffusers", "transformers", "nbdev", "jupyter-book"):
        assert version(name).split("+")[0] == pins()[name], name


# -------------------------------------------------------------------------- make and CI
def test_help_lists_every_command():
    makefile = text("Makefile")
    targets = set(re.findall(r"^([a-z-]+):(?!=)", makefile, re.M))
    phony = set(re.search(r"^\.PHONY: (.+)$", makefile, re.M).group(1).split())
    assert targets == phony
    assert {"lab", "test", "test-full", "book", "export", "restore", "image", "train", "clean",
            "help"} <= targets
    for arguments in ([], ["help"]):
        shown = subprocess.run(["make", *arguments], cwd=ROOT, env=environment(),
                               capture_output=True, text=True, check=True).stdout
        for target in targets:
            assert re.search(rf"^  make {target} +\S", shown, re.M), target


def test_ci_and_makefile_call_the_same_things():
    assert text(".ci/run").rstrip().endswith("make test")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    steps = yaml.safe_load(text(".github/workflows/ci.yml"))["jobs"]
    commands = [s["run"] for job in steps.values() for s in job["steps"] if "run" in s]
    assert commands == [".ci/run", "make book"]
    for name in ("Makefile", ".ci/run"):
        assert re.search(r"export OMP_WAIT_POLICY ?= ?passive", text(name)), name


def test_lab_leaves_jupyters_checks_on():
    recipe = text("Makefile")
    for off in ("token=''", 'token=""', "disable_check_xsrf", "allow_origin", "password"):
        assert off not in recipe
    assert not re.search(r"^[^#\n]*jupyterlab.*--allow-root", recipe, re.M)


# ---------------------------------------------------------------------- sizes and leaks
def test_the_tree_is_small():
    sizes = {path: path.stat().st_size for path in files()}
    models = sum(s for p, s in sizes.items() if "models" in p.relative_to(ROOT).parts)
    assert sum(sizes.values()) < 56 * MIB, f"{sum(sizes.values()) / MIB:.1f} MiB"
    assert models < 32 * MIB, f"models: {models / MIB:.1f} MiB"


def test_no_machine_paths():
    """No file speaks of the machine where it was made."""
    paths = re.compile(rb"/(?:work/main|work/shared|opt/sd)\b|/(?:home|Users)/\w+/|"
                       rb"/(?:root)/\w|\.pyenv/")
    faults = []
    for path in files():
        if path == Path(__file__).resolve() or path.stat().st_size > 4 * MIB:
            continue
        content = path.read_bytes()
        if b"\0" in content[:1024]:
            continue
        for found in paths.finditer(content):
            near = content[max(0, found.start() - 30):found.end() + 30]
            faults.append(f"{path.relative_to(ROOT)}: {near!r}")
    assert not faults, "\n".join(faults)


def test_licenses_and_notices_are_there():
    assert "MIT License" in text("LICENSE")
    assert "SIL OPEN FONT LICENSE Version 1.1" in text("sdlib/assets/sprites/OFL.txt")
    assert "Copyright (c) 2021 OpenAI" in text("sdlib/assets/clip/LICENSE")
    for place in re.findall(r"`(sdlib/assets/[^`]+)`", text("NOTICE.md")):
        assert (ROOT / place).exists(), place
    for pattern in PROJECT["license-files"]:
        assert list(ROOT.glob(pattern)), pattern


def test_links_inside_the_repository_lead_somewhere():
    for name in ("README.md", "CONTRIBUTING.md", "NOTICE.md"):
        source = re.sub(r"<!--.*?-->|```.*?```", "", text(name), flags=re.S)
        for link in re.findall(r"\]\(([^)#]+)\)", source):
            if not link.startswith("http"):
                assert (ROOT / link).exists(), f"{name}: {link}"
    assert text("README.md").count("\n") < 60, "one screen"


def test_citations_are_in_the_bibliography():
    keys = re.findall(r"^@\w+\{([\w-]+),", text("references.bib"), re.M)
    assert len(keys) == len(set(keys))
    for path in sorted((ROOT / "chapters").glob("*.ipynb")):
        for cell in read(path).cells:
            for cited in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", cell.source):
                for key in cited.split(","):
                    assert key.strip() in keys, f"{path.name}, {cell.id}: {key.strip()}"


# -------------------------------------------------------------------------- installation
@pytest.mark.parametrize("system, gpu, wish, build", [
    ("Linux", False, "auto", "cpu"),
    ("Linux", True, "auto", "default"),
    ("Linux", False, "default", "default"),
    ("Linux", True, "cpu", "cpu"),
    ("Darwin", False, "auto", "default"),
])
def test_torch_build(monkeypatch, system, gpu, wish, build):
    monkeypatch.setattr(install.platform, "system", lambda: system)
    monkeypatch.setattr(install, "has_nvidia_gpu", lambda: gpu)
    assert install.torch_build(wish) == build


@pytest.mark.parametrize("script, found", [
    ("echo 'GPU 0: NVIDIA H200 (UUID: GPU-1)'", True),
    ("echo 'NVIDIA-SMI has failed: no driver'; exit 9", False),
    ("echo 'No devices were found'", False),
    (None, False),
])
def test_gpu_is_asked_for(monkeypatch, tmp_path, script, found):
    if script:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    if script is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    assert install.has_nvidia_gpu() is found


def test_cpu_build_never_falls_back_to_cuda(monkeypatch, tmp_path):
    """Both tries ask for "+cpu" by name; when both fail, the reader decides."""
    tried = []

    def pip(python, arguments, log, quiet=False):
        tried.append(arguments)
        return False, "ERROR: No matching distribution found for torch"

    monkeypatch.setattr(install, "pip", pip)
    with pytest.raises(install.Problem, match="several gigabytes.*make lab TORCH=default"):
        install.install_torch("python", "cpu", str(tmp_path / "log"), 4)
    assert len(tried) == 2 and install.CPU_INDEX in tried[1]
    assert all(arguments[0] == f"torch=={install.TORCH}+cpu" for arguments in tried)


@pytest.mark.parametrize("output, words", [
    ("OSError: [Errno 28] No space left on device", "The disk is full"),
    ("NewConnectionError('<...>: Failed to establish a new connection: [Errno -3] "
     "Temporary failure in name resolution')\nERROR: No matching distribution for numpy",
     "could not be reached.*network"),
    ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] ...'))",
     "PIP_CERT"),
    ("ERROR: No matching distribution found for torch==2.13.0", "no torch 2.13.0 for this"),
    ("ERROR: No matching distribution found for pillow", "no build for Python"),
])
def test_pips_words_become_ours(output, words):
    assert re.search(words, install.explain(output, 4))


def test_unknown_failures_are_not_explained_away():
    assert install.explain("error: something never seen", 4) is None


def test_no_network_is_said_so(tmp_path, monkeypatch):
    """A real pip with nobody at the other end."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(install.Problem, match="could not be reached"):
        install.pip_or_explain(sys.executable, ["--dry-run", "no-such-package-here"],
                               str(tmp_path / "log"), 4)
    assert "no-such-package" in (tmp_path / "log").read_text()


def test_full_disk_is_said_before_anything_is_fetched(monkeypatch, tmp_path):
    class Usage:
        free = 2.5e9

    monkeypatch.setattr(install.shutil, "disk_usage", lambda place: Usage)
    with pytest.raises(install.Problem, match=r"needs 4 GB at .*; 2\.5 GB are free there"):
        install.require_disk(str(tmp_path / "not" / "yet" / "there"), 4)


def test_old_python_is_said_so(monkeypatch):
    monkeypatch.setattr(install.sys, "version_info", (3, 9, 2))
    monkeypatch.setattr(install, "find_python", lambda: None)
    with pytest.raises(install.Problem, match="Python 3.11 or newer is needed"):
        install.require_python()


def test_installer_can_be_read_by_old_pythons():
    """Or it could not say that they are too old."""
    import ast

    ast.parse(text("tools/install.py"), feature_version=(3, 7))


@pytest.fixture
def sandbox(monkeypatch, tmp_path):
    """install() with an environment of links and a pip that only notes what it is asked."""
    calls = []

    def environment(venv, python, unfinished):
        if unfinished:
            calls.append("anew")
        os.makedirs(os.path.dirname(python), exist_ok=True)
        if not os.path.exists(python):
            os.symlink(sys.executable, python)

    monkeypatch.setattr(install, "make_environment", environment)
    monkeypatch.setattr(install, "install_torch", lambda *a: calls.append("torch"))
    def note(python, arguments, log, need):
        assert f"torch=={install.TORCH}+cpu" in arguments, "pip might take another build"
        calls.append(arguments[-1])

    monkeypatch.setattr(install, "pip_or_explain", note)
    monkeypatch.setattr(install, "require_disk", lambda *a: None)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, sys.path)]))
    return calls, str(tmp_path / "venv")


def test_installed_once(sandbox):
    calls, venv = sandbox
    install.install("course", venv, "cpu")
    assert calls == ["torch", ".[course]"]
    install.install("course", venv, "cpu")
    install.install("course", venv, "auto")
    assert calls == ["torch", ".[course]"], "a finished installation is left alone"
    install.install("dev", venv, "cpu")
    assert calls[2:] == ["torch", ".[dev]"]
    for extra in ("course", "book", "dev"):
        install.install(extra, venv, "cpu")
    assert len(calls) == 4, "dev contains the others"


def test_interrupted_installation_is_repaired(sandbox, monkeypatch):
    calls, venv = sandbox

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(install, "pip_or_explain", interrupt)
        with pytest.raises(KeyboardInterrupt):
            install.install("course", venv, "cpu")
    assert not os.path.exists(os.path.join(venv, "sd-finished"))
    install.install("course", venv, "cpu")
    assert calls == ["torch", "anew", "torch", ".[course]"]
    install.install("course", venv, "cpu")
    assert len(calls) == 4


def test_changed_requirements_are_installed(sandbox, monkeypatch):
    calls, venv = sandbox
    install.install("course", venv, "cpu")
    monkeypatch.setattr(install, "fingerprint", lambda *a: "another")
    install.install("course", venv, "cpu")
    assert calls == ["torch", ".[course]"] * 2


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.tex").write_text("years of work")
    with pytest.raises(install.Problem, match="is no virtual environment"):
        install.make_environment(str(tmp_path / "venv"), "python", unfinished=True)
    assert (tmp_path / "venv" / "thesis.tex").exists()
