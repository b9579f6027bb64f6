"""Plausible wrong answers to the exercises of chapter 15, and what each must be told.

"15_1": [(source of the answer, a fragment of the message it must get), ...]. The sources
run with the names that the chapter's set-up, import and export cells define.
"""

WRONG = {
    "15_1": [
        ("""
def ex_15_1(data):
    length = int.from_bytes(data[:8], "little")
    return {k: tuple(v.get("shape", ())) for k, v in json.loads(data[8:8 + length]).items()}
""", "__metadata__ is a note"),
        ("""
def ex_15_1(data):
    length = int.from_bytes(data[:8], "little")
    return {k: tuple(v["shape"]) for k, v in json.loads(data[8:8 + length]).items()}
""", "an entry has no 'shape': __metadata__ is a note about the file, no tensor"),
        ("""
def ex_15_1(data):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[:length])
    return {k: tuple(v["shape"]) for k, v in header.items() if k != "__metadata__"}
""", "no JSON where you looked"),
        ("""
def ex_15_1(data):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    return {k: v["shape"] for k, v in header.items() if k != "__metadata__"}
""", "return the shapes as tuples"),
        ("""
def ex_15_1(data):
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    return {k: tuple(v["shape"]) or (1,) for k, v in header.items() if k != "__metadata__"}
""", "a scalar has the shape ()"),
    ],
    "15_2": [
        ("""
def ex_15_2(entry, layers):
    way, n = entry.split(".")
    if entry == "input_blocks.0":
        return "conv_in"
    i, j = divmod(int(n), layers + 1)
    if way == "output_blocks":
        return f"up_blocks.{i}.resnets.{j}"
    return f"down_blocks.{i}.resnets.{j}"
""", "one too far"),
        ("""
def ex_15_2(entry, layers):
    way, n = entry.split(".")
    if entry == "input_blocks.0":
        return "conv_in"
    i, j = divmod(int(n) - (way == "input_blocks"), layers + 1)
    return f"{'down' if way == 'input_blocks' else 'up'}_blocks.{i}.resnets.{j}"
""", "no residual block"),
        ("""
def ex_15_2(entry, layers):
    way, n = entry.split(".")
    if entry == "input_blocks.0":
        return "conv_in"
    i, j = divmod(int(n) - 1, layers + 1)
    if way == "output_blocks":
        return f"up_blocks.{i}.resnets.{j}"
    return f"down_blocks.{i}.downsamplers.0" if j == layers else f"down_blocks.{i}.resnets.{j}"
""", "nothing precedes level"),
    ],
    "15_3": [
        ("""
def ex_15_3(weight, bias, proj):
    out = {"projection.weight": proj.T}
    for x, w, b in zip("kqv", weight.chunk(3), bias.chunk(3)):
        out |= {f"{x}_proj.weight": w, f"{x}_proj.bias": b}
    return out
""", "first third belongs to the queries"),
        ("""
def ex_15_3(weight, bias, proj):
    out = {"projection.weight": proj}
    for x, w, b in zip("qkv", weight.chunk(3), bias.chunk(3)):
        out |= {f"{x}_proj.weight": w, f"{x}_proj.bias": b}
    return out
""", "even if it is square"),
        ("""
def ex_15_3(weight, bias, proj):
    out = {"projection.weight": proj.T}
    for x, w, b in zip("qkv", weight.chunk(3, dim=1), bias.chunk(3)):
        out |= {f"{x}_proj.weight": w, f"{x}_proj.bias": b}
    return out
""", "so cut the rows"),
        ("""
def ex_15_3(weight, bias, proj):
    out = {"projection.weight": proj.T}
    for x, w, b in zip("qkv", weight.chunk(3), bias.chunk(3)):
        out |= {f"{x}_proj.weight": w.T, f"{x}_proj.bias": b}
    return out
""", "is not that of nn.MultiheadAttention"),
    ],
    "15_4": [
        ("""
def ex_15_4(data):
    pickle.loads(data)
    return set()
""", "you ran it"),
        ("""
def ex_15_4(data):
    return {a for i, a, _ in pickletools.genops(data) if i.name == "GLOBAL"}
""", "protocol 4 says STACK_GLOBAL"),
        ("""
def ex_15_4(data):
    found, strings = set(), []
    for i, a, _ in pickletools.genops(data):
        if i.name == "GLOBAL":
            found.add(a)
        elif "UNICODE" in i.name:
            strings.append(a)
        elif i.name == "STACK_GLOBAL":
            found.add(" ".join(strings[-2:]))
    return found
""", "fetches it from the memo"),
        ("""
def ex_15_4(data):
    found, strings = set(), []
    for i, a, _ in pickletools.genops(data):
        if i.name == "GLOBAL":
            found.add(a)
        elif "UNICODE" in i.name:
            found.add(a)
    return found
""", "it asks for 'builtins print', not for"),
        ("""
def ex_15_4(data):
    wanted, strings, memo = set(), [], {}
    for instruction, argument, _ in pickletools.genops(data):
        if instruction.name == "GLOBAL":
            wanted.add(argument)
        elif instruction.name == "STACK_GLOBAL":
            wanted.add(" ".join(strings[-2:]))
        elif "UNICODE" in instruction.name:
            strings.append(argument)
        elif instruction.name == "MEMOIZE":
            memo[len(memo)] = strings[-1] if strings else ""
        elif instruction.name in ("BINGET", "LONG_BINGET"):
            strings.append(memo.get(argument, ""))
    return wanted
""", "INST asks for a name, too"),
    ],
    "15_5": [
        ("""
def ex_15_5(a, b, share):
    if a.keys() != b.keys():
        raise ValueError("different names")
    return {k: (share * a[k].float() + (1 - share) * b[k].float()).to(a[k].dtype) for k in a}
""", "the share belongs to the second model"),
        ("""
def ex_15_5(a, b, share):
    mixed = {}
    for k in a:
        x, y = a[k], b[k]
        mean = (1 - share) * x.float() + share * y.float()
        mixed[k] = mean.to(x.dtype) if x.is_floating_point() else x
    return mixed
""", "not a KeyError"),
        ("""
def ex_15_5(a, b, share):
    return {k: ((1 - share) * a[k].float() + share * b[k].float()).to(a[k].dtype)
            if a[k].is_floating_point() else a[k] for k in a if k in b}
""", "mixed in silence"),
        ("""
def ex_15_5(a, b, share):
    return {k: ((1 - share) * a[k].float() + share * b[k].float()).to(a[k].dtype) for k in a}
""", "integers are not mixed"),
        ("""
def ex_15_5(a, b, share):
    if any(k not in b or a[k].shape != b[k].shape for k in a) or len(a) != len(b):
        raise ValueError("these two do not fit")
    return {k: ((1 - share) * a[k].float() + share * b[k].float()).to(a[k].dtype)
            if a[k].is_floating_point() else a[k] for k in a}
""", "say which tensor"),
        ("""
def ex_15_5(a, b, share):
    return {k: (1 - share) * a[k].float() + share * b[k].float() for k in a}
""", "return a's precision"),
        ("""
def ex_15_5(a, b, share):
    for k in a:
        if a[k].is_floating_point():
            a[k].mul_(1 - share).add_(share * b[k])
    return a
""", "the first model was changed"),
    ],
}
