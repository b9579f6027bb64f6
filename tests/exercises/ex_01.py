"""Plausible wrong answers to the exercises of chapter 01, and what each must hear."""

WRONG = {
    "01_1": [
        ("def ex_01_1(picture, alpha):\n    return alpha[:, :, None] * picture",
         "only black may be left"),
        ("def ex_01_1(picture, alpha):\n    picture *= 1 - alpha[:, :, None]\n    return picture",
         "has changed"),
        ("def ex_01_1(picture, alpha):\n    return (1 - alpha[:, :, None]) ** 2 * picture",
         "what lies between is not"),
        ("def ex_01_1(picture, alpha):\n    return (1 - alpha) * picture.mean(-1)",
         "the shape is (5, 4)"),
    ],
    "01_2": [
        ("def ex_01_2(scene):\n    return scene", "64 pixels wide, so 64 - x"),
        ("def ex_01_2(scene):\n"
         "    return replace(scene, items=tuple(replace(i, x=63 - i.x) for i in scene.items))",
         "64 pixels wide, so 64 - x"),
        ("def ex_01_2(scene):\n"
         "    return replace(scene, items=tuple(replace(i, x=64 - i.x) for i in scene.items))",
         "tilts turn round"),
        ("def ex_01_2(scene):\n"
         "    return replace(scene, items=tuple(\n"
         "        replace(i, x=64 - i.x, angle=-i.angle) for i in scene.items))",
         "not what it shows"),
        ("def ex_01_2(scene):\n"
         "    caption = scene.caption.replace('left', 'right')\n"
         "    return replace(scene, caption=caption, items=tuple(\n"
         "        replace(i, x=64 - i.x, angle=-i.angle) for i in scene.items))",
         "own facts disagree"),
        ("def ex_01_2(scene):\n"
         "    other = {'to the left of': 'to the right of', 'on the left': 'on the right',\n"
         "             'to the right of': 'to the left of', 'on the right': 'on the left'}\n"
         "    new = replace(scene, items=tuple(\n"
         "        replace(i, x=64 - i.x, angle=-i.angle) for i in scene.items),\n"
         "        relation=other.get(scene.relation, scene.relation),\n"
         "        place=other.get(scene.place, scene.place))\n"
         "    return replace(new, caption=write_caption(new.facts))",
         "the gradient of the background is not mirrored"),
    ],
    "01_3": [
        ("def ex_01_3(caption):\n"
         "    f = parse_caption(caption)\n"
         "    if len(f.sprites) < 2 or not set(f.sprites) <= set(FAMILY):\n"
         "        return None\n"
         "    if f.sprites[0].split()[0] == f.sprites[1].split()[0]:\n"
         "        return None\n"
         "    return write_caption(replace(f, sprites=f.sprites[::-1]))",
         "the objects have changed places"),
        ("def ex_01_3(caption):\n"
         "    f = parse_caption(caption)\n"
         "    if len(f.sprites) < 2 or not set(f.sprites) <= set(FAMILY):\n"
         "        return None\n"
         "    (a, b), (c, d) = (s.split() for s in f.sprites)\n"
         "    if a == c:\n"
         "        return None\n"
         "    return write_caption(replace(f, sprites=(f'{c} {b}', f'{a} {d}')))",
         "sizes stay, a and an follow the color"),
        ("def ex_01_3(caption):\n"
         "    f = parse_caption(caption)\n"
         "    (a, b), (c, d) = (s.split() for s in (f.sprites * 2)[:2])\n"
         "    return write_caption(replace(f, sprites=(f'{c} {b}', f'{a} {d}')))",
         "your code raised"),
        ("def ex_01_3(caption):\n    return None", "has two colored shapes"),
        ("def ex_01_3(caption):\n    return caption", "has no two colors to exchange"),
    ],
    "01_4": [
        ("def ex_01_4(pixels):\n    return pixels.mean((0, 1))", "objects pull it"),
        ("def ex_01_4(pixels):\n    return pixels[0, 0]", "like an object"),
        ("def ex_01_4(pixels):\n    return np.median(pixels.reshape(-1, 3), axis=0)",
         "close but more than 0.02"),
    ],
}
