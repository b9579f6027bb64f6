"""Make the virtual environment of the course, or repair it; needs Python alone.

    python3 tools/install.py [course|book|dev] [--venv .venv] [--torch auto|cpu|default]

`make lab`, `make book` and `make test` call this. It checks the Python version, the disk
and the network, chooses the torch build, installs what is missing, and says clearly what
to do when something is in the way. An interrupted installation is noticed and repaired by
running it again: a stamp inside the environment is written last.

torch: "auto" takes the CPU build where there is no NVIDIA GPU, and never fetches the
gigabytes of CUDA libraries unasked; "cpu" and "default" (pip's own choice) decide by hand.
"""

# This file must start under an old Python 3 too, if only to say that it is too old.
import argparse
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OLDEST = (3, 11)
TORCH = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
GIGABYTE = 1e9

# What pip says -> what we say. The first match wins.
CAUSES = [
    (r"No space left on device|Errno 28",
     "The disk is full. Free some space ({need} GB are needed for the whole), then run the "
     "same command again."),
    (r"Temporary failure in name resolution|Name or service not known|nodename nor servname"
     r"|getaddrinfo failed|NewConnectionError|NameResolutionError|Network is unreachable"
     r"|Connection refused|ConnectTimeout|ReadTimeout|Read timed out|Connection reset"
     r"|ProxyError|Could not connect|Failed to establish a new connection"
     r"|Max retries exceeded",
     "The package index could not be reached. Check the network (or the proxy settings "
     "HTTPS_PROXY and PIP_INDEX_URL), then run the same command again: what was fetched "
     "already is kept."),
    (r"CERTIFICATE_VERIFY_FAILED|SSLError",
     "The package index did not present a certificate that this machine trusts. Behind a "
     "company proxy, set PIP_CERT to its certificate file."),
    (r"No matching distribution found for torch",
     "There is no torch {torch} for this machine (Python {python}, {machine}). It is made "
     "for Linux and for Macs with Apple silicon; try another Python, of which 3.11 is the "
     "one that was tested: make lab PYTHON=python3.11"),
    (r"No matching distribution found",
     "A package has no build for Python {python} on {machine}. Try another Python, of "
     "which 3.11 is the one that was tested: make lab PYTHON=python3.11"),
]


class Problem(Exception):
    """Something the reader can mend; the text says how."""


def say(text):
    print("[install] " + text, flush=True)


# ---------------------------------------------------------------- the Python to be used
def suitable(version):
    return tuple(version[:2]) >= OLDEST


def find_python():
    """Another interpreter on the PATH that is new enough, or None."""
    for minor in (12, 13, 11, 14):
        path = shutil.which(f"python3.{minor}")
        if path and subprocess.call([path, "-c", "import ensurepip, venv"],
                                    stderr=subprocess.DEVNULL) == 0:
            return path
    return None


def require_python():
    """Continue under a Python >= 3.11, perhaps another than the one that was called."""
    if suitable(sys.version_info):
        return
    other = find_python()
    if other and not os.environ.get("SD_INSTALL_AGAIN"):
        os.environ["SD_INSTALL_AGAIN"] = "1"
        os.execv(other, [other, os.path.abspath(__file__)] + sys.argv[1:])
    raise Problem(
        f"Python {OLDEST[0]}.{OLDEST[1]} or newer is needed; {sys.executable} is Python "
        f"{platform.python_version()}. Install a newer one (from your package manager or "
        "https://www.python.org) and say which: make lab PYTHON=/path/to/python3.12"
    )


def require_venv_module():
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        raise Problem(
            "This Python cannot make virtual environments. On Debian or Ubuntu: "
            f"sudo apt install python3-venv (or python3.{sys.version_info[1]}-venv)"
        ) from None


# ------------------------------------------------------------------------ disk and torch
def require_disk(folder, gigabytes):
    """Enough room where the environment goes, and where pip unpacks."""
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    for place, need in ((folder, gigabytes), (tempfile.gettempdir(), 1)):
        free = shutil.disk_usage(place).free / GIGABYTE
        if free < need:
            other = "" if place == folder else " (or set TMPDIR to another folder)"
            raise Problem(
                f"The installation needs {need} GB at {place}; {free:.1f} GB are free "
                f"there. Free some space{other} and run the same command again."
            )


def has_nvidia_gpu():
    """Whether nvidia-smi lists a GPU: the driver is there and answers."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        listed = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU" in listed.stdout


def torch_build(wish):
    """"cpu" or "default" for a wish of "auto", "cpu" or "default"."""
    if wish != "auto":
        return wish
    if platform.system() != "Linux":
        return "default"  # macOS and Windows: pip's torch brings no CUDA
    return "default" if has_nvidia_gpu() else "cpu"


# ------------------------------------------------------------------------ pip and errors
def explain(output, need):
    """The reader's next step for what pip printed, or None."""
    for pattern, text in CAUSES:
        if re.search(pattern, output):
            return text.format(
                need=need, torch=TORCH, python=platform.python_version(),
                machine=platform.system() + " " + platform.machine(),
            )
    return None


def pip(python, arguments, log, quiet=False):
    """Run pip, show its progress, keep its words. Returns (succeeded, output)."""
    command = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    # pip retries five times with growing pauses: a machine without network should hear
    # about it in seconds.
    command += ["--retries", "2", "--progress-bar", "off"] + arguments
    lines = []
    with open(log, "a") as record:
        record.write("\n$ " + " ".join(command) + "\n")
        run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, errors="replace", cwd=ROOT)
        for line in run.stdout:
            lines.append(line)
            record.write(line)
            if not quiet and re.match(r"\s*(Downloading|Building|Installing)", line):
                print("  " + line.strip()[:100], flush=True)
        run.wait()
    return run.returncode == 0, "".join(lines)


def pip_or_explain(python, arguments, log, need):
    succeeded, output = pip(python, arguments, log)
    if not succeeded:
        tail = "".join(output.splitlines(True)[-15:])
        reason = explain(output, need)
        raise Problem((reason or "pip failed; its last words stand above.")
                      + "\nThe whole record: " + log) from RuntimeError(tail)


def torch_requirement(build):
    """The exact torch; "+cpu" keeps pip from ever taking the CUDA build on PyPI."""
    return f"torch=={TORCH}" + ("+cpu" if build == "cpu" else "")


def install_torch(python, build, log, need):
    """The chosen build of torch, by its exact version."""
    if build == "default":
        say(f"installing torch {TORCH} as pip chooses it")
        return pip_or_explain(python, [torch_requirement(build)], log, need)
    say("installing the CPU build of torch (no NVIDIA GPU found, or TORCH=cpu)")
    pinned = torch_requirement(build)
    # First from wherever this machine's pip is told to look, then from PyTorch's own
    # index.
    succeeded, output = pip(python, [pinned], log, quiet=True)
    if not succeeded and not re.search("No space left", output):
        succeeded, output = pip(python, [pinned, "--extra-index-url", CPU_INDEX], log)
    if succeeded:
        return None
    if "No space left" in output:
        raise Problem(explain(output, need) + "\nThe whole record: " + log)
    raise Problem(
        f"The CPU build of torch {TORCH} could not be fetched from {CPU_INDEX}. Check the "
        "network and run the same command again. (The ordinary build from PyPI works too, "
        "but brings several gigabytes of CUDA libraries: make lab TORCH=default)\n"
        f"The whole record: {log}"
    )


# --------------------------------------------------------------------- the environment
def fingerprint(venv, build):
    """What a finished installation depends on; another value means: install again."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt"):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    digest.update("|".join([ROOT, os.path.abspath(venv), TORCH, build]).encode())
    return digest.hexdigest()


def read(path):
    try:
        with open(path) as file:
            return file.read().split()
    except OSError:
        return []


def works(python):
    """Whether the environment's Python starts and has pip."""
    try:
        return subprocess.run([python, "-m", "pip", "--version"],
                              capture_output=True).returncode == 0
    except OSError:
        return False


def make_environment(venv, python, unfinished):
    """Create the environment; one that was left half made is made anew."""
    if os.path.isdir(venv):
        if not os.path.exists(os.path.join(venv, "pyvenv.cfg")) and os.listdir(venv):
            raise Problem(f"{venv} exists and is no virtual environment: rename it, or "
                          "choose another with VENV=")
        if unfinished or not works(python):
            say("an earlier installation was interrupted or broken: making it anew")
            shutil.rmtree(venv)
    if not os.path.isdir(venv) or not os.path.exists(python):
        say(f"creating {venv} with Python {platform.python_version()}")
        done = subprocess.run([sys.executable, "-m", "venv", venv],
                              capture_output=True, text=True)
        if done.returncode:
            reason = explain(done.stdout + done.stderr, 4)
            raise Problem(reason or "the virtual environment could not be made:\n"
                          + done.stdout + done.stderr)


def install(extra, venv, wish):
    venv = os.path.abspath(venv)
    python = os.path.join(venv, "bin", "python")
    stamp, started = os.path.join(venv, "sd-finished"), os.path.join(venv, "sd-started")
    done = read(stamp)
    # Looking for a GPU costs a second: an environment keeps the build it was made with.
    build = wish if wish != "auto" else (done[1] if len(done) > 1 else torch_build(wish))
    current = done[:1] == [fingerprint(venv, build)]
    if current and {extra, "dev"} & set(done[2:]) and os.path.exists(python):
        return
    require_python()
    require_venv_module()
    need = 4 if build == "cpu" or platform.system() != "Linux" else 12
    if not done:
        require_disk(venv, need)
    make_environment(venv, python, unfinished=os.path.exists(started))
    with open(started, "w") as file:
        file.write("removed when the installation is complete\n")
    if os.path.exists(stamp):
        os.remove(stamp)
    log = os.path.join(venv, "install.log")
    say("this takes a few minutes the first time; the record is " + log)
    install_torch(python, build, log, need)
    say(f"installing the course and what its chapters use [{extra}]")
    # torch by name once more: if a page of the index cannot be read for a moment, pip
    # looks for other combinations, and would otherwise try the CUDA build.
    pip_or_explain(python, ["-c", "constraints.txt", torch_requirement(build),
                            "-e", f".[{extra}]"], log, need)
    trial = subprocess.run([python, "-c", "import torch, numpy, sdlib"],
                           capture_output=True, text=True, cwd=venv)
    if trial.returncode:
        raise Problem("what was installed does not start:\n" + trial.stderr[-2000:])
    extras = ({extra} | set(done[2:])) if current else {extra}
    with open(stamp + ".part", "w") as file:
        file.write("\n".join([fingerprint(venv, build), build] + sorted(extras)) + "\n")
    os.replace(stamp + ".part", stamp)
    os.remove(started)
    say("done")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("extra", nargs="?", default="course",
                        choices=["course", "book", "dev"])
    parser.add_argument("--venv", default=os.path.join(ROOT, ".venv"))
    parser.add_argument("--torch", default="auto", choices=["auto", "cpu", "default"])
    args = parser.parse_args()
    try:
        install(args.extra, args.venv, args.torch)
    except Problem as problem:
        if problem.__cause__ is not None:
            print(problem.__cause__, file=sys.stderr)
        sys.exit("\n[install] " + str(problem))
    except KeyboardInterrupt:
        sys.exit("\n[install] Interrupted. Run the same command again: it repairs itself.")
    except OSError as error:
        if error.errno != 28:
            raise
        sys.exit("\n[install] " + CAUSES[0][1].format(need=4))


if __name__ == "__main__":
    main()
