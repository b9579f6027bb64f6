"""What must run on a GPU, tried on the pretended one beside the CPU: `python device_cases.py`.

Prints a line of JSON, case -> "" or what went wrong, of all cases or of those named. A case is a
function of the device that returns tensors, each of which must be the CPU's and lie on the device.
"""

import json
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers import relative_error  # noqa: E402
from pretended_gpu import OnGPU, install  # noqa: E402

from sdlib import noise, schedulers  # noqa: E402
from sdlib.img2img import ImageToImage  # noqa: E402
from sdlib.inpainting import Inpainting  # noqa: E402
from sdlib.interpolation import Walk  # noqa: E402
from sdlib.metrics import clip_score, rank_captions  # noqa: E402
from sdlib.offload import offload  # noqa: E402
from sdlib.own_pictures import judge_folder, load_judge, read_exam  # noqa: E402
from sdlib.pipeline import StableDiffusion  # noqa: E402
from sdlib.previews import Watch, learn_preview  # noqa: E402
from sdlib.runs import TrainingConfig  # noqa: E402
from sdlib.scenes import scene  # noqa: E402
from sdlib.tiling import TiledVAE, Tiling  # noqa: E402
from sdlib.training import Trainer, train_step, validate  # noqa: E402
from sdlib.unet import UNet2DConditionModel, UNetConfig  # noqa: E402

MODEL = ROOT / "models" / "emoji-sd"
FOX = "a fox to the left of a pizza, blue background"
QUICK = {"num_inference_steps": 3, "seed": 0, "progress": False, "output_type": "pt"}
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


def pipeline(device, nine=False):
    pipe = StableDiffusion.from_pretrained(MODEL, device=device)
    if nine:
        config = UNetConfig.from_dict(pipe.unet.config.to_dict() | {"in_channels": 9})
        torch.manual_seed(0)
        pipe.unet = UNet2DConditionModel(config).eval().to(device)
    return pipe


def picture():
    return Image.linear_gradient("L").resize((64, 64)).convert("RGB")


def hole():
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    return mask


@case
def text_to_image(device):
    return pipeline(device)([FOX, "two red hearts"], negative_prompt="a pizza", eta=0.5,
                            guidance_rescale=0.5, clip_skip=1, **QUICK)


@case
def weighted_prompts(device):
    return pipeline(device)(f"(a fox:1.3) [left] {FOX * 4}", weighted=True, **QUICK)


@case
def every_scheduler(device):
    pipe, found = pipeline(device), []
    for name in sorted(dir(schedulers)):
        if name.endswith("Scheduler") and name != "Scheduler":
            kind = getattr(schedulers, name)
            config = {k: v for k, v in pipe.scheduler.config.to_dict().items()
                      if k in ("prediction_type", "beta_start", "beta_end", "beta_schedule")}
            if name == "LCMScheduler":
                config["original_inference_steps"] = 50
            pipe.scheduler = kind(**config)
            found.append(pipe(FOX, **QUICK | {"num_inference_steps": 6}))
    assert len(found) >= 8
    return found


@case
def image_to_image(device):
    return ImageToImage.from_pipe(pipeline(device))(FOX, picture(), strength=0.7, **QUICK)


@case
def inpainting(device):
    return Inpainting.from_pipe(pipeline(device))(FOX, picture(), hole(), strength=0.7,
                                                  paste_original=True, **QUICK)


@case
def inpainting_nine_channels(device):
    return Inpainting.from_pipe(pipeline(device, nine=True))(FOX, picture(), hole(), **QUICK)


@case
def walk(device):
    return Walk.from_pipe(pipeline(device))([FOX, "two red hearts"], [0, 1], 3,
                                            num_inference_steps=2, progress=False,
                                            output_type="pt")


@case
def previews_and_tiles(device):
    pipe = pipeline(device)
    watch = Watch(learn_preview(pipe, torch.randn(2, 4, 16, 16).to(device)))
    pipe.vae = TiledVAE(pipe.vae, Tiling(tiles=True, slices=True, tile=8))
    image = pipe(FOX, callback_on_step_end=watch, **QUICK)
    return [image, watch.film(8).to(device)]  # the film comes home to the CPU


@case
def parts_that_take_turns(device):
    """The parts live on the CPU and visit the device; the picture comes home, too."""
    pipe = pipeline("cpu")
    stage = offload(pipe, device)
    image = pipe(FOX, **QUICK)
    assert [name for _, name in stage.moves] == [
        "text_encoder", "text_encoder", "unet", "unet", "vae"]
    assert image.device.type == "cpu"
    return image.to(device)


def trained(device, task, **options):
    """The gradient of one step of training, and what validation says after it.

    (Not the weights: AdamW's first step follows the sign of gradients however small.)
    """
    with tempfile.TemporaryDirectory() as folder:
        for part in ("vae", "text_encoder", "tokenizer", "scheduler", "unet"):
            Path(folder, part).symlink_to(MODEL / part)
        config = TrainingConfig(task=task, output=folder, steps=2, batch_size=4,
                                precision="float32", options=options)
        trainer = Trainer(config, torch.device(device))
        trainer.task.prepare(Path(folder))
        train_step(trainer)
        module = trainer.module
        grads = [p.grad for p in module.parameters()]
        assert all(g is not None and g.shape == p.shape
                   for g, p in zip(grads, module.parameters()))
        figures = validate(trainer, 1)
        assert all(w.device.type == device and w.isfinite().all()
                   for w in (*module.parameters(), *trainer.ema.weights.values()))
        return [torch.cat([g.flatten() for g in grads]),
                torch.tensor([*figures.values()]).to(device)]


@case
def training_the_vae(device):
    return trained(device, "vae")


@case
def training_clip(device):
    return trained(device, "clip", tokenizer_captions=500)


@case
def training_the_unet(device):
    return trained(device, "diffusion", scenes=64)


@case
def training_on_close_ups(device):
    return trained(device, "diffusion", scenes=64, close_ups=1.0)


@case
def training_on_pictures(device):
    with tempfile.TemporaryDirectory() as folder:
        for k in range(5):
            picture().rotate(30 * k).save(Path(folder, f"{k}.png"))
            Path(folder, f"{k}.txt").write_text(FOX)
        return trained(device, "pictures", pictures=folder, size=64,
                       gradient_checkpointing=True)


@case
def judging(device):
    pipe, found = pipeline(device), []
    with tempfile.TemporaryDirectory() as folder:
        for k in range(6):
            picture().rotate(30 * k).save(Path(folder, f"{k}.png"))
            Path(folder, f"{k}.txt").write_text(f"{FOX} {k}")
        real, captions = read_exam(folder, 64, 6)
    report = judge_folder(pipe.vae, *load_judge(MODEL, device), real, real.flip(3), captions)
    for group in ("vae", "real", "painted", "sets"):
        found += [torch.tensor([float(x)]).to(device) for x in report[group].values()]
    clip, words = load_judge(MODEL, device)
    found += [clip_score(clip, words, real, captions).to(device),
              clip.encode_text(words(captions).to(device))]
    beaten = rank_captions(clip, words, real[0], scene(1), captions, seed=0)
    return [*found, torch.tensor([1.0, *map(float, beaten)]).to(device)]


@case
def refuses_what_a_gpu_refuses(device):
    """The pretended GPU itself: what must fail does, and says so; what must not, does not."""
    if device == "cpu":
        return torch.ones(1)
    x, y, one = torch.ones(2, 3, device="cuda"), torch.ones(3), torch.tensor(1.0)
    first, mask, cpu = torch.tensor([0]), torch.tensor([True, False]), torch.Generator()

    def assign():
        x[first] = y

    wrong = [
        lambda: x + y, lambda: y.reshape(1, 3) @ x.T, lambda: torch.cat([x, y[None]]),
        lambda: x.numpy(), lambda: y[first.to("cuda")], lambda: torch.where(y > 0, x, 0.0),
        lambda: torch.nn.Linear(3, 3)(x), lambda: torch.stack([one, one.to("cuda")]),
        lambda: y.clone().add_(x[0]), lambda: one.clone().add_(x.sum()), assign,
        lambda: x.index_put_((first,), y[None]), lambda: x.index_select(0, first),
        lambda: torch.randn(3, generator=cpu, device="cuda"),
        lambda: torch.randn_like(x, generator=cpu), lambda: torch.zeros(2, device="cuda:5")]
    for k, mistake in enumerate(wrong):
        try:
            mistake()
        except (RuntimeError, TypeError) as error:
            assert any(words in str(error) for words in (
                "same device", "to numpy", "invalid device")), error
        else:
            raise AssertionError(f"number {k} would have failed on a GPU")
    z = torch.zeros(2, 3, device="cuda")
    z[0] = y  # copied across
    z[1, :2] = 2
    z[mask] = x[:1] * 3
    w = torch.ones(3, requires_grad=True)
    (w.to("cuda") * 4).backward(gradient=torch.ones(3, device="cuda") * 5)
    half = torch.nn.Linear(2, 2).to("cuda").half()
    assert w.grad.tolist() == [20.0] * 3 and half.weight.inner.dtype == torch.float16
    assert (x + one).is_cuda and x[first].is_cuda and x.lerp(x, one).is_cuda
    assert (x.cpu() + y).device.type == "cpu" and x.to(y).device.type == "cpu"
    assert torch.zeros_like(x, device="cpu").device.type == "cpu" and f"{x.sum():.1f}" == "6.0"
    torch.manual_seed(0)
    here, there = torch.randn(3), torch.randn(3, device="cuda")
    torch.manual_seed(0)
    assert here.equal(torch.randn(3)) and not here.equal(there.cpu())
    assert torch.randn(3, generator=torch.Generator("cuda"), device="cuda").is_cuda
    assert z.tolist() == [[3, 3, 3], [2, 2, 0]]
    return torch.ones(1, device="cuda")


def main():
    install()
    if "--plant" in sys.argv:  # noise scales that stay where the schedule is
        like = noise.alpha_bar_like
        noise.alpha_bar_like = lambda process, t, x: like(process, t, x.cpu())
    found = {}
    for name in [word for word in sys.argv[1:] if word != "--plant"] or CASES:
        try:
            expected, got = (in_a_list(CASES[name], device) for device in ("cpu", "cuda"))
            assert not any(isinstance(x, OnGPU) for x in expected), "the CPU's is on the GPU"
            assert all(isinstance(x, OnGPU) for x in got), "a result is not on the GPU"
            for ours, theirs in zip(got, expected, strict=True):
                error = relative_error(ours.detach().cpu(), theirs.detach())
                assert error < 1e-4, f"differs by {error:.2g}"
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
    print(json.dumps(found))


def in_a_list(function, device):
    torch.manual_seed(0)
    result = function(device)
    return [result] if isinstance(result, torch.Tensor) else result


if __name__ == "__main__":
    main()
