"""Plausible wrong answers to the exercises of chapter 04, and what each must be told."""

WRONG = {
    "04_1": [
        ("""
def ex_04_1(xt, mu, c, a, s):
    return a * c / (a**2 * c + s**2) * xt
""", "where has mu gone"),
        ("""
def ex_04_1(xt, mu, c, a, s):
    return mu + a * c / (a**2 * c + s**2) * (xt - mu)
""", "the surprise is x_t - a mu"),
        ("""
def ex_04_1(xt, mu, c, a, s):
    return mu.expand_as(xt)
""", "before you have seen x_t"),
        ("""
def ex_04_1(xt, mu, c, a, s):
    return mu + c / (a**2 * c + s**2) * (xt - a * mu)
""", "check the factor"),
    ],
    "04_2": [
        ("""
def ex_04_2(points, means, weights):
    nearest = torch.cdist(points, means).argmin(dim=1)
    shares = torch.bincount(nearest, minlength=len(means)) / len(points)
    return float((shares - weights).abs().sum())
""", "take half of it"),
        ("""
def ex_04_2(points, means, weights):
    nearest = torch.cdist(points, means).argmin(dim=1)
    shares = torch.bincount(nearest) / len(points)
    return float((shares - weights[:len(shares)]).abs().sum() / 2)
""", "minlength"),
        ("""
def ex_04_2(points, means, weights):
    nearest = torch.cdist(points, means).argmin(dim=1)
    shares = torch.bincount(nearest, minlength=len(means)) / len(points)
    return float((shares - weights).sum() / 2)
""", "differences with their sign cancel"),
    ],
}
