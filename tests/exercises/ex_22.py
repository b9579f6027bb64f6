"""Plausible wrong answers to the exercises of chapter 22, and what they must be told."""

_JOIN = """
def ex_22_2(rows, shared):
    def join(tiles, dim):
        whole = tiles[0]
        for tile in tiles[1:]:
            {body}
        return whole
    return {result}
"""
_CACHE = """
def ex_22_4(linear):
    last = [None, None]
    def cached(x):
        if last[0] is None or {new}:
            last[:] = {keep}, linear(x)
        return last[1]
    return cached
"""

WRONG = {
    "22_1": [
        ("def ex_22_1(memory, weights, step, decode):\n    return memory // step",
         "the weights take room"),
        ("def ex_22_1(memory, weights, step, decode):\n"
         "    return (memory - weights - decode) // step", "not added to theirs"),
        ("def ex_22_1(memory, weights, step, decode):\n"
         "    return (memory - weights) // (step + decode)", "the same for any batch"),
        ("def ex_22_1(memory, weights, step, decode):\n"
         "    return (memory - weights) // step", "but no decoding"),
        ("def ex_22_1(memory, weights, step, decode):\n"
         "    return ((memory - weights) // step if weights + decode <= memory\n"
         "            or memory < weights else 0)", "not even the weights fit"),
    ],
    "22_2": [
        (_JOIN.format(body="whole = torch.cat([whole, tile], dim)",
                      result="join([join(row, -1) for row in rows], -2)"),
         "make 12 places"),
        (_JOIN.format(body="whole = torch.cat([whole.narrow(dim, 0, whole.shape[dim] - "
                           "shared), tile], dim)",
                      result="join([join(row, -1) for row in rows], -2) * 0.9"),
         "do not sum to one"),
        ("def ex_22_2(rows, shared):\n"
         "    above, strips = None, []\n"
         "    for row in rows:\n"
         "        done = []\n"
         "        for k, tile in enumerate(row):\n"
         "            if above:\n"
         "                tile = blend(above[k], tile, shared, -2)\n"
         "            if done:\n"
         "                tile = blend(done[-1], tile, shared, -1)\n"
         "            done.append(tile)\n"
         "        last = done[-1]\n"
         "        cut = [t[..., :-shared] for t in done[:-1]]\n"
         "        strips.append(torch.cat([*cut, last], -1))\n"
         "        above = done\n"
         "    cut = [s[..., :-shared, :] for s in strips[:-1]]\n"
         "    return torch.cat([*cut, strips[-1]], -2)", "the old order"),
        (_JOIN.format(body="whole = torch.cat([whole.narrow(dim, 0, whole.shape[dim] - "
                           "shared), tile], dim)",
                      result="join([join(row, -1) for row in rows], -2)"),
         "should be (1-u)(1-v)"),
    ],
    "22_3": [
        ("def ex_22_3(q, k, v, size):\n"
         "    return sum(attention(q, a, b) for a, b in\n"
         "               zip(k.split(size, -2), v.split(size, -2)))",
         "you split the keys"),
        ("def ex_22_3(q, k, v, size):\n    return attention(q, k, v)",
         "as much memory as before"),
        ("def ex_22_3(q, k, v, size):\n"
         "    return torch.cat([attention(p, k, v) for p in q.chunk(size, -2)], -2)",
         "not into `size` parts"),
        ("def ex_22_3(q, k, v, size):\n"
         "    return attention(q[..., :size, :], k, v)", "50 queries want 50 answers"),
        ("def ex_22_3(q, k, v, size):\n"
         "    parts = [attention(p, k, v) for p in q.split(size, -2)]\n"
         "    return torch.cat(parts[::-1], -2)", "in the queries' order"),
    ],
    "22_4": [
        ("def ex_22_4(linear):\n    return linear", "the layer was called again"),
        (_CACHE.format(new="False", keep="x"), "got the remembered result of the first"),
        (_CACHE.format(new="not torch.equal(x, last[0])", keep="x"),
         "equal numbers: you compare numbers"),
        (_CACHE.format(new="last[0] != id(x)", keep="id(x)"), "an id was taken"),
        ("def ex_22_4(linear):\n"
         "    return lambda x: linear(x) - linear(x) + linear(x)", "reaches the layer once"),
    ],
    "22_5": [
        ("def ex_22_5(layers, peak, bandwidth):\n"
         "    work, moved = (sum(column) for column in zip(*layers))\n"
         "    return max(work / peak, moved / bandwidth), 1.0",
         "the maximum of the two sums"),
        ("def ex_22_5(layers, peak, bandwidth):\n"
         "    return sum(w / peak + m / bandwidth for w, m in layers), 0.5",
         "operations and bytes added"),
        ("def ex_22_5(layers, peak, bandwidth):\n"
         "    times = [max(w / peak, m / bandwidth) for w, m in layers]\n"
         "    waits = [w / peak < m / bandwidth for w, m in layers]\n"
         "    return sum(times), sum(waits) / len(layers)", "not of the layers"),
    ],
}
