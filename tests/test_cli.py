"""The command `sdlib`: each word of it tried, its errors, its exit codes, its promises."""

import argparse
import json
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_pipeline import FOX, make_pipe
from tree import PYPROJECT, ROOT

from sdlib import cli, comparison, conversion, editing, pipeline, training, verify
from sdlib.checkpoints import load_checkpoint
from sdlib.opening import find_model, open_model, read_model
from sdlib.parts import Parts
from sdlib.plan import read_parameters, save_png
from sdlib.schedulers import PNDMConfig, PNDMScheduler

diffusers = pytest.importorskip("diffusers")

FEW = ["--device", "cpu", "--steps", "2", "--seed", "3"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the miniature model as folder, and as one file."""
    place = tmp_path_factory.mktemp("models")
    make_pipe(PNDMScheduler.from_config(PNDMConfig.sd15())).save_pretrained(place / "mini")
    make_pipe(in_channels=9).save_pretrained(place / "nine")
    assert cli.main(["convert", f"{place / 'mini'}", f"{place / 'mini.safetensors'}"]) == 0
    assert cli.main(["convert", f"{place / 'mini'}", f"{place / 'mini.ckpt'}"]) == 0
    return place


@pytest.fixture
def scratch(tmp_path, monkeypatch, models):
    """An empty working directory in which mini, nine, mini.safetensors, mini.ckpt lie."""
    monkeypatch.chdir(tmp_path)
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.fixture
def ask(scratch, capsys):
    """Run a command line in this process; its exit code and what it wrote."""
    def run(*words):
        capsys.readouterr()
        code = cli.main([str(word) for word in words])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err
    return run


def shell(*words, **options):
    return subprocess.run([sys.executable, "-m", "sdlib", *words], capture_output=True,
                          text=True, **options)


# The program --------------------------------------------------------------------------

def test_it_is_installed_as_a_program():
    assert PYPROJECT["project"]["scripts"] == {"sdlib": "sdlib.cli:main"}


def test_help_and_version_do_not_wait_for_torch():
    for words in ([], ["--help"], ["--version"], ["genrate"]):
        code = (f"import sys; from sdlib.cli import main; code = main({words!r}); "
                "assert 'torch' not in sys.modules; sys.exit(code)")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True,
                              capture_output=True)
        assert done.returncode == (2 if words == ["genrate"] else 0), done.stderr
        said = done.stdout + done.stderr
        assert "usage: sdlib" in said or said == f"sdlib {PYPROJECT['project']['version']}\n"
    assert "there is no command 'genrate', only generate, edit" in said


def options_of(parser):
    return {tuple(a.option_strings) or a.dest: a.help for a in parser._actions}


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_each_command_explains_itself_and_is_its_chapters_own(name, capsys):
    module = {"generate": pipeline, "edit": editing, "train": training,
              "convert": conversion, "verify": verify}.get(name)
    if name == "evaluate":
        module = pytest.importorskip("sdlib.metrics")
    if not hasattr(module, "make_parser"):
        pytest.skip("the chapter has no parser yet")
    assert cli.main([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: sdlib {name} [-h]")
    assert f"  {name} " in cli.make_parser().format_help()
    whole = options_of(cli.COMMANDS[name][0]().parser)
    own = options_of(module.make_parser())
    assert own.items() <= whole.items()
    assert set(whole) - set(own) <= {("--like",)}
    assert ("--config FILE" in said) == (name != "train")
    assert ("A model is a folder, " in said) == (("--like",) in whole)


@pytest.mark.parametrize("words, code, message", [
    (["generate"], 2, "arguments are required: prompt"),
    (["generate", FOX, "--steps", "many"], 2, "invalid int value: 'many'"),
    (["generate", FOX, "--stpes", "3"], 2, "unrecognized arguments: --stpes"),
    (["generate", FOX, "--dtype", "int8"], 2, "invalid choice: 'int8'"),
    (["generate", FOX, "--model", "nothing"], 1, "no model 'nothing': give a folder, a"),
    (["generate", FOX, "--model", "owner/name"], 1, "write owner/name@ and the 40"),
    (["generate", FOX, "--model", "mini", "--height", "30"], 1, "the nearest is 32"),
    (["generate", FOX, "--model", "mini", "--steps", "0"], 1, "from 1 to 1000"),
    (["generate", FOX, "--model", "mini", "--number", "0"], 1, "must be 1 or more"),
    (["generate", FOX, "--model", "nine"], 1, "for inpainting"),
    (["generate", FOX, "--model", "mini/unet"], 1, "lacks unet, vae"),
    (["generate", FOX, "--model", "mini.safetensors"], 1, "needs --like FOLDER"),
    (["generate", FOX, "--device", "cuda:7"], 1, "no device 'cuda:7' here"),
    (["generate", FOX, "--device", "gpu"], 1, "there is no device 'gpu'"),
    (["generate", FOX, "--out", "mini"], 1, "--out mini is a folder"),
    (["generate", FOX, "--out", "mini.ckpt/a.png"], 1, "mini.ckpt is no folder"),
    (["generate", FOX, "--out", "fox.gif"], 1, "must name a .png file"),
    (["edit", "none.png", FOX, "--model", "mini"], 1, "none.png"),
    (["edit", "mini.ckpt", FOX, "--model", "mini"], 1, "mini.ckpt"),
    (["train", "none.yaml"], 1, "there is no configuration none.yaml"),
    (["verify", "nothing"], 1, "there is no model 'nothing'"),
    (["verify", "mini", "--size", "30"], 1, "multiple of 4, not 30"),
    (["verify", "mini", "--size", "-4"], 1, "multiple of 4, not -4"),
    (["verify", "mini", "--steps", "few"], 2, "invalid int value"),
    (["convert", "mini"], 2, "arguments are required: TARGET"),
    (["convert", "nothing", "a.ckpt"], 1, "there is no model 'nothing'"),
    (["convert", "mini", "mini.ckpt"], 1, "mini.ckpt exists already; --force"),
    (["convert", "mini.ckpt", "mini"], 1, "mini exists already; --force replaces it"),
    (["convert", "mini", "a.pt"], 1, "must end in .safetensors or .ckpt"),
    (["convert", "mini.ckpt", "a"], 1, "needs --like FOLDER"),
    (["convert", "mini.ckpt", "mini.safetensors/a"], 1, "is no folder"),
    (["convert", "mini", "a.ckpt", "--variant", "fp8"], 1, "no weights of the variant"),
    (["convert", "mini.ckpt", "a", "--like", "mini", "--sha256", "0" * 64], 1, "SHA-256"),
])
def test_errors_are_one_line_with_their_exit_code(ask, scratch, words, code, message):
    if words[0] == "train" and not hasattr(training, "make_parser"):
        pytest.skip("the chapter has no parser yet")
    before = sorted(scratch.iterdir())
    got, out, err = ask(*words)
    assert got == code and message in err, err
    if code == 1:
        assert err.startswith("error: ") and err.count("\n") == 1
    assert sorted(scratch.iterdir()) == before


def test_protected_places_are_noticed_before_the_work(ask, scratch, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for words in (["generate", FOX, "--out", "new/fox.png"], ["convert", "mini", "a.ckpt"]):
        code, _, err = ask(*words)
        assert code == 1 and "cannot be written: . is protected" in err


def test_failures_of_every_kind_are_one_line(ask, monkeypatch):
    for error, words in (
            (OSError(28, "No space left on device", "fox.png"),
             "No space left on device: fox.png"),
            (RuntimeError("CUDA out of memory.\nTried to allocate 2 GiB"),
             "CUDA out of memory. Tried to allocate 2 GiB"), (MemoryError(), "MemoryError")):
        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(pipeline, "paint", fail)
        assert ask("generate", FOX) == (1, "", f"error: {words}\n")


def test_warnings_are_one_line(ask):
    code, _, err = ask("generate", FOX + ", and a pizza" * 30, "--model", "mini", *FEW)
    line = next(x for x in err.splitlines() if x.startswith("warning: "))
    assert code == 0 and "this part is cut" in line and ".py" not in line


def test_ctrl_c(ask, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "paint", stop)
    code, _, err = ask("generate", FOX)
    assert code == 130 and "interrupted: the pictures named above are whole" in err
    monkeypatch.setattr(conversion, "save_checkpoint", stop)
    code, _, err = ask("convert", "mini", "new.ckpt")
    assert code == 130 and "the target is as it was, or" in err
    assert not Path("new.ckpt").exists()


def test_a_real_ctrl_c(models, tmp_path):
    program = ("import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
               "from sdlib.cli import main; sys.exit(main())")  # a job in the background ignores it
    process = subprocess.Popen(
        [sys.executable, "-c", program, "generate", FOX, "--model", f"{models / 'mini'}",
         "--device", "cpu", "--steps", "900", "--out", f"{tmp_path / 'fox.png'}"],
        cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while process.stderr.read(1) != b"%":  # the progress bar has begun
        assert process.poll() is None
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"\ninterrupted: " in said and b"Traceback" not in said
    assert not (tmp_path / "fox.png").exists()


def test_options_from_a_file(ask, scratch):
    (scratch / "my.yaml").write_text("model: mini\nsteps: 2\nseed: 5\nheight: 24\n"
                                     "negative: a pizza\ndevice: cpu\nlike:\n")
    for words in (["--config", "my.yaml"], ["--config=my.yaml"]):
        code, out, err = ask("generate", FOX, *words, "--seed", "7", "--out", "a.png")
        assert code == 0 and "a.png: 32x24, seed 7, 2 steps" in out, err
    assert read_parameters("a.png")["negative_prompt"] == "a pizza"
    for words in (["--config=", FOX], [FOX, "--config="]):  # an empty variable of the shell
        code, _, err = ask("generate", *words)
        assert code == 1 and "No such file" in err
    (scratch / "flags.yaml").write_text("paste_original: true\n")
    save_png(Image.new("RGB", (32, 32)), "in.png")
    code, _, err = ask("edit", "in.png", FOX, "--model", "mini", "--config", "flags.yaml")
    assert code == 1 and "--paste-original needs a --mask" in err


@pytest.mark.parametrize("text, code, message", [
    ("stpes: 3", 2, "unrecognized arguments: --stpes=3"),
    ("steps: many", 2, "invalid int value: 'many'"),
    ("steps: [1, 2]", 1, "one `name: value` per line"),
    ("just words", 1, "one `name: value` per line"),
    ("steps: {", 1, "wrong.yaml is no YAML"),
    (None, 1, "No such file or directory: wrong.yaml"),
])
def test_wrong_files_of_options(ask, scratch, text, code, message):
    if text is not None:
        (scratch / "wrong.yaml").write_text(text)
    got, _, err = ask("generate", FOX, "--config", "wrong.yaml")
    assert got == code and message in err
    assert ask("generate", FOX, "--config")[0] == 2
    assert "write --config in full" in ask("generate", FOX, "--conf", "wrong.yaml")[2]


# generate and edit --------------------------------------------------------------------

def test_generate_paints_what_the_chapters_command_paints(models, tmp_path):
    words = [FOX, "--model", f"{models / 'mini'}", *FEW, "--number", "2"]
    done = shell("generate", *words, "--out", f"{tmp_path / 'new' / 'a.png'}", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": 32x32, seed ") == 2 and "100%" in done.stderr
    pipeline.main([*words, "--out", f"{tmp_path / 'b.png'}"])
    for seed in (3, 4):
        ours, theirs = (Image.open(tmp_path / name).tobytes()
                        for name in (f"new/a-{seed}.png", f"b-{seed}.png"))
        assert ours == theirs
    assert read_parameters(tmp_path / "new" / "a-3.png")["prompt"] == FOX


@pytest.mark.parametrize("words", [[], ["--mask", "mask.png"]], ids=["image", "mask"])
def test_edit_and_generate_take_models_of_any_layout(ask, scratch, words):
    save_png(Image.new("RGB", (32, 32), "navy"), "in.png")
    save_png(Image.new("L", (32, 32), 255), "mask.png")
    pictures = {}
    for model in ("mini", "mini.safetensors", "mini.ckpt"):
        like = [] if model == "mini" else ["--like", "mini"]
        code, out, err = ask("edit", "in.png", FOX, "--model", model, *like, *FEW, *words,
                             "--steps", "8", "--out", "out.png")
        assert code == 0 and "out.png: 32x32, seed 3" in out, err
        pictures[model] = Image.open("out.png").tobytes()
        code, _, err = ask("generate", FOX, "--model", model, *like, *FEW, "--out", "g.png")
        assert code == 0, err
    assert len(set(pictures.values())) == 1


def test_the_courses_own_model_has_a_name(scratch, monkeypatch):
    for source in (None, "emoji-sd"):
        assert find_model(source) == ROOT / "models" / "emoji-sd"
    (scratch / "emoji-sd").mkdir()
    assert str(find_model("emoji-sd")) == "emoji-sd"  # what lies here comes first


def test_folders_that_chapter_13_cannot_read_are_opened(scratch):
    """Half-precision variants alone, as some published folders are."""
    pipe = open_model("mini", device="cpu")
    pipe.save_pretrained("half", torch.float16)
    for path in scratch.glob("half/*/*.safetensors"):
        path.rename(path.with_name(path.stem + ".fp16.safetensors"))
    half = open_model("half", device="cpu").unet.conv_in.weight
    assert torch.equal(half, pipe.unet.conv_in.weight.half().float())


# convert ------------------------------------------------------------------------------

def states(place):
    pipe, _ = load_checkpoint(place, device="cpu", like=None if place == "mini" else "mini")
    return {f"{part}.{name}": x for part in Parts.modules
            for name, x in getattr(pipe, part).state_dict().items()}


def test_there_and_back_has_the_same_bits(ask, scratch):
    for source, target in (("mini", "a.safetensors"), ("a.safetensors", "b.ckpt"),
                           ("b.ckpt", "new/folder"), ("new/folder", "copy")):
        like = [] if (scratch / source).is_dir() else ["--like", "mini"]
        code, out, err = ask("convert", source, target, *like)
        assert code == 0, err
        assert f"reading {source}\n" in out and f"writing {target} in float32\n" in out
        assert "used: " in out and out.count(" bytes, SHA-256 ") >= 2
    first, last = states("mini"), states("copy")
    assert first.keys() == last.keys()
    assert all(torch.equal(x, last[name]) for name, x in first.items())
    for path in ("model_index.json", "scheduler/scheduler_config.json", "unet/config.json",
                 "tokenizer/vocab.json"):
        assert json.loads((scratch / "mini" / path).read_text()) == json.loads(
            (scratch / "copy" / path).read_text()), path
    diffusers.StableDiffusionPipeline.from_pretrained("copy", safety_checker=None)


def test_precision_is_the_sources_or_the_one_asked_for(ask, scratch):
    def kinds(path):
        return {x.dtype for x in load_file(path).values()}

    assert ask("convert", "mini", "half.safetensors", "--dtype", "float16")[0] == 0
    assert kinds("half.safetensors") == {torch.float16}
    assert ask("convert", "half.safetensors", "half", "--like", "mini")[0] == 0
    assert kinds("half/unet/diffusion_pytorch_model.safetensors") == {torch.float16}
    assert ask("convert", "half", "full.safetensors", "--dtype", "float32")[0] == 0
    assert kinds("full.safetensors") == {torch.float32}
    small, full = load_file("half.safetensors"), load_file("full.safetensors")
    assert all(torch.equal(x.float(), full[name]) for name, x in small.items())


def test_numbers_that_do_not_fit_are_refused(ask, scratch):
    pipe = open_model("mini", device="cpu")
    with torch.no_grad():
        pipe.vae.decoder.conv_in.bias[0] = 1e6
    pipe.save_pretrained("wide")
    code, _, err = ask("convert", "wide", "half.safetensors", "--dtype", "float16")
    assert code == 1 and "decoder.conv_in.bias that are not finite in torch.float16" in err
    assert not (scratch / "half.safetensors").exists()
    assert ask("convert", "wide", "half.safetensors", "--dtype", "bfloat16")[0] == 0


def test_force_replaces_models_and_nothing_else(ask, scratch):
    convert = ["convert", "mini.ckpt", "--like", "mini", "--force"]
    (scratch / "thesis").mkdir()
    assert ask("convert", "mini.ckpt", "thesis", "--like", "mini")[0] == 0  # it was empty
    assert ask(*convert, "thesis")[0] == 0
    (scratch / "thesis" / "chapter.tex").write_text("years of work")
    code, _, err = ask(*convert, "thesis")
    assert code == 1 and "also holds chapter.tex, which would be lost" in err
    (scratch / "old.safetensors").write_bytes(b"old")
    assert ask(*convert, "old.safetensors")[0] == 0
    assert (scratch / "old.safetensors").stat().st_size > 1000
    (scratch / "folder.ckpt").mkdir()
    assert "a file cannot take its place" in ask(*convert, "folder.ckpt")[2]
    (scratch / "notes").write_text("a text")
    assert "a folder cannot take its place" in ask(*convert, "notes")[2]


@pytest.mark.parametrize("target", ["old.safetensors", "old"])
def test_a_failed_conversion_leaves_what_was_there(ask, scratch, monkeypatch, target):
    assert ask("convert", "mini", target)[0] == 0

    def contents():
        return {p: p.read_bytes() for p in scratch.rglob("old*/**/*")
                if p.is_file()} | {p: p.read_bytes() for p in scratch.glob("old*.saf*")}

    def full(*_, **__):
        raise OSError(28, "No space left on device", "old")

    before, names = contents(), sorted(scratch.iterdir())
    monkeypatch.setattr("sdlib.checkpoints.save_file", full)
    monkeypatch.setattr("sdlib.parts.write_json", full)
    code, _, err = ask("convert", "mini", target, "--force", "--dtype", "float16")
    assert code == 1 and "No space left on device" in err
    assert contents() == before and sorted(scratch.iterdir()) == names


def test_a_full_disk_is_noticed_before(ask, monkeypatch):
    monkeypatch.setattr(conversion.shutil, "disk_usage",
                        lambda place: types.SimpleNamespace(free=1000))
    code, _, err = ask("convert", "mini", "a.ckpt")
    assert code == 1 and "0.00 GB are free" in err


def test_an_inpainting_model_says_so(ask, scratch):
    assert ask("convert", "nine", "nine.ckpt")[0] == 0
    assert ask("convert", "nine.ckpt", "again", "--like", "mini")[0] == 0
    index = json.loads((scratch / "again" / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"
    diffusers.StableDiffusionInpaintPipeline.from_pretrained("again", safety_checker=None)


# verify -------------------------------------------------------------------------------

@pytest.mark.parametrize("model", ["mini", "nine", "mini.safetensors", "mini.ckpt"])
def test_verify_agrees(ask, model):
    like = ["--like", "mini"] if "." in model else []
    code, out, err = ask("verify", model, *like, "--size", "32", "--device", "cpu")
    assert code == 0, out + err
    rows = [line for line in out.splitlines() if line.endswith("  yes")]
    assert len(rows) == (12 if model == "nine" else 13) and "all agree" in out
    assert ("steps of PNDM" in out) == (model != "nine")
    assert "SHA-256" in out and f"diffusers {diffusers.__version__}" in out


@pytest.fixture(scope="module")
def both(models):
    ours, _ = read_model(models / "mini", device="cpu")
    return ours, verify.their_pipeline(models / "mini", ours)


def wrong_weight(ours):
    weight = ours.unet.up_blocks[1].resnets[0].conv1.weight
    weight.data[0, 0, 0, 0] += 0.5


def wrong_vae_eps(ours):
    ours.vae.decoder.conv_norm_out.eps = 1e-5


def wrong_text_eps(ours):
    ours.text_encoder.encoder.layers[1].layer_norm2.eps = 1e-6


def wrong_padding(ours):
    ours.tokenizer.pad_token_id = 0


def wrong_schedule(ours):
    ours.scheduler = PNDMScheduler.from_config(ours.scheduler.config, steps_offset=0)


@pytest.mark.parametrize("spoil, failed, place", [
    (wrong_weight, "U-Net, t = 999", "other weights: 1, up_blocks.1.resnets.0.conv1.weight "
     "first; first layer: up_blocks.1.resnets.0.conv1: same input"),
    (wrong_vae_eps, "constants of ", "vae.decoder.conv_norm_out first"),
    (wrong_text_eps, "constants of ", "text_encoder.encoder.layers.1.layer_norm2"),
    (wrong_padding, "tokens of 6 prompts", "other tokens for "),
    (wrong_schedule, "4 steps of PNDM, guided", "look at the rows above"),
], ids=lambda x: getattr(x, "__name__", ""))
def test_planted_errors_are_noticed_and_placed(models, both, capsys, spoil, failed, place):
    ours, _ = read_model(models / "mini", device="cpu")
    spoil(ours)
    found = comparison.compare(ours, both[1], diffusers.DDIMScheduler, size=32)
    assert any(name.startswith(failed) for name in found)
    assert place in capsys.readouterr().out


def test_verify_says_no_with_exit_code_1(ask, monkeypatch):
    real = verify.read_model

    def spoiled(*words):
        pipe, report = real(*words)
        wrong_weight(pipe)
        return pipe, report

    monkeypatch.setattr(verify, "read_model", spoiled)
    code, out, _ = ask("verify", "mini", "--size", "32", "--device", "cpu", "--steps", "1")
    assert code == 1 and "  NO" in out and "differ: U-Net, t = 999; " in out
    assert "all agree" not in out


@pytest.mark.parametrize("missing", ["diffusers", "transformers"])
def test_without_the_references_verify_says_what_to_install(ask, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    code, out, err = ask("verify", "mini")
    assert code == 1 and verify.PIP in err and missing in err and not out
    dev = PYPROJECT["project"]["optional-dependencies"]["dev"]
    assert all(need in dev for need in verify.PIP.split('"')[1::2])


def test_references_that_are_too_old_are_refused(ask, monkeypatch):
    """Their names and file layouts differ: the verdict would be false."""
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    code, out, err = ask("verify", "mini")
    assert code == 1 and "transformers 4.57.1 is too old" in err and verify.PIP in err
    assert not out


# train and evaluate -------------------------------------------------------------------

@pytest.mark.skipif(not hasattr(training, "make_parser"), reason="no parser yet")
def test_train_hands_over(ask, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "train", lambda *words: seen.append(words))
    monkeypatch.setattr(training, "read_config", lambda path: path)
    code, _, err = ask("train", "a.yaml", "--state", "s", "--device", "cpu")
    assert code == 0 and seen == [("a.yaml", "s", "cpu")], err
    assert ask("train", "a.yaml", "--device", "cuda:9")[0] == 1
    assert len(seen) == 1

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", stop)
    code, _, err = ask("train", "a.yaml")
    assert code == 130 and "the checkpoints in the --state folder are kept" in err


def test_evaluate_hands_over(ask, monkeypatch):
    """With a stand-in for chapter 14's module: its parser, its main, its exit."""
    metrics, seen = types.ModuleType("sdlib.metrics"), []

    def make_parser():
        parser = argparse.ArgumentParser()
        parser.add_argument("model", nargs="?")
        parser.add_argument("--out")
        return parser

    metrics.make_parser, metrics.main = make_parser, seen.append
    monkeypatch.setitem(sys.modules, "sdlib.metrics", metrics)
    monkeypatch.setattr("sdlib.metrics", metrics, raising=False)
    assert ask("evaluate", "mini", "--out", "b.json")[0] == ask("evaluate")[0] == 0
    assert seen == [["mini", "--out", "b.json"], []]
    for words, message in ((["nothing"], "there is no model 'nothing'"),
                           (["mini.ckpt"], "`sdlib convert mini.ckpt FOLDER` makes one"),
                           (["mini", "--out", "mini.ckpt/a"], "mini.ckpt is no folder")):
        code, _, err = ask("evaluate", *words)
        assert code == 1 and message in err
    assert len(seen) == 2
    metrics.main = lambda words: sys.exit("error: no pictures")
    assert ask("evaluate", "mini") == (1, "", "error: no pictures\n")


def test_evaluate_takes_a_folder_of_pictures(ask, scratch):
    code, _, err = ask("evaluate", "mini", "--data", "pictures", "--device", "cpu")
    assert code == 1 and "there is no folder of pictures 'pictures'" in err
    for k in range(5):
        save_png(Image.new("RGB", (40, 32), (50 * k, 0, 0)), f"own/{k}.png")
        (scratch / "own" / f"{k}.txt").write_text(FOX)
    code, _, err = ask("evaluate", "mini", "--data", "own", "--device", "cpu")
    assert code == 1 and "holds no image encoder" in err and "--clip" in err
    code, _, err = ask("evaluate", "--data", "pictures", "--device", "cpu", "--config", "o.yaml")
    assert code == 1 and "No such file" in err and "o.yaml" in err
    (scratch / "o.yaml").write_text("data: pictures\ndevice: cpu\nprompts: 6\n")
    code, _, err = ask("evaluate", "--config", "o.yaml")
    assert code == 1 and "there is no folder of pictures 'pictures'" in err
