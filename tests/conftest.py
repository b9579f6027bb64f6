"""Settings for every test: the repository root, quiet libraries, one way of computing."""

import os
import sys
from pathlib import Path

# Before torch, diffusers or transformers are imported by any test.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def pytest_terminal_summary(terminalreporter):
    """What the tests measured (`record_property`), below the versions it holds for."""
    measured = [f"{name}: {value}" for reports in terminalreporter.stats.values()
                for report in reports if getattr(report, "when", "") == "call"
                for name, value in report.user_properties]
    if measured:
        from importlib.metadata import version

        terminalreporter.section("measured")
        packages = ("torch", "diffusers", "transformers", "numpy")
        terminalreporter.line(", ".join(f"{p} {version(p)}" for p in packages))
        for line in measured:
            terminalreporter.line(line)
