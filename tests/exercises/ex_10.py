"""Plausible wrong answers to the exercises of chapter 10, and what each must be told."""

WRONG = {
    "10_1": [
        ("def ex_10_1(size):\n    return size // 2", "around the *middle*"),
        ("def ex_10_1(size):\n    return size", "one layer too many"),
        ("def ex_10_1(size):\n    return (size - 1 + 2) // 3",
         "a layer lets news travel one place"),
        ("def ex_10_1(size):\n    return max(1, size - 1)", "one place already sees itself"),
    ],
    "10_2": [
        ("def ex_10_2(e, k):\n"
         "    cos, sin = e.chunk(2, dim=1)\n"
         "    n = cos.shape[1]\n"
         "    a = k * 10000.0 ** (-torch.arange(n) / n)\n"
         "    return torch.cat([a.cos() * cos + a.sin() * sin,\n"
         "                      a.cos() * sin - a.sin() * cos], dim=1)",
         "the rotation turns the wrong way"),
        ("def ex_10_2(e, k):\n"
         "    cos, sin = e.chunk(2, dim=1)\n"
         "    n = cos.shape[1]\n"
         "    a = k * 10000.0 ** (-torch.arange(n) / n)\n"
         "    return torch.cat([a.cos() * cos + a.sin() * sin,\n"
         "                      a.cos() * sin + a.sin() * cos], dim=1)",
         "the sign of the sine term in the new cosine"),
        ("def ex_10_2(e, k):\n"
         "    cos, sin = e.chunk(2, dim=1)\n"
         "    n = cos.shape[1]\n"
         "    a = k * 10000.0 ** (-torch.arange(n) / n)\n"
         "    return torch.cat([a.cos() * cos - a.sin() * sin,\n"
         "                      a.cos() * sin - a.sin() * cos], dim=1)",
         "the sign of the sine term in the new sine"),
        ("def ex_10_2(e, k):\n    return e", "nothing has turned"),
        ("def ex_10_2(e, k):\n"
         "    cos, sin = e.chunk(2, dim=1)\n"
         "    n = cos.shape[1]\n"
         "    a = k * 10000.0 ** (-torch.arange(n) / n)\n"
         "    return torch.cat([a.sin() * cos + a.cos() * sin,\n"
         "                      a.cos() * cos - a.sin() * sin], dim=1)",
         "cosines and sines have changed places"),
        ("def ex_10_2(e, k):\n"
         "    cos, sin = e[:, 0::2], e[:, 1::2]\n"
         "    n = cos.shape[1]\n"
         "    a = k * 10000.0 ** (-torch.arange(n) / n)\n"
         "    out = torch.empty_like(e)\n"
         "    out[:, 0::2] = a.cos() * cos - a.sin() * sin\n"
         "    out[:, 1::2] = a.sin() * cos + a.cos() * sin\n"
         "    return out", "entry i is entry i + d/2"),
        ("def ex_10_2(e, k):\n"
         "    cos, sin = e.chunk(2, dim=1)\n"
         "    n = cos.shape[1]\n"
         "    a = k * 10000.0 ** (-torch.arange(n) / (2 * n))\n"
         "    return torch.cat([a.cos() * cos - a.sin() * sin,\n"
         "                      a.sin() * cos + a.cos() * sin], dim=1)",
         "a rotation, but by other angles"),
    ],
    "10_3": [
        ("def ex_10_3(config):\n"
         "    widths, layers = config.block_out_channels, config.layers_per_block\n"
         "    queue = [widths[0]]\n"
         "    for i, w in enumerate(widths):\n"
         "        queue += [w] * (layers + (i + 1 < len(widths)))\n"
         "    have, levels = widths[-1], []\n"
         "    for w in reversed(widths):\n"
         "        level = []\n"
         "        for _ in range(layers + 1):\n"
         "            level.append(have + queue.pop(0))\n"
         "            have = w\n"
         "        levels.append(level)\n"
         "    return levels", "skips form a stack"),
        ("def ex_10_3(config):\n"
         "    widths, layers = config.block_out_channels, config.layers_per_block\n"
         "    stack = [widths[0]]\n"
         "    for i, w in enumerate(widths):\n"
         "        stack += [w] * (layers + (i + 1 < len(widths)))\n"
         "    return [[w + stack.pop() for _ in range(layers + 1)]\n"
         "            for w in reversed(widths)]", "gets what the level *below* made"),
        ("def ex_10_3(config):\n"
         "    widths, layers = config.block_out_channels, config.layers_per_block\n"
         "    return [[2 * w] * layers for w in reversed(widths)]",
         "conv_in and the halvings hand over too"),
        ("def ex_10_3(config):\n"
         "    return [[256, 192], [192, 96], [96, 64]]", "not for Stable Diffusion's four"),
        ("def ex_10_3(config):\n"
         "    return [[256, 256], [192, 128], [96, 64]]", "follow the pushes again"),
    ],
    "10_4": [
        ("def ex_10_4(places, width, tokens, context_width):\n"
         "    return (2 * places * width ** 2 + 2 * tokens * context_width * width\n"
         "            + 2 * places * tokens * width)", "exactly half"),
        ("def ex_10_4(places, width, tokens, context_width):\n"
         "    return 4 * places * width ** 2 + 4 * tokens * context_width * width",
         "only the projections"),
        ("def ex_10_4(places, width, tokens, context_width):\n"
         "    return 4 * places * tokens * width", "the four projections are missing"),
        ("def ex_10_4(places, width, tokens, context_width):\n"
         "    return (4 * places * width ** 2 + 4 * places * context_width * width\n"
         "            + 4 * places * tokens * width)", "once per token, not once per place"),
        ("def ex_10_4(places, width, tokens, context_width):\n"
         "    return (2 * places * width ** 2 + 4 * tokens * context_width * width\n"
         "            + 4 * places * tokens * width)", "one projection is missing"),
        ("def ex_10_4(places, width, tokens, context_width):\n"
         "    return (4 * places * width ** 2 + 4 * tokens * context_width * width\n"
         "            + 4 * 8 * 40 * places * tokens)", "the heads are wider there"),
    ],
}
