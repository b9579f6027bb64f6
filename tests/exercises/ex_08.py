"""Plausible wrong answers to the exercises of chapter 8, and what they must be told."""

WRONG = {
    "08_1": [
        ("""
def ex_08_1(words):
    pairs = Counter()
    for symbols in words:
        pairs.update(zip(symbols, symbols[1:]))
    return dict(pairs)
""", "you counted each word once"),
        ("""
def ex_08_1(words):
    text = [s for symbols, count in words.items() for s in symbols * count]
    return dict(Counter(zip(text, text[1:])))
""", "stay inside words"),
        ("""
def ex_08_1(words):
    pairs = Counter()
    for symbols, count in words.items():
        for pair in set(zip(symbols, symbols[1:])):
            pairs[pair] += count
    return dict(pairs)
""", "a pair can occur twice in one word"),
        ("""
def ex_08_1(words):
    pairs = Counter()
    for symbols, count in words.items():
        for pair in pairwise(symbols):
            pairs[pair] += count
    return dict(pairs)
""", "count without overlap"),
    ],
    "08_2": [
        ("""
def ex_08_2(symbols, merges):
    symbols = list(symbols)
    k = 0
    while k < len(symbols) - 1:
        if (symbols[k], symbols[k + 1]) in merges:
            symbols[k:k + 2] = [symbols[k] + symbols[k + 1]]
            k = 0
        else:
            k += 1
    return symbols
""", "you merged from the left"),
        ("""
def ex_08_2(symbols, merges):
    original = set(zip(symbols, symbols[1:]))
    for pair in merges:
        if pair in original:
            symbols = merge_pair(symbols, pair)
    return list(symbols)
""", "you stopped too early"),
        ("""
def ex_08_2(symbols, merges):
    symbols = list(symbols)
    for left, right in merges:
        for k in range(len(symbols) - 1):
            if symbols[k] == left and symbols[k + 1] == right:
                symbols[k:k + 2] = [left + right]
                break
    return symbols
""", "wherever it occurs"),
    ],
    "08_3": [
        ("""
def ex_08_3(prompt, tokenizer, max_length):
    parts = [part.strip() for part in prompt.split(",")]
    for k in range(len(parts), 0, -1):
        text = ", ".join(parts[:k])
        if len(tokenizer.encode(text)) <= max_length:
            return text
    return ""
""", "begin and end need two places"),
        ("""
def ex_08_3(prompt, tokenizer, max_length):
    return tokenizer.decode(tokenizer.encode(prompt)[:max_length - 2]).replace(" ,", ",")
""", "cut at a comma"),
        ("""
def ex_08_3(prompt, tokenizer, max_length):
    parts = [part.strip() for part in prompt.split(",")]
    while len(parts) > 1 and len(tokenizer.encode(", ".join(parts))) + 2 > max_length:
        parts.pop()
    return ", ".join(parts)
""", "not even the first part fits"),
    ],
    "08_4": [
        ("""
def ex_08_4(words, tokenizer):
    return sorted(words, key=lambda word: tokenizer.encode(word)[0])
""", "two tokens each"),
        ("""
def ex_08_4(words, tokenizer):
    single = [word for word in words if len(tokenizer.encode(word)) == 1]
    return sorted(single, key=tokenizer.encode, reverse=True)
""", "upside down"),
        ("""
def ex_08_4(words, tokenizer):
    single = [word for word in words if word + "</w>" in tokenizer.vocab]
    return sorted(single, key=tokenizer.encode)
""", "a capital does not change the tokens"),
    ],
    "08_5": [
        ("""
def ex_08_5():
    return "abababab", [("a", "b"), ("ab", "ab")]
""", "greed wins"),
        ("""
def ex_08_5():
    return "aaaabaaaba", [("b", "a"), ("b", "b")]
""", "does not occur"),
        ("""
def ex_08_5():
    return "aaaabaaaba" * 2, [("b", "a"), ("a", "a")]
""", "1 to 14 letters"),
    ],
}
