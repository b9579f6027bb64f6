"""Judge a trained emoji model by the scene reader and write what was found.

    python tools/evaluate_model.py [--model models/emoji-sd] [--prompts 500]

Writes evaluation.json into the model folder: pictures right for prompts of unseen scenes
(half of them with two objects) and of held-out combinations, the autoencoder's
reconstructions, and how often CLIP picks the right caption among 64, half of them near
misses. With --sheet FILE the first 64 pictures are drawn with their prompts. Prompts and
seeds are fixed, so a run can be repeated.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sdlib import StableDiffusion, scenes
from sdlib.clip import clip_pixels, load_clip
from sdlib.reader import judge_all


def choose(split: str, count: int) -> list[scenes.Scene]:
    """The first scenes of a split, half of them with one object and half with two."""
    chosen, wanted, index = [], {1: count - count // 2, 2: count // 2}, 0
    while sum(wanted.values()):
        scene = scenes.scene(index, seed=1, split=split)
        index += 1
        if wanted[len(scene.items)]:
            wanted[len(scene.items)] -= 1
            chosen.append(scene)
    return chosen


def share(values) -> float:
    """Mean of truth values in percent, one digit."""
    return round(100 * float(np.mean(list(values))), 1)


def judged(images: torch.Tensor, chosen: list[scenes.Scene]) -> dict[str, float]:
    """Shares of right facts, in percent."""
    verdicts = judge_all(images, [s.caption for s in chosen])
    singles = [v for v, s in zip(verdicts, chosen) if len(s.items) == 1]
    doubles = [v for v, s in zip(verdicts, chosen) if len(s.items) == 2]
    return {
        "prompts": len(chosen),
        "background": share(v.background for v in verdicts),
        "position": share(v.position for v in verdicts),
        "size": share(v.size for v in verdicts),
        "single object": share(v.objects[0] for v in singles),
        "both of two objects": share(all(v.objects) for v in doubles),
        "at least one of two": share(any(v.objects) for v in doubles),
        "everything": share(v.all for v in verdicts),
    }


def paint(pipe: StableDiffusion, chosen: list[scenes.Scene], steps: int,
          guidance: float, batch: int = 25) -> torch.Tensor:
    """One picture per scene's caption; picture k from seed k."""
    parts = []
    for start in tqdm(range(0, len(chosen), batch), "painting"):
        prompts = [s.caption for s in chosen[start : start + batch]]
        parts.append(pipe(prompts, num_inference_steps=steps, guidance_scale=guidance,
                          seed=list(range(start, start + len(prompts))),
                          output_type="pt", progress=False))
    return torch.cat(parts).clamp(-1, 1)


@torch.no_grad()
def judge_vae(vae, chosen: list[scenes.Scene]) -> dict[str, float]:
    """PSNR in dB (range 2) of reconstructions, whole and on the sprites' own pixels."""
    pictures = np.stack([np.asarray(scenes.draw(s)) for s in chosen])
    empty = np.stack([np.asarray(scenes.draw_background(s.colors)) for s in chosen])
    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    plain = torch.from_numpy(np.array(empty, copy=True)).permute(0, 3, 1, 2).float()
    mask = ((x + 1) * 127.5 - plain).abs().amax(1) > 3  # (B, 64, 64): sprite pixels
    seen = torch.cat([vae.decode(vae.encode(part).mean) for part in x.split(50)])
    square = (seen.clamp(-1, 1) - x).square().mean(1)
    whole = 10 * torch.log10(4 / square.mean((1, 2)))
    own = 10 * torch.log10(4 / square[mask].mean())
    reading = judged(seen.clamp(-1, 1), chosen)
    return {"psnr": round(float(whole.mean()), 2), "psnr of sprites": round(float(own), 2),
            "read right": reading["everything"], "pictures": len(chosen)}


@torch.no_grad()
def judge_clip(folder: Path, tokenizer, chosen: list[scenes.Scene]) -> dict[str, float]:
    """Right caption among 64: 31 near misses, 32 captions of other scenes."""
    clip = load_clip(folder)
    hits, beaten = [], []
    for k, scene in enumerate(tqdm(chosen, "CLIP")):
        misses = scenes.near_misses(scene, np.random.default_rng(k), 31)
        others = [chosen[(k + j) % len(chosen)].caption for j in range(1, 33)]
        ids = tokenizer([scene.caption, *misses, *others])
        x = torch.from_numpy(np.array(scenes.draw(scene))).permute(2, 0, 1)[None] / 127.5 - 1
        logits = clip(ids, clip_pixels(x, clip.vision_config))[0]
        hits.append(logits.argmax().item() == 0)
        beaten.append(bool(logits[0] > logits[1 + len(misses) :].max()))
    return {"right among 64": share(hits), "beats 32 other scenes": share(beaten),
            "pictures": len(chosen)}


def draw_sheet(pictures: torch.Tensor, captions: list[str], path: Path) -> None:
    """The first 64 prompts of the evaluation, as they come: nothing is picked."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    from sdlib.plots import show_images, use_style

    use_style()
    show_images(pictures, captions, ncols=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, dpi=100, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/emoji-sd")
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--sheet", help="PNG file for a sheet of the first 64 pictures")
    options = parser.parse_args()
    folder, begin = Path(options.model), time.time()
    pipe = StableDiffusion.from_pretrained(folder)
    few = max(2, options.prompts // 5)
    chosen, unseen = choose("valid", options.prompts), choose("heldout", few)
    settings = {"steps": options.steps, "guidance_scale": options.guidance}
    pictures = paint(pipe, chosen, **_short(settings))
    report = settings | {
        "vae": judge_vae(pipe.vae, choose("valid", few)),
        "clip": judge_clip(folder, pipe.tokenizer, choose("valid", few)),
        "pictures": judged(pictures, chosen),
        "held out": judged(paint(pipe, unseen, **_short(settings)), unseen),
    }
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    if options.sheet:
        draw_sheet(pictures[:64], [s.caption for s in chosen[:64]], Path(options.sheet))
    print(json.dumps(report, indent=2))
    print(f"{time.time() - begin:.0f} s")


def _short(settings: dict) -> dict:
    return {"steps": settings["steps"], "guidance": settings["guidance_scale"]}


if __name__ == "__main__":
    main()
