"""Steps per second, memory and arithmetic of sdlib, beside diffusers, in one run.

    python tools/benchmark.py --batch 4                     SD 1.5's shape, 512 px
    python tools/benchmark.py --batch 4 --sdlib compile,channels-last --diffusers compile
    python tools/benchmark.py --small                       the emoji model, on a CPU too
    python tools/benchmark.py --table benchmark.jsonl       all runs so far as one table

Both sides get the same random weights (the speed does not depend on them), type, scheduler,
prompts and noise, and are timed in turns; how far their final latents differ is written
down, too. A side is "eager" or a list of: compile (max-autotune-no-cudagraphs),
reduce-overhead (compiled, with CUDA graphs), channels-last; sdlib also takes
separate-guidance (two calls of the U-Net where one on both halves is usual). "none" leaves
a side out; diffusers is left out by itself where it is not installed.

Timed is the pipeline from the prompt to the final latents, then the decoder. Memory is the
weights plus the most that was allocated beside them in a call, by torch's own account.
FLOP are counted (two per multiply-add), and the peak is that of a large matrix product
timed in the same run. Each run adds one line of JSON to --out.
"""

import argparse
import json
import math
import platform
import statistics
import sys
import tempfile
import time
import warnings
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from sdlib import StableDiffusion  # noqa: E402
from sdlib.clip import CLIPTextConfig, CLIPTextModel  # noqa: E402
from sdlib.costs import flops, weight_bytes  # noqa: E402
from sdlib.schedulers import (  # noqa: E402
    DDIMConfig,
    DDIMScheduler,
    EulerDiscreteConfig,
    EulerDiscreteScheduler,
    PNDMConfig,
    PNDMScheduler,
)
from sdlib.storage import load_strictly  # noqa: E402
from sdlib.tokenizer import Tokenizer  # noqa: E402
from sdlib.unet import UNet2DConditionModel, UNetConfig  # noqa: E402
from sdlib.vae import AutoencoderKL, VAEConfig  # noqa: E402

PROMPT = "a fox to the left of a pizza, blue background"
SCHEDULERS = {"ddim": (DDIMScheduler, DDIMConfig), "pndm": (PNDMScheduler, PNDMConfig),
              "euler": (EulerDiscreteScheduler, EulerDiscreteConfig)}
PARTS = ("unet", "vae", "text_encoder")
COMPILE = {"compile": "max-autotune-no-cudagraphs", "reduce-overhead": "reduce-overhead"}
WAYS = {"sdlib": {*COMPILE, "channels-last", "separate-guidance"},
        "diffusers": {*COMPILE, "channels-last"}}


# Two pipelines over the same weights --------------------------------------------------

def fill(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """Random weights scaled by fan-in; norms and biases as in a new network."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 1 / math.sqrt(math.prod(p.shape[1:])), generator=generator)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
    return module.eval()


def our_pipe(options) -> StableDiffusion:
    """The emoji model, or random weights of SD 1.5's shape made where they are used."""
    dtype = getattr(torch, options.dtype)
    if options.small:
        return StableDiffusion.from_pretrained(ROOT / "models/emoji-sd", dtype, options.device)
    generator = torch.Generator(options.device).manual_seed(0)
    parts = []
    for cls, config in ((UNet2DConditionModel, UNetConfig), (AutoencoderKL, VAEConfig),
                        (CLIPTextModel, CLIPTextConfig)):
        with torch.device("meta"):
            part = cls(config.sd15())
        parts.append(fill(part.to(dtype).to_empty(device=options.device), generator))
    scheduler, config = SCHEDULERS[options.scheduler]
    return StableDiffusion(*parts, Tokenizer.clip(), scheduler.from_config(config.sd15()))


def their_pipe(ours: StableDiffusion):
    """diffusers' pipeline around the same weights; None where it is not installed."""
    try:
        import diffusers
        import transformers
    except ImportError:
        return None
    config = ours.text_encoder.config.to_dict()
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    weight = ours.unet.conv_in.weight
    text = text.to(weight.device, weight.dtype)
    text.load_state_dict(ours.text_encoder.state_dict())
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(ours.unet.config.to_dict())
        vae = diffusers.AutoencoderKL.from_config(ours.vae.config.to_dict())
    load_strictly(unet, ours.unet.state_dict(), "sdlib")
    load_strictly(vae, ours.vae.state_dict(), "sdlib")
    with tempfile.TemporaryDirectory() as folder:
        ours.tokenizer.save_pretrained(folder)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    name = type(ours.scheduler).__name__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # on steps_offset
        scheduler = getattr(diffusers, name).from_config(
            ours.scheduler.config.to_dict() | {"_class_name": name})
        pipe = diffusers.StableDiffusionPipeline(
            vae=vae.eval(), unet=unet.eval(), text_encoder=text.eval(), tokenizer=tokenizer,
            scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Wrapped(nn.Module):
    """A U-Net that takes the time as a tensor on its own device, as compilers want it."""

    def __init__(self, unet: nn.Module, separate: bool = False):
        super().__init__()
        self.unet, self.config, self.conv_in = unet, unet.config, unet.conv_in
        self.separate = separate

    def forward(self, z, t, context):
        t = torch.as_tensor(t, device=z.device).expand(len(z))
        if not self.separate or len(z) % 2:
            return self.unet(z, t, context)
        return torch.cat([self.unet(*half) for half in zip(
            z.chunk(2), t.chunk(2), context.chunk(2))])


def prepare(pipe, ways: set[str], ours: bool) -> None:
    """Bring one side into the wanted state."""
    if "channels-last" in ways:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    for way in ways & set(COMPILE):
        pipe.unet.compile(mode=COMPILE[way])
        pipe.vae.decoder.compile(mode=COMPILE[way])
    if ours and ways - {"channels-last"}:
        pipe.unet = Wrapped(pipe.unet, "separate-guidance" in ways)


def callers(name: str, pipe, options) -> tuple:
    """Two functions: prompts to final latents, and latents to pictures."""
    prompts, size = [PROMPT] * options.batch, options.size
    seeds = list(range(options.batch))
    common = dict(num_inference_steps=options.steps, guidance_scale=options.guidance,
                  height=size, width=size, output_type="latent")
    if name == "sdlib":
        return (lambda: pipe(prompts, seed=seeds, progress=False, **common),
                lambda z: pipe.decode(z))

    def denoise():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            generators = [torch.Generator().manual_seed(s) for s in seeds]
            return pipe(prompts, generator=generators, **common).images

    @torch.no_grad()
    def decode(z):
        return pipe.vae.decode((z / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)).sample
    return denoise, decode


# Measures -----------------------------------------------------------------------------

def allocator_peak(call) -> int:
    """The most bytes that torch's CPU allocator held at once for `call`, beside what was
    there before: exact and repeatable, unlike the size of a process."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert most > 0, "nothing was recorded"
    return most


def peak_memory(call, device: str) -> int:
    """The most bytes allocated during `call`, beside what was there before."""
    if device == "cpu":
        return allocator_peak(call)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(call, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def matrix_peak(dtype: torch.dtype, device: str) -> float:
    """FLOP per second of the best large square matrix product."""
    best, count = 0.0, 5 if device == "cpu" else 30
    for n in (512, 1024) if device == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

        def product(a=a, b=b):
            for _ in range(count):
                a @ b
        product()  # warm
        taken = min(seconds(product, device) for _ in range(4))
        best = max(best, 2 * n**3 * count / taken)
    return best


def unet_flop(config: UNetConfig, size: int, length: int) -> int:
    """FLOP of one prediction for one picture, counted on shapes alone."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(config)
        z = torch.empty(1, config.in_channels, size, size)
        t, context = torch.empty(1), torch.empty(1, length, config.cross_attention_dim)
        return flops(lambda: unet(z, t, context))


def machine(device: str) -> str:
    if device != "cpu":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "diffusers", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "-"
    return found


def measure(pipes: dict, options) -> dict:
    """One run: everything about each side, timed in turns."""
    device, calls = options.device, {n: callers(n, p, options) for n, p in pipes.items()}
    latents = {name: calls[name][0]() for name in pipes}  # warms up, and compiles
    found = {}
    for name, (denoise, decode) in calls.items():
        z = latents[name]
        decode(z)
        beside = max(peak_memory(denoise, device), peak_memory(lambda d=decode, z=z: d(z), device))
        weights = sum(weight_bytes(getattr(pipes[name], part), getattr(torch, options.dtype))
                      for part in PARTS)
        found[name] = {"weights_bytes": weights, "beside_bytes": beside,
                       "seconds": [], "decode_seconds": []}
    for turn in range(options.repeats):
        for name in sorted(pipes, reverse=turn % 2 == 0):
            denoise, decode = calls[name]
            found[name]["seconds"].append(seconds(denoise, device))
            found[name]["decode_seconds"].append(
                seconds(lambda d=decode, z=latents[name]: d(z), device))
    difference = None
    if len(pipes) == 2:
        a, b = (latents[name].float() for name in ("sdlib", "diffusers"))
        difference = ((a - b).abs().max() / b.abs().max()).item()
    return found, difference


def run(options) -> dict:
    """The line of JSON for these options."""
    ours = our_pipe(options)
    config, length = ours.unet.config, ours.tokenizer.model_max_length
    if not options.size:
        options.size = config.sample_size * ours.vae.config.factor
    pipes = {}
    if options.sdlib != "none":
        pipes["sdlib"] = ours
    if options.diffusers != "none":
        theirs = their_pipe(ours)
        if theirs is None:
            print("diffusers or transformers is not installed: sdlib alone")
        else:
            pipes["diffusers"] = theirs.to(options.device)
    if not pipes:
        sys.exit("nothing to measure")
    for name, pipe in pipes.items():
        prepare(pipe, read_ways(name, getattr(options, name)), name == "sdlib")
    flop = unet_flop(config, options.size // ours.vae.config.factor, length)
    flop *= options.batch * (2 if options.guidance > 1 else 1)
    peak = matrix_peak(getattr(torch, options.dtype), options.device)
    found, difference = measure(pipes, options)
    for side in found.values():
        steps = options.steps / statistics.median(side["seconds"])
        side |= {"steps_per_second": steps, "flop_per_second": steps * flop,
                 "share_of_peak": steps * flop / peak,
                 "peak_bytes": side["weights_bytes"] + side["beside_bytes"],
                 "decode": statistics.median(side["decode_seconds"])}
    return {"when": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions(),
            "machine": machine(options.device), "settings": {
                k: v for k, v in vars(options).items() if k not in ("out", "table")},
            "flop_per_step": flop, "matrix_peak": peak, "latents_differ_by": difference,
            "sides": found}


# Words --------------------------------------------------------------------------------

def table(lines: list[dict]) -> str:
    """All runs as Markdown; the last column compares times with diffusers in the run."""
    rows = ["| machine, type, pixels | batch | side | steps/s | peak GB | TFLOP/s | share of "
            "matrix peak | decoder s | time / diffusers |", "|---" * 9 + "|"]
    for line in lines:
        settings = line["settings"]
        theirs = line["sides"].get("diffusers")
        for name, side in line["sides"].items():
            ratio = "" if name == "diffusers" or not theirs else format(statistics.median(
                a / b for a, b in zip(side["seconds"], theirs["seconds"])), ".2f")
            rows.append("| " + " | ".join([
                f"{line['machine']}, {settings['dtype']}, {settings['size']}",
                str(settings["batch"]), f"{name} {settings[name]}",
                f"{side['steps_per_second']:.2f}", f"{side['peak_bytes'] / 1e9:.3f}",
                f"{side['flop_per_second'] / 1e12:.2f}", f"{side['share_of_peak']:.0%}",
                f"{side['decode']:.3f}", ratio]) + " |")
    return "\n".join(rows)


def read_ways(name: str, text: str) -> set[str]:
    """"compile,channels-last" as a set; ValueError for what `name` does not know."""
    ways = set(text.split(",")) - {"eager"}
    if unknown := ways - WAYS[name]:
        raise ValueError(f"--{name} {text}: unknown {sorted(unknown)}; known are eager, none "
                         f"and {sorted(WAYS[name])}")
    if len(ways & set(COMPILE)) > 1:
        raise ValueError(f"--{name} {text}: compile or reduce-overhead, not both")
    return ways


def make_parser() -> argparse.ArgumentParser:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--batch", type=int, default=1, help="pictures at once (the U-Net sees two each)")
    add("--sdlib", default="eager", metavar="WAYS", help="eager, none, or compile,...")
    add("--diffusers", default="eager", metavar="WAYS", help="the same for diffusers")
    add("--dtype", choices=["float16", "bfloat16", "float32"],
        default="float16" if cuda else "float32")
    add("--device", default="cuda" if cuda else "cpu")
    add("--size", type=int, help="pixels (default: the model's, 512)")
    add("--steps", type=int, help="denoising steps per call (default 20; small: 5)")
    add("--guidance", type=float, default=7.5, help="1 or less: none, at half the cost")
    add("--scheduler", choices=SCHEDULERS, default="ddim", help="of the random model")
    add("--repeats", type=int, help="timed calls of each side (default 5; small: 9)")
    add("--small", action="store_true", help="the emoji model instead")
    add("--out", help="file that the line of JSON is added to")
    add("--table", metavar="FILE", help="print the runs in FILE as a table, measure nothing")
    return parser


def main(arguments: list[str] | None = None) -> dict | None:
    options = make_parser().parse_args(arguments)
    if options.table:
        text = Path(options.table).read_text(encoding="utf-8")
        print(table([json.loads(line) for line in text.splitlines()]))
        return None
    options.steps = options.steps or (5 if options.small else 20)
    options.repeats = options.repeats or (9 if options.small else 5)
    for name in WAYS:
        if getattr(options, name) != "none":
            read_ways(name, getattr(options, name))
    line = run(options)
    if options.out:
        with open(options.out, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    print(table([line]))
    if line["latents_differ_by"] is not None:
        print(f"final latents differ by {line['latents_differ_by']:.1e} of the largest")
    return line


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
