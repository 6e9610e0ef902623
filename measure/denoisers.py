"""Denoisers by noise level: their losses, what these give away of D, and how two models agree."""
import torch

from search import wilson

BATCH = 256                   # images a pass
MOST_FALSE = 0.01             # of the images outside that a test of membership takes for members
QUANTILES = range(0, 101, 5)  # per cent, of distances and of their ratios
SIGMAS = [round(0.02 * 4000 ** (i / 15), 6) for i in range(16)]  # 0.02 to 80, evenly in the logarithm
LEVELS = range(len(SIGMAS))


@torch.inference_mode()
def losses(denoisers, D, draws, seed=0, device="cpu", levels=LEVELS):
    """Losses of denoisers on images D (data.Images) at `levels` of `SIGMAS`, then |first - last|^2 / dim.

    float64 [denoisers + 1, levels, draws]. All get the same noisy images, each of D as often, or evenly
    chosen ones where those are more than draws; and their labels, if D has any.
    """
    found = []
    index = torch.arange(draws)
    index = index % len(D) if draws >= len(D) else index * len(D) // draws
    for level in levels:
        generator = torch.Generator().manual_seed(seed * len(SIGMAS) + level)
        noise = torch.randn(draws, *D.images.shape[1:], generator=generator)
        for i, n in zip(index.split(BATCH), noise.split(BATCH)):
            y = D.images[i].to(device).double() / 127.5 - 1            # [B, C, H, W]
            sigma = torch.tensor(SIGMAS[level], dtype=torch.float64, device=device)
            x = y + sigma * n.to(device)
            labels = D.labels[i].to(device) if D.label_dim else None
            means = torch.stack([denoise(x, sigma, labels).double() for denoise in denoisers])
            errors = torch.cat([means - y, means[:1] - means[-1:]])    # [denoisers + 1, B, C, H, W]
            found.append(errors.square().flatten(2).mean(2).cpu())
    return torch.cat(found, 1).unflatten(1, (len(levels), draws))


def membership(members, others):
    """How well low losses tell members from others, float64 [*] and [*], as a dict:

    auc  the chance that a member's is the lower, where equal ones count half
    tpr  the share of members under the threshold that at most `MOST_FALSE` of others are under
    """
    from scipy.stats import mannwhitneyu  # takes a second
    wins = mannwhitneyu(others.numpy(), members.numpy()).statistic
    threshold = others.sort().values[int(MOST_FALSE * len(others) + 1e-9)]  # 0.29 * 100 is 28.999...
    return dict(auc=float(wins) / (len(members) * len(others)),
                tpr=float((members < threshold).double().mean()))


def agreement(one, other, nearest, nearest_other):
    """How samples uint8 [N, C, H, W] of two models agree, those of a seed at the same index, as a dict.

    `nearest`, `nearest_other` [N] are squared distances to the nearest training image of the sample's own
    model. A pair is closer if its squared distance is less than both.
    """
    a, b = one.flatten(1).double(), other.flatten(1).double()
    same, mixed = ((a - x).square().sum(1) for x in (b, b.roll(1, 0)))  # of one seed, of two
    closer = int(((same < nearest) & (same < nearest_other)).sum())
    found = dict(count=len(a), closer=closer, share=closer / len(a), interval=wilson(closer, len(a)))
    shares = torch.tensor(QUANTILES, dtype=torch.float64) / 100
    for name, squares in (("a_seed", same), ("two_seeds", mixed),
                          ("training", torch.cat([nearest, nearest_other]).double())):
        squares = squares / a.shape[1]
        found[f"rms_{name}"] = float(squares.mean().sqrt())
        found[f"quantiles_{name}"] = torch.quantile(squares.sqrt(), shares).tolist()
    return found
