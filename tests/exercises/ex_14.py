"""Plausible wrong answers to the exercises of chapter 14, and what each must be told."""

_FRECHET = """\
def ex_14_3(first, second):
    a, b = {centered}
    n, m = {numbers}
    cross = {cross}
    shift = {shift}
    return float(shift + a.square().sum() / n + b.square().sum() / m - 2 * cross)"""


def _frechet(centered="first - first.mean(0), second - second.mean(0)",
             numbers="len(first) - 1, len(second) - 1",
             cross="torch.linalg.svdvals(a @ b.T).sum() / math.sqrt(n * m)",
             shift="(first.mean(0) - second.mean(0)).square().sum()"):
    return _FRECHET.format(centered=centered, numbers=numbers, cross=cross, shift=shift)


_COVERAGE = """\
def ex_14_5(real, made, k=3):
    among = distances_between({centers}, {centers}){rest}
    radius = among.kthvalue(k, dim=1).values
    return float((distances_between({centers}, {points}).amin(1) <= radius).double().mean())"""

WRONG = {
    "14_1": [
        ("def ex_14_1(n, level=0.95):\n    return 1 - level ** (1 / n)",
         "level and 1 - level are exchanged"),
        ("def ex_14_1(n, level=0.95):\n    return 3 / n", "the approximation"),
        ("def ex_14_1(n, level=0.95):\n    return wilson(0, n)[1]", "that is Wilson's bound"),
        ("def ex_14_1(n, level=0.95):\n    return (1 - level) ** (1 / n)",
         "no success has the probability"),
    ],
    "14_2": [
        ("def ex_14_2(b, c, z=1.96):\n"
         "    return math.ceil(z ** 2 * (b * (1 - b) + c * (1 - c)) / (c - b) ** 2)",
         "not shares of two separate polls"),
        ("def ex_14_2(b, c, z=1.96):\n"
         "    return math.ceil(z * (b + c - (c - b) ** 2) / (c - b) ** 2)",
         "z has to be squared"),
        ("def ex_14_2(b, c, z=1.96):\n"
         "    return int(z ** 2 * (b + c - (c - b) ** 2) / (c - b) ** 2)", "rounded down"),
        ("def ex_14_2(b, c, z=1.96):\n"
         "    return z ** 2 * (b + c - (c - b) ** 2) / (c - b) ** 2", "a whole number"),
        ("def ex_14_2(b, c, z=1.96):\n"
         "    return math.ceil(z ** 2 * math.sqrt(b + c - (c - b) ** 2) / (c - b) ** 2)",
         "the variance, not its root"),
    ],
    "14_3": [
        (_frechet(centered="first, second"), "must be centered"),
        (_frechet(numbers="len(first), len(second)"), "N - 1 and M - 1"),
        (_frechet(cross="(torch.linalg.svdvals(a @ b.T) ** 2).sum() / (n * m)"),
         "those are the eigenvalues"),
        (_frechet(cross="(torch.linalg.svdvals(a @ b.T) / math.sqrt(n * m)).sqrt().sum()"),
         "are the roots already"),
        ("def ex_14_3(first, second):\n"
         "    return frechet_distance(fit_gaussian(first), fit_gaussian(second))",
         "by way of a D x D matrix"),
        (_frechet(shift="(first.mean(0) - second.mean(0)).norm()"), "has to be squared"),
        (_frechet(shift="0.0"), "instead of"),
    ],
    "14_4": [
        ("def ex_14_4(sizes, values):\n    return np.polyfit(sizes, values, 1)[1]",
         "a line over n"),
        ("def ex_14_4(sizes, values):\n    return np.polyfit(1 / sizes, values, 1)[0]",
         "that is the slope"),
        ("def ex_14_4(sizes, values):\n    return np.mean(values)", "the mean of their biases"),
        ("def ex_14_4(sizes, values):\n    return values[-1]", "less biased, not unbiased"),
        ("def ex_14_4(sizes, values):\n    return 2 * values[-1] - values[-2]",
         "use all points"),
    ],
    "14_5": [
        ("def ex_14_5(real, made, k=3):\n    return precision_recall(real, made, k)[0]",
         "that is precision"),
        ("def ex_14_5(real, made, k=3):\n    return precision_recall(real, made, k)[1]",
         "which outliers fool"),
        (_COVERAGE.format(centers="real", points="made", rest=""), "leave it out"),
        ("def ex_14_5(real, made, k=3):\n"
         "    among = distances_between(real, real).fill_diagonal_(torch.inf)\n"
         "    radius = among.amin(1)\n"
         "    return float((distances_between(real, made).amin(1) <= radius)"
         ".double().mean())", "k-th nearest other real picture"),
    ],
}
