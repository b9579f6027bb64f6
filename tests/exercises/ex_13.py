"""Plausible wrong answers to the exercises of chapter 13, and what each must be told."""

_CUT = ("def ex_13_4(ids, comma, room, back):\n    chunks = []\n    while len(ids) > room:\n"
        "        cut = next(({at} for k in {places} if ids[k - 1] == comma), room)\n"
        "        chunks, ids = chunks + [ids[:cut]], ids[cut:]\n    return chunks + [ids]")

WRONG = {
    "13_1": [
        ("def ex_13_1(e_text, e_empty, u, guide):\n    return guide(e_text, e_empty, u)",
         "you handed u on as w"),
        ("def ex_13_1(e_text, e_empty, u, guide):\n"
         "    return guide(e_text, e_empty, u - 1)", "the wrong direction"),
        ("def ex_13_1(e_text, e_empty, u, guide):\n"
         "    return guide(e_empty, e_text, 1 + u)", "changed places"),
        ("def ex_13_1(e_text, e_empty, u, guide):\n"
         "    return (1 + u) * e_text - u * e_empty", "let guide do the work"),
        ("def ex_13_1(e_text, e_empty, u, guide):\n    return e_text", "for u = 3 you give"),
    ],
    "13_2": [
        ("def ex_13_2(timesteps, w, low, high):\n"
         "    scales = [1.0 if low <= t <= high else w for t in timesteps]\n"
         "    return scales, 7", "the other way round"),
        ("def ex_13_2(timesteps, w, low, high):\n"
         "    scales = [w if low <= t < high else 1.0 for t in timesteps]\n"
         "    return scales, 7", "t = 400 and t = 800 too; you give [1.0, 1.0, 5.0, 5.0, 1.0]"),
        ("def ex_13_2(timesteps, w, low, high):\n"
         "    scales = [w if low < t <= high else 1.0 for t in timesteps]\n"
         "    return scales, 7", "t = 400 and t = 800 too; you give [1.0, 5.0, 5.0, 1.0, 1.0]"),
        ("def ex_13_2(timesteps, w, low, high):\n"
         "    scales = [w if low < t < high else 1.0 for t in timesteps]\n"
         "    return scales, 6", "t = 400 and t = 800 too; you give [1.0, 1.0, 5.0, 1.0, 1.0]"),
        ("def ex_13_2(timesteps, w, low, high):\n"
         "    scales = [w if low <= t <= high else 0.0 for t in timesteps]\n"
         "    return scales, 8", "the plain conditional prediction"),
        ("def ex_13_2(timesteps, w, low, high):\n"
         "    scales = [w if low <= t <= high else 1.0 for t in timesteps]\n"
         "    return scales, 2 * len(scales)", "unguided steps need only one"),
        ("def ex_13_2(timesteps, w, low, high):\n"
         "    scales = [w if low <= t <= high else 1.0 for t in timesteps]\n"
         "    return scales, len(scales)", "need 8, you say 5"),
        ("def ex_13_2(timesteps, w, low, high):\n"
         "    return [w for t in timesteps if low <= t <= high], 6", "five steps need five"),
    ],
    "13_3": [
        ("def ex_13_3(states, weights):\n    return states * weights[..., None]",
         "restore it"),
        ("def ex_13_3(states, weights):\n    scaled = states * weights[..., None]\n"
         "    return scaled * states.mean() / scaled.mean()", "one mean for the whole batch"),
        ("def ex_13_3(states, weights):\n    scaled = states * weights[..., None]\n"
         "    return scaled * states.mean(2, keepdim=True) / scaled.mean(2, keepdim=True)",
         "token by token takes the weights away"),
        ("def ex_13_3(states, weights):\n    scaled = states * weights[..., None]\n"
         "    return scaled + (states - scaled).mean((1, 2), keepdim=True)",
         "you added what was missing"),
        ("def ex_13_3(states, weights):\n    scaled = states * weights[..., None]\n"
         "    return scaled * states.std((1, 2), keepdim=True) / scaled.std((1, 2), "
         "keepdim=True)", "must have its old mean"),
        ("def ex_13_3(states, weights):\n    scaled = states * weights[..., None]\n"
         "    return scaled * states.mean(1, keepdim=True) / scaled.mean(1, keepdim=True)",
         "one factor for all of a prompt"),
    ],
    "13_4": [
        ("def ex_13_4(ids, comma, room, back):\n"
         "    return [ids[k:k + room] for k in range(0, len(ids), room)]",
         "has a comma near its end"),
        (_CUT.format(at="k - 1", places="range(room, room - back, -1)"),
         "stays in the chunk before the cut"),
        (_CUT.format(at="k", places="range(1, room + 1)"), "not the first"),
        (_CUT.format(at="k", places="range(room, 0, -1)"), "too far back"),
        (_CUT.format(at="k", places="range(room, room - back + 1, -1)"),
         "the third-last id is one of the last 3"),
        (_CUT.format(at="k", places="range(room, room - back - 1, -1)"),
         "the fourth-last id is none of the last 3"),
        (_CUT.format(at="k", places="range(room - 1, room - back, -1)"),
         "a comma at the very end of a full chunk"),
        (_CUT.format(at="k", places="range(room, room - back, -1)").replace("> room", ">= room"),
         "what fits into one chunk, exactly too"),
        ("def ex_13_4(ids, comma, room, back):\n    chunks = []\n    while len(ids) > room:\n"
         "        chunks.append(ids[:room])\n        ids = ids[room:]\n    return chunks",
         "ids got lost"),
    ],
    "13_5": [
        ("def ex_13_5(unet, z, t, empty, contexts, weights):\n"
         "    e = unet(z, t, empty.expand(len(z), -1, -1))\n"
         "    return e + sum(w * (unet(z, t, c.expand(len(z), -1, -1)) - e)\n"
         "                   for w, c in zip(weights, contexts))", "3 calls of the U-Net"),
        ("def ex_13_5(unet, z, t, empty, contexts, weights):\n"
         "    both = torch.cat([c.expand(len(z), -1, -1) for c in [empty, *contexts]])\n"
         "    e, *others = unet(z.repeat(3, 1, 1, 1), t, both).chunk(3)\n"
         "    return sum(w * (o - e) for w, o in zip(weights, others))",
         "the differences alone"),
        ("def ex_13_5(unet, z, t, empty, contexts, weights):\n"
         "    both = torch.cat([c.expand(len(z), -1, -1) for c in [empty, *contexts]])\n"
         "    e, *others = unet(z.repeat(3, 1, 1, 1), t, both).chunk(3)\n"
         "    return e + sum(w * o for w, o in zip(weights, others))",
         "*difference* from the empty one"),
        ("def ex_13_5(unet, z, t, empty, contexts, weights):\n"
         "    return unet(z.repeat(3, 1, 1, 1), t, torch.cat([empty, *contexts]))",
         "21 latents and 3 contexts: it needs one context per latent"),
        ("def ex_13_5(unet, z, t, empty, contexts, weights):\n"
         "    both = torch.cat([c.expand(len(contexts), -1, -1) for c in [empty, *contexts]])\n"
         "    e, *others = unet(z.repeat(3, 1, 1, 1), t, both).chunk(3)\n"
         "    return e + sum(w * (o - e) for w, o in zip(weights, others))",
         "21 latents and 6 contexts"),
        ("def ex_13_5(unet, z, t, empty, contexts, weights):\n"
         "    both = torch.cat([c.expand(len(z), -1, -1) for c in [empty, *contexts]])\n"
         "    e, *others = unet(z.repeat(3, 1, 1, 1), t, both).chunk(1 + len(z))\n"
         "    return e + sum(w * (o - e) for w, o in zip(weights, others))",
         "shape (3, 4, 3, 3): one prediction per picture"),
        ("def ex_13_5(unet, z, t, empty, contexts, weights):\n"
         "    both = torch.cat([empty, *contexts]).repeat_interleave(len(z), 0)\n"
         "    latents = z.repeat_interleave(3, 0)\n"
         "    e, *others = unet(latents, t, both).chunk(3)\n"
         "    return e + sum(w * (o - e) for w, o in zip(weights, others))",
         "lined up in the same order"),
    ],
}
