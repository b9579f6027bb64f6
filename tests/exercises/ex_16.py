"""Plausible wrong answers to the exercises of chapter 16, and what each must be told."""

_SEAM = ("def ex_16_3(painted, original, mask, radius):\n"
         "    b = F.avg_pool2d(mask, 2 * radius + 1, stride=1, padding=radius{border})\n"
         "    share = {share}\n"
         "    mixed = share * painted + (1 - share) * original\n"
         "    return {join}")
_WHERE = "torch.where(mask.bool(), mixed, original)"
_COUNT = ", count_include_pad=False"
_LOOPS = ("def ex_16_5(z, levels, down, up, repeats):\n"
          "    for now, then in zip(levels, levels[1:]):\n"
          "        for k in range(repeats):\n"
          "            z = down(z, now, then)\n"
          "            {up}\n"
          "    return z")
_TRIES = ("def ex_16_5(z, levels, down, up, repeats):\n"
          "    pairs = list(zip(levels, levels[1:]))\n"
          "    for now, then in pairs[:-1]:\n"
          "        for k in range(repeats):\n"
          "            z = down(z, now, then)\n"
          "            if k + 1 < repeats:\n"
          "                {up}\n"
          "    {last}")
_CANVAS = ("def ex_16_6(picture, left, right, multiple):\n"
           "    {first}\n"
           "    canvas = F.pad(picture, (left, right, 0, 0){mode})\n"
           "    mask = F.pad(torch.{old}_like(picture[:, :1]), (left, right, 0, 0),\n"
           "                 value={new})\n"
           "    return canvas, mask")
_FILL = "right += -(picture.shape[-1] + left + right) % multiple"
_NEAR = ", mode='replicate'"

WRONG = {
    "16_1": [
        ("def ex_16_1(n, strength):\n    made = min(int(n * strength), n)\n"
         "    return made, 2 * made", "counted from the end"),
        ("def ex_16_1(n, strength):\n    made = min(int(n * strength), n)\n"
         "    return n - made, made", "two predictions in each step"),
        ("def ex_16_1(n, strength):\n    made = round(n * strength)\n"
         "    return n - made, 2 * made", "cut, not rounded"),
        ("def ex_16_1(n, strength):\n    made = int(n * strength + 1e-6)\n"
         "    return n - made, 2 * made", "for n = 100, strength 0.29: the first is 72"),
        ("def ex_16_1(n, strength):\n    made = int(n * strength)\n"
         "    return n - made - 1, 2 * made", "the first is number 14, not 13"),
    ],
    "16_2": [
        ("def ex_16_2(mask, factor):\n    return mask[..., ::factor, ::factor]",
         "the upper left pixel of each square"),
        ("def ex_16_2(mask, factor):\n"
         "    return (F.avg_pool2d(mask, factor) >= 0.5).float()", "wants half of the pixels"),
        ("def ex_16_2(mask, factor):\n    return F.avg_pool2d(mask, factor)",
         "a share of the square"),
        ("def ex_16_2(mask, factor):\n    return F.max_pool2d(mask, factor, stride=1)",
         "not (2, 1, 3, 5)"),
    ],
    "16_3": [
        (_SEAM.format(border=_COUNT, share="mask", join=_WHERE), "as hard as before"),
        (_SEAM.format(border=_COUNT, share="b", join="mixed"), "outside of the hole have changed"),
        (_SEAM.format(border=_COUNT, share="b", join=_WHERE), "the share is 2 b - 1, not b"),
        (_SEAM.format(border="", share="(2 * b - 1).clamp(min=0)", join=_WHERE),
         "what lies beyond it does not count"),
        (_SEAM.format(border=_COUNT, share="(2 * b - 1).clamp(min=0) ** 2", join=_WHERE),
         "from the edge on the shares should be"),
        (_SEAM.format(border=_COUNT, share="2 * b - 1", join=_WHERE), "in a corner of the hole"),
        (_SEAM.format(border=_COUNT, share="(2 * b - 1).clamp(min=0)", join="mixed"),
         "positive outside of the hole"),
        ("def ex_16_3(painted, original, mask, radius):\n"
         "    wide = F.pad(mask, (radius,) * 4, mode='replicate')\n"
         "    b = F.avg_pool2d(wide, 2 * radius + 1, stride=1)\n"
         "    share = mask * (2 * b - 1).clamp(min=0)\n"
         "    return original + share * (painted - original)", "none repeated or mirrored"),
    ],
    "16_4": [
        ("def ex_16_4(noises, weights):\n"
         "    return torch.einsum('k,kchw->chw', weights / weights.sum(), noises)",
         "make the noise too weak"),
        ("def ex_16_4(noises, weights):\n"
         "    return torch.einsum('k,kchw->chw', weights, noises)", "keeps the variance at 1"),
        ("def ex_16_4(noises, weights):\n"
         "    mixed = torch.einsum('k,kchw->chw', weights, noises)\n"
         "    return mixed / mixed.std()", "divided by its own standard deviation"),
        ("def ex_16_4(noises, weights):\n"
         "    mixed = torch.einsum('k,kchw->chw', weights, noises)\n"
         "    return mixed / mixed.square().mean().sqrt()",
         "divided by its own root mean square"),
        ("def ex_16_4(noises, weights):\n    weights = (weights / weights.sum()).sqrt()\n"
         "    return torch.einsum('k,kchw->chw', weights, noises)",
         "the proportions are not those asked for"),
    ],
    "16_5": [
        (_LOOPS.format(up="z = up(z, then, now)"), "no `up` after the last try"),
        (_LOOPS.format(up="z = up(z, then, now) if k + 1 < repeats else z"),
         "the last step, to clean data, is made once"),
        (_LOOPS.format(up="pass"), "after a step one goes up again"),
        ("def ex_16_5(z, levels, down, up, repeats):\n    return z",
         "neither down nor up was called"),
        (_TRIES.format(up="up(z, then, now)", last="return down(z, *pairs[-1])"),
         "of 7 results"),
        (_TRIES.format(up="z = up(z, then, now)", last="down(z, *pairs[-1]); return z"),
         "6 of 7 results"),
    ],
    "16_6": [
        (_CANVAS.format(first="pass", mode=_NEAR, old="zeros", new="1.0"),
         "21 columns are no multiple"),
        (_CANVAS.format(first=_FILL.replace("right +=", "left +="), mode=_NEAR, old="zeros",
                        new="1.0"), "belong to the right side"),
        (_CANVAS.format(first=_FILL, mode="", old="zeros", new="1.0"), "gray columns"),
        (_CANVAS.format(first=_FILL, mode=_NEAR, old="ones", new="0.0"),
         "the mask is 1 where to paint"),
        (_CANVAS.format(first=_FILL, mode=", mode='reflect'", old="zeros", new="1.0"),
         "should repeat the nearest old one"),
        (_CANVAS.format(first="right -= (picture.shape[-1] + left + right) % multiple",
                        mode=_NEAR, old="zeros", new="1.0"), "round up, not down"),
        (_CANVAS.format(first="right += multiple - (picture.shape[-1] + left + right) % multiple",
                        mode=_NEAR, old="zeros", new="1.0"), "a multiple of 4 already: add none"),
        ("def ex_16_6(picture, left, right, multiple):\n"
         f"    {_FILL}\n"
         f"    canvas = F.pad(picture, (left, right, 0, 0){_NEAR})\n"
         "    mask = torch.ones_like(canvas[:, :1])\n"
         "    mask[..., left:-right] = 0\n"
         "    return canvas, mask", "a slice like [a:-0]"),
    ],
}
