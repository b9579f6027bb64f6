"""Plausible wrong answers to the exercises of chapter 00, and what each must be told."""

WRONG = {
    "00_1": [
        ("def ex_00_1(alpha_bar):\n    return (alpha_bar / (1 - alpha_bar)) ** 0.5",
         "the ratio of the scales"),
        ("def ex_00_1(alpha_bar):\n    return (1 - alpha_bar) / alpha_bar",
         "turn it round"),
    ],
    "00_2": [
        ("def ex_00_2(xt, noise, a, s):\n    return xt - s * noise",
         "still scaled by a"),
        ("def ex_00_2(xt, noise, a, s):\n    return (xt - noise) / a",
         "subtract s times the noise"),
    ],
}
