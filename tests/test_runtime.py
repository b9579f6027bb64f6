"""Running on the machine at hand: tiles, slices, taking turns, previews, costs, choices."""

import math
from pathlib import Path

import pytest
import torch
from helpers import load_into, randomize, relative_error
from PIL import Image

from sdlib import AutoencoderKL, ImageToImage, Inpainting, StableDiffusion
from sdlib.clip import CLIPTextConfig
from sdlib.costs import Allocations, Need, flops, need, peak_bytes, weight_bytes
from sdlib.offload import Offloaded, Stage, copy_to, offload
from sdlib.previews import Preview, Watch, fit_preview, learn_preview
from sdlib.runtime import (
    GIB,
    Compiled,
    Machine,
    Runtime,
    measure,
    precision,
    prepare,
)
from sdlib.tiling import StandIn, TiledVAE, Tiling, bare, blend, tiled
from sdlib.unet import UNet2DConditionModel, UNetConfig
from sdlib.vae import VAEConfig

MODEL = Path(__file__).parents[1] / "models/emoji-sd"
PROMPT = "a fox on a blue background"
QUICK = {"num_inference_steps": 3, "progress": False, "output_type": "pt", "seed": 0}
PARTS = ("text_encoder", "unet", "vae")


@pytest.fixture(autouse=True)
def same_numbers_each_time():
    torch.manual_seed(22)


@pytest.fixture
def pipe():
    return StableDiffusion.from_pretrained(MODEL, device="cpu")


@pytest.fixture(scope="module")
def picture():
    return StableDiffusion.from_pretrained(MODEL, device="cpu")(PROMPT, **QUICK)


def small_vae(sample_size=32):
    """A random autoencoder that halves twice: tiles of `sample_size` / 4 latents."""
    config = VAEConfig(block_out_channels=(8, 16, 16), layers_per_block=1,
                       norm_num_groups=4, sample_size=sample_size)
    return randomize(AutoencoderKL(config))


# ------------------------------------------------------------------------------- tiling
def theirs_like(vae):
    from diffusers import AutoencoderKL as Theirs

    config = {k: v for k, v in vae.config.to_dict().items() if not k.startswith("_")}
    theirs = Theirs(**config).eval()
    load_into(theirs, vae)
    theirs.enable_tiling()
    return theirs


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (20, 14), (7, 31), (9, 8)])
def test_tiles_are_those_of_diffusers(size):
    vae = small_vae()
    theirs, ours = theirs_like(vae), TiledVAE(vae, Tiling(slices=False))
    z = torch.randn(2, 4, *size)
    assert relative_error(ours.decode(z), theirs.decode(z).sample) < 1e-5
    x = torch.randn(2, 3, *(4 * s for s in size))
    q, reference = ours.encode(x), theirs.encode(x).latent_dist
    assert relative_error(q.mean, reference.mean) < 1e-5
    assert relative_error(q.logvar, reference.logvar) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("spoiled", [
    lambda run, x, t, s, m, ms: tiled(run, x, t, 0, m, 0),            # no overlap
    lambda run, x, t, s, m, ms: tiled(run, x.mT, t, s, m, ms).mT,     # left, then above
    lambda run, x, t, s, m, ms: tiled(run, x, t, s, m, ms).roll(1, -1),
], ids=["no overlap", "other order", "shifted"])
def test_parity_notices_other_tilings(spoiled):
    vae = small_vae()
    z = torch.randn(1, 4, 20, 20)
    right = theirs_like(vae).decode(z).sample
    assert relative_error(tiled(vae.decode, z, 8, 2, 32, 8), right) < 1e-5
    assert relative_error(spoiled(vae.decode, z, 8, 2, 32, 8), right) > 1e-3


@torch.no_grad()
def test_one_tile_is_untiled_and_slices_are_the_batch():
    vae, z = small_vae(), torch.randn(3, 4, 8, 8)
    for tiling in (Tiling(), Tiling(slices=False)):
        assert relative_error(TiledVAE(vae, tiling).decode(z), vae.decode(z)) < 1e-5
    x = torch.randn(3, 3, 32, 32)
    assert relative_error(TiledVAE(vae).encode(x).mean, vae.encode(x).mean) < 1e-5
    big = torch.randn(1, 4, 16, 16)
    off = TiledVAE(vae, Tiling(tiles=False))
    assert relative_error(off.decode(big), vae.decode(big)) < 1e-5
    assert relative_error(TiledVAE(vae).decode(big), vae.decode(big)) > 1e-3


@pytest.mark.parametrize("shape", [(1, 1, 20, 20), (1, 1, 8, 50), (2, 1, 9, 33)])
def test_tiles_of_a_local_map_leave_no_trace(shape):
    """Without norms and attention nothing depends on where the cuts are."""
    x = torch.randn(*shape, dtype=torch.float64)
    assert relative_error(tiled(lambda y: 2 * y + 1, x, 8, 2, 8, 2), 2 * x + 1) < 1e-12
    grow = torch.nn.Upsample(scale_factor=4)
    assert relative_error(tiled(grow, x, 8, 2, 32, 8), grow(x)) < 1e-12


def test_blend_by_hand():
    a, b = torch.tensor([[0.0, 10.0, 20.0]]), torch.tensor([[30.0, 40.0, 50.0]])
    assert blend(a, b, 2, -1).tolist() == [[10.0, 30.0, 50.0]]
    assert torch.equal(blend(a.T, b.T, 2, -2), blend(a, b, 2, -1).T)
    assert torch.equal(blend(a, b, 0, -1), b)


def test_stand_in_answers_for_its_part(tmp_path):
    vae = small_vae()
    tiles = TiledVAE(TiledVAE(vae))
    assert tiles.config is vae.config and tiles.decoder is vae.decoder
    assert bare(tiles) is vae and bare(vae) is vae
    tiles.save_pretrained(tmp_path / "vae")
    again = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert again.state_dict().keys() == vae.state_dict().keys()
    with pytest.raises(AttributeError, match="no_such_thing"):
        tiles.no_such_thing  # noqa: B018
    with pytest.raises(ValueError, match="multiples of 4"):
        tiles.encode(torch.zeros(1, 3, 50, 64))
    with pytest.raises(ValueError, match="latents must have shape"):
        tiles.decode(torch.zeros(1, 3, 16, 16))
    for wrong in (Tiling(tile=7), Tiling(overlap=1.0)):
        with pytest.raises(ValueError, match="cannot share"):
            TiledVAE(vae, wrong)


@torch.no_grad()
def test_tiled_vae_is_called_like_an_autoencoder():
    vae, x = small_vae(), torch.randn(1, 3, 48, 48)
    picture, q = TiledVAE(vae)(x, torch.Generator().manual_seed(0))
    assert picture.shape == x.shape and q.mean.shape == (1, 4, 12, 12)


def test_tiles_take_less_memory():
    vae, z = small_vae(), torch.randn(1, 4, 32, 32)
    whole = peak_bytes(lambda: vae.decode(z))
    in_tiles = peak_bytes(lambda: TiledVAE(vae).decode(z))
    assert in_tiles < whole / 3


# ------------------------------------------------------------------------------ offload
def test_offloaded_parts_take_turns_and_paint_the_same(pipe, picture):
    stage = offload(pipe, "cpu")
    assert torch.equal(pipe(PROMPT, **QUICK), picture)
    visits = [name for way, name in stage.moves if way == "in"]
    assert visits == ["text_encoder", "unet", "vae"]  # the U-Net once, for all steps
    assert stage.moves[1::2] == [("out", "text_encoder"), ("out", "unet")]
    assert stage.carried == sum(p.numel() * 4 for name in PARTS
                                for p in getattr(pipe, name).parameters())
    stage.clear()
    assert stage.moves[-1] == ("out", "vae") and stage.guest is None
    assert stage.copy is None
    assert torch.equal(pipe(PROMPT, **QUICK), picture)


def test_offload_works_for_edits(pipe):
    sketch = Image.new("RGB", (64, 64), (40, 90, 200))
    mask = Image.new("L", (64, 64), 255)
    plain = [ImageToImage.from_pipe(pipe)(PROMPT, sketch, **QUICK),
             Inpainting.from_pipe(pipe)(PROMPT, sketch, mask, **QUICK)]
    stage = offload(prepare(pipe, Runtime(vae_tiling=True)), "cpu")
    again = [ImageToImage.from_pipe(pipe)(PROMPT, sketch, **QUICK),
             Inpainting.from_pipe(pipe)(PROMPT, sketch, mask, **QUICK)]
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
    assert stage.moves[0] == ("in", "vae")
    assert isinstance(pipe.vae, Offloaded) and isinstance(pipe.vae.part, TiledVAE)


def test_weights_stay_at_home_while_the_copy_works_elsewhere():
    linear = torch.nn.Linear(3, 2)
    linear.register_buffer("extra", torch.ones(5))
    stage = Stage("meta")
    part = Offloaded(linear, stage, "linear")
    assert part(torch.zeros(4, 3, device="meta")).device.type == "meta"
    assert {p.device.type for p in part.parameters()} == {"cpu"}
    assert {p.device.type for p in stage.copy.parameters()} == {"meta"}
    assert stage.copy.extra.device.type == "meta"
    assert len(list(part.parameters())) == 2, "the copy must not count"
    assert stage.carried == 4 * (6 + 2)


def test_a_change_of_the_weights_drops_the_copy():
    linear = torch.nn.Linear(3, 3)
    stage = Stage("cpu")
    part, other = (Offloaded(linear, stage, name) for name in ("one", "other"))
    x = torch.randn(2, 3)
    assert torch.equal(part(x), linear(x))
    part.double()
    assert stage.guest is None
    assert part(x.double()).dtype == torch.float64
    other.double()
    assert torch.equal(other(x.double()), part(x.double()))


def test_copies_keep_ties_and_leave_the_original():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    net[1].weight = net[0].weight
    copy = copy_to(net, torch.device("meta"))
    assert copy[0].weight is copy[1].weight and copy[0].weight.is_meta
    assert not any(p.requires_grad for p in copy.parameters())
    assert not any(p.is_meta for p in net.parameters())


# ----------------------------------------------------------------------------- previews
def test_preview_of_a_linear_decoder_is_exact():
    true = torch.randn(5, 3) / 20
    z = torch.randn(2, 4, 6, 6)
    colors = torch.einsum("bchw,cd->bdhw", z, true[:4]) + true[4, :, None, None]
    pictures = torch.nn.functional.interpolate(colors, scale_factor=8)
    preview = fit_preview(z, pictures)
    assert relative_error(preview.weights, true) < 1e-5
    assert preview.share == pytest.approx(1, abs=1e-9)
    assert relative_error(preview(z), colors.clamp(-1, 1)) < 1e-5


def test_preview_is_the_best_linear_map():
    z, pictures = torch.randn(3, 4, 5, 5), torch.rand(3, 3, 20, 20)
    w = fit_preview(z, pictures).weights.double()
    x = torch.cat([z.double(), torch.ones(3, 1, 5, 5)], 1)
    y = torch.nn.functional.avg_pool2d(pictures.double(), 4)
    rest = y - torch.einsum("bchw,cd->bdhw", x, w)
    normal = torch.einsum("bchw,bdhw->cd", x, rest)  # the normal equations
    assert normal.abs().max() < 1e-4


def test_preview_errors_and_file(tmp_path):
    preview = Preview(torch.randn(5, 3), 0.5)
    preview.save(tmp_path / "preview.json")
    again = Preview.load(tmp_path / "preview.json")
    assert torch.equal(again.weights, preview.weights) and again.share == 0.5
    with pytest.raises(ValueError, match="latents .B, 4, h, w."):
        preview(torch.zeros(1, 9, 4, 4))
    with pytest.raises(ValueError, match="more than 5"):
        fit_preview(torch.zeros(1, 4, 2, 2), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="at least 1"):
        Watch(preview, every=0)


def test_watch_keeps_previews_of_a_run_and_changes_nothing(pipe, picture):
    z = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    preview = learn_preview(pipe, z)
    assert 0.3 < preview.share < 1
    watch = Watch(preview, every=2, keep=True)
    assert torch.equal(pipe(PROMPT, callback_on_step_end=watch, **QUICK), picture)
    assert watch.steps == [0, 2] and len(watch.latents) == 2
    assert watch.film(64).shape == (2, 3, 64, 64)
    small = torch.nn.functional.avg_pool2d(picture, 4)
    last = watch.frames[-1]
    assert (last - small).abs().mean() < (last.mean() - small).abs().mean() + 0.2


# -------------------------------------------------------------------------------- costs
def test_allocations_count_what_lives():
    def run():
        a = torch.zeros(1000, device="meta")          # 4000
        b = a + 1                                     # 8000
        b = b * 2                                     # 12000 for a moment, then 8000
        b.view(10, 100).add_(1)                       # nothing new
        return a.reshape(10, 100) @ b.view(100, 10)   # 400 more

    assert peak_bytes(run) == 12_000
    with Allocations() as count:
        kept = run()
    assert count.now == kept.nbytes == 400


def test_need_of_stable_diffusion_is_what_is_written_down():
    configs = UNetConfig.sd15(), VAEConfig.sd15(), CLIPTextConfig.sd15()
    assert need(*configs, 512, 512) == Need()
    assert Need().weights == 2 * 1_066_235_307


@pytest.mark.full
def test_unfused_attention_stores_all_pairs():
    configs = UNetConfig.sd15(), VAEConfig.sd15(), CLIPTextConfig.sd15()
    unfused = need(*configs, 512, 512, fused=False)
    assert unfused.step > 4 * 2 * 8 * 4096**2 * 2  # four matrices of all pairs at once


@pytest.mark.full
def test_flops_of_stable_diffusion():
    with torch.device("meta"):
        unet = UNet2DConditionModel(UNetConfig.sd15())
        vae = AutoencoderKL(VAEConfig.sd15())
        z, context = torch.empty(1, 4, 64, 64), torch.empty(1, 77, 768)
        count = flops(lambda: unet(z, torch.empty(1), context))
        assert round(count / 1e9) == 803
        assert math.floor(flops(lambda: vae.decode(z)) / 1e9) == 2514
    assert weight_bytes(unet, torch.float16) == 2 * 859_520_964


# ------------------------------------------------------------------------------ runtime
T4 = Machine("cuda", "Tesla T4", (7, 5), 15 * GIB, 12 * GIB)


def test_choices_for_machines():
    assert Runtime.for_machine(Machine()) == Runtime("cpu", "float32")
    assert Runtime.for_machine(T4) == Runtime("cuda", "float16", channels_last=True)
    small = Runtime.for_machine(Machine("cuda", "", (8, 6), 4 * GIB, 8 * GIB))
    assert small.vae_slicing and not small.offload and not small.vae_tiling
    tiny = Runtime.for_machine(Machine("cuda", "", (8, 6), 2 * GIB, 8 * GIB))
    assert tiny.offload and not tiny.compile
    assert any("U-Net alone" in reason for reason in tiny.reasons)
    old = Runtime.for_machine(Machine("cuda", "", (6, 1), 8 * GIB, 4 * GIB))
    assert old.dtype == "float32" and not old.channels_last
    large = Runtime.for_machine(T4, Need(step=2 * GIB, decode=6 * GIB))
    assert large.vae_tiling and not large.offload
    for runtime in (small, tiny, old):
        assert all(runtime.reasons)


@pytest.mark.parametrize("capability,dtype", [
    ((5, 2), "float32"), ((6, 0), "float16"), ((6, 1), "float32"), ((7, 0), "float16"),
    ((7, 5), "float16"), ((8, 0), "float16"), ((9, 0), "float16")])
def test_precision_follows_the_generation(capability, dtype):
    assert precision(Machine("cuda", "", capability, 16 * GIB))[0] == dtype
    assert precision(Machine("cpu", "", capability))[0] == "float32"


def test_runtime_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="emulated on a CPU"):
        Runtime("cpu", "float16")
    with pytest.raises(ValueError, match="offload"):
        Runtime("cuda", "float16", compile=True, offload=True)
    with pytest.raises(ValueError, match="offload"):
        Runtime("cpu", offload=True)
    with pytest.raises(ValueError, match="int8"):
        Runtime("cuda", "int8")
    assert Runtime("cpu", "bfloat16").torch_dtype == torch.bfloat16


def test_this_machine_is_described():
    here = Machine.here()
    assert here.device == "cpu" and here.host_memory > GIB
    assert Runtime.for_machine().dtype == "float32"


def test_prepare_and_back(pipe, picture):
    prepare(pipe, Runtime(channels_last=True, vae_tiling=True, vae_slicing=True))
    assert isinstance(pipe.vae, TiledVAE)
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(pipe(PROMPT, **QUICK), picture) < 1e-3
    prepare(pipe, Runtime())
    assert isinstance(pipe.vae, AutoencoderKL)
    assert pipe.unet.conv_in.weight.is_contiguous()
    assert torch.equal(pipe(PROMPT, **QUICK), picture)


@pytest.mark.full
def test_bfloat16_is_close(pipe, picture):
    prepare(pipe, Runtime(dtype="bfloat16"))
    assert pipe.unet.conv_in.weight.dtype == torch.bfloat16
    error = (pipe(PROMPT, **QUICK) - picture).abs().mean()
    assert 1e-5 < error < 0.1


def test_compiled_part_answers_the_same():
    """The wiring only: torch's compiler as it traces, without generating code."""
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_in = torch.nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x, t):
            return self.conv_in(x) * t

    net = Net()
    fast, x, t = Compiled(net, backend="eager"), torch.randn(1, 4, 8, 8), torch.ones(1)
    assert torch.equal(fast(x, t), net(x, t))
    assert fast.conv_in is net.conv_in and isinstance(fast, StandIn)


def test_measure_counts_steps_and_bytes(pipe):
    with pytest.raises(ValueError, match="two steps"):
        measure(pipe, steps=1)
    one = measure(pipe, steps=3, repeats=1)
    two = measure(pipe, steps=3, repeats=1, batch=2)
    assert one.steps_per_second > 0
    assert 1.7 < two.peak / one.peak < 2.1
    stage = offload(pipe, "cpu")
    assert measure(pipe, steps=3, repeats=1).steps_per_second > 0
    assert ("in", "unet") in stage.moves
