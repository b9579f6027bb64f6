"""Plausible wrong answers to the exercises of chapter 12, and what each must be told."""

WRONG = {
    "12_1": [
        ("def ex_12_1(step, batch_size):\n"
         "    return list(range((step + 1) * batch_size, (step + 2) * batch_size))",
         "skips a batch"),
        ("def ex_12_1(step, batch_size):\n"
         "    return list(range((step - 1) * batch_size, step * batch_size))",
         "repeats the last completed batch"),
        ("def ex_12_1(step, batch_size):\n"
         "    return list(range(batch_size * (batch_size - 1), batch_size**2))",
         "after 2 steps of 5"),
    ],
    "12_2": [
        ("def ex_12_2(snr, gamma):\n"
         "    return (snr + 1).clamp(max=gamma + 1) / (snr + 1)",
         "that is the weight for v"),
        ("def ex_12_2(snr, gamma):\n"
         "    return snr.clamp(max=gamma) / snr",
         "the published min-SNR weight"),
    ],
    "12_3": [
        ("def ex_12_3(values, d):\n"
         "    m = 0.0\n"
         "    for value in values:\n"
         "        m = d * m + (1 - d) * float(value)\n"
         "    return m",
         "divide by the sum of the weights"),
        ("def ex_12_3(values, d):\n"
         "    return float(values.mean())",
         "newer values count more"),
        ("def ex_12_3(values, d):\n"
         "    m = float(values[0])\n"
         "    for value in values[1:]:\n"
         "        m = d * m + (1 - d) * float(value)\n"
         "    return m",
         "started at the first value"),
        ("def ex_12_3(values, d):\n"
         "    m = w = 0.0\n"
         "    for value in values:\n"
         "        m = (1 - d) * m + d * float(value)\n"
         "        w = (1 - d) * w + d\n"
         "    return m / w",
         "are exchanged"),
        ("def ex_12_3(values, d):\n"
         "    m = 0.0\n"
         "    for value in values.flip(0):\n"
         "        m = d * m + (1 - d) * float(value)\n"
         "    return m / (1 - d ** len(values))",
         "the order is reversed"),
    ],
    "12_4": [
        ("def ex_12_4(gradients, counts):\n"
         "    return sum(gradients) / len(gradients)",
         "plain mean of the parts"),
        ("def ex_12_4(gradients, counts):\n"
         "    return sum(gradients)",
         "counts with its share of the samples"),
        ("def ex_12_4(gradients, counts):\n"
         "    return sum(g * n for g, n in zip(gradients, counts))",
         "divide by the number of samples"),
    ],
}
