"""Plausible wrong answers to the exercises of chapter 09, and what each must be told.

The sources run with the names that the chapter's set-up, import and export cells define.
"""

WRONG = {
    "09_1": [
        ("""
def ex_09_1(images, p):
    B, C, S, _ = images.shape
    return images.reshape(B, (S // p) ** 2, C * p * p)
""", "a plain reshape cuts rows into pieces"),
        ("""
def ex_09_1(images, p):
    B, C, S, _ = images.shape
    x = images.view(B, C, S // p, p, S // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (S // p) ** 2, C * p * p)
""", "channels come first inside a patch"),
        ("""
def ex_09_1(images, p):
    B, C, S, _ = images.shape
    x = images.view(B, C, S // p, p, S // p, p)
    return x.permute(0, 4, 2, 1, 3, 5).reshape(B, (S // p) ** 2, C * p * p)
""", "row by row"),
        ("""
def ex_09_1(images, p):
    return F.unfold(images, p, stride=p)
""", "batch, patches, numbers"),
    ],
    "09_2": [
        ("""
def ex_09_2(image_embeds, text_embeds, kappa):
    return clip_loss(kappa * image_embeds @ text_embeds.T)
""", "not normalized"),
        ("""
def ex_09_2(image_embeds, text_embeds, kappa):
    z = kappa * F.normalize(image_embeds, dim=-1) @ F.normalize(text_embeds, dim=-1).T
    return (z.logsumexp(1) - z.diagonal()).mean()
""", "the columns are missing"),
        ("""
def ex_09_2(image_embeds, text_embeds, kappa):
    z = kappa * F.normalize(image_embeds, dim=-1) @ F.normalize(text_embeds, dim=-1).T
    return (z.logsumexp(1) + z.logsumexp(0) - 2 * z.diagonal()).mean()
""", "summed, not averaged"),
        ("""
def ex_09_2(image_embeds, text_embeds, kappa):
    z = kappa * F.normalize(image_embeds, dim=-1) @ F.normalize(text_embeds, dim=-1).T
    p, q = z.exp() / z.exp().sum(1, True), z.exp() / z.exp().sum(0, True)
    return -(p.diagonal().log() + q.diagonal().log()).mean() / 2
""", "use logsumexp"),
    ],
    "09_3": [
        ("""
def ex_09_3(image_embeds, class_embeds):
    return (image_embeds @ F.normalize(class_embeds.mean(1), dim=-1).T).argmax(1)
""", "normalize each before the mean"),
        ("""
def ex_09_3(image_embeds, class_embeds):
    return (image_embeds @ F.normalize(class_embeds, dim=-1).mean(1).T).argmax(1)
""", "normalize the mean"),
        ("""
def ex_09_3(image_embeds, class_embeds):
    centers = F.normalize(F.normalize(class_embeds, dim=-1).mean(1), dim=-1)
    return image_embeds @ centers.T
""", "not (2,)"),
        ("""
def ex_09_3(image_embeds, class_embeds):
    return (image_embeds @ class_embeds.mean(1).T).argmax(1)
""", "because its vectors are long"),
    ],
    "09_4": [
        ("""
def ex_09_4(weight, m):
    n = math.isqrt(len(weight) - 1)
    grid = weight[1:].view(1, n, n, -1).permute(0, 3, 1, 2)
    return F.interpolate(grid, (m, m), mode="bicubic")[0].flatten(1).T
""", "a class token and 8 x 8 patches"),
        ("""
def ex_09_4(weight, m):
    n = math.isqrt(len(weight) - 1)
    grid = weight[:-1].view(1, n, n, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (m, m), mode="bicubic")[0].flatten(1).T
    return torch.cat([grid, weight[-1:]])
""", "class token's position must stay"),
        ("""
def ex_09_4(weight, m):
    n = math.isqrt(len(weight) - 1)
    grid = weight[1:].view(1, n, n, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (m, m), mode="bilinear")[0].flatten(1).T
    return torch.cat([weight[:1], grid])
""", "not bicubic"),
        ("""
def ex_09_4(weight, m):
    n = math.isqrt(len(weight) - 1)
    grid = weight[1:].view(1, n, n, -1).permute(0, 3, 2, 1)
    grid = F.interpolate(grid, (m, m), mode="bicubic")[0].flatten(1).T
    return torch.cat([weight[:1], grid])
""", "nothing should change"),
        ("""
def ex_09_4(weight, m):
    n = math.isqrt(len(weight) - 1)
    grid = weight[1:].reshape(1, -1, n, n)
    grid = F.interpolate(grid, (m, m), mode="bicubic").reshape(m * m, -1)
    return torch.cat([weight[:1], grid])
""", "channels got mixed"),
    ],
    "09_5": [
        ("""
def ex_09_5(image_embeds, text_embeds, kappa, bias):
    u, y = F.normalize(image_embeds, dim=-1), F.normalize(text_embeds, dim=-1)
    return -F.logsigmoid((2 * torch.eye(len(u)) - 1) * (kappa * u @ y.T + bias)).mean()
""", "divides by B"),
        ("""
def ex_09_5(image_embeds, text_embeds, kappa, bias):
    u, y = F.normalize(image_embeds, dim=-1), F.normalize(text_embeds, dim=-1)
    return -F.logsigmoid((2 * torch.eye(len(u)) - 1) * (kappa * u @ y.T)).sum() / len(u)
""", "bias is missing"),
        ("""
def ex_09_5(image_embeds, text_embeds, kappa, bias):
    u, y = F.normalize(image_embeds, dim=-1), F.normalize(text_embeds, dim=-1)
    return -F.logsigmoid((kappa * u @ y.T + bias).diagonal()).mean()
""", "only true pairs count"),
        ("""
def ex_09_5(image_embeds, text_embeds, kappa, bias):
    u, y = F.normalize(image_embeds, dim=-1), F.normalize(text_embeds, dim=-1)
    z = (2 * torch.eye(len(u)) - 1) * (kappa * u @ y.T + bias)
    return (1 + (-z).exp()).log().sum() / len(u)
""", "use F.logsigmoid"),
    ],
}
