"""A diffusion transformer on patches of pixels, the other kind of network that a Denoiser may have.

DiT with adaLN-zero (Peebles and Xie 2023, arXiv 2212.09748), of pixels and not of latents. At the start every
block is the identity and the output is zero. Dropout, which DiT does without, is inside the MLPs.
"""
import torch
from torch import nn
from torch.nn import functional as F

from kernels import layers

HEAD = 64             # channels of a head of attention, about
MLP_MULT = 4          # width of the MLPs, in units of `width`
NOISE_CHANNELS = 256  # sines and cosines of the noise level
LONGEST = 10_000      # the sines' wavelengths are 2 pi to 2 pi times this
NORM_EPS = 1e-6
SMALL_STD = 0.02      # of the initial weights of embeddings


def modulated(x, shift, scale):
    """Layer norm of x [B, T, C], whose scale and shift [B, 1, C] come from the embedding."""
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


def sines(positions, channels):
    """Sines and cosines [N, channels] of positions [N], of geometric frequencies."""
    powers = torch.arange(channels // 2, dtype=positions.dtype, device=positions.device) / (channels // 2)
    phase = torch.outer(positions, LONGEST ** -powers)
    return torch.cat([phase.sin(), phase.cos()], dim=1)


class Block(nn.Module):
    """Self-attention, then an MLP, each between a modulated norm and a gate, beside the identity."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.affine = nn.Linear(width, 6 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp0, self.mlp1 = nn.Linear(width, MLP_MULT * width), nn.Linear(MLP_MULT * width, width)
        self.heads, self.dropout = heads, dropout

    def forward(self, x, embedding):
        shift0, scale0, gate0, shift1, scale1, gate1 = self.affine(embedding)[:, None].chunk(6, dim=2)
        qkv = self.qkv(modulated(x, shift0, scale0)).unflatten(2, (3, self.heads, -1))
        h = layers.attention(*qkv.permute(2, 0, 3, 1, 4))                        # [B, heads, T, C / heads]
        x = x + gate0 * self.proj(h.transpose(1, 2).flatten(2))
        h = F.gelu(self.mlp0(modulated(x, shift1, scale1)), approximate="tanh")
        return x + gate1 * self.mlp1(F.dropout(h, self.dropout, self.training))


class DiT(nn.Module):
    """F(x; c_noise, labels): [B, C, H, W] -> [B, C, H, W]. Arguments as for `denoiser.Denoiser`."""

    def __init__(self, img_resolution, img_channels, label_dim, width, blocks, patch, dropout,
                 augment_dim=0):
        super().__init__()
        heads = max(1, width // HEAD)
        if patch < 1 or img_resolution % patch:
            raise ValueError(f"patch={patch} does not divide img_resolution={img_resolution}")
        if width % heads:
            raise ValueError(f"width={width} does not divide into {heads} heads of attention; "
                             f"a multiple of {HEAD} always does")
        side, values = img_resolution // patch, img_channels * patch**2
        self.map_layer0, self.map_layer1 = nn.Linear(NOISE_CHANNELS, width), nn.Linear(width, width)
        self.map_label = nn.Embedding(label_dim, width) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, width, bias=False) if augment_dim else None
        self.first = nn.Linear(values, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(blocks))
        self.affine, self.last = nn.Linear(width, 2 * width), nn.Linear(width, values)
        self.side, self.patch = side, patch
        line = sines(torch.arange(side, dtype=torch.float32), width // 2)
        at = line.repeat_interleave(side, 0), line.repeat(side, 1)                # of the row, of the column
        self.register_buffer("position", torch.cat(at, dim=1), persistent=False)  # [T, width]

    def initialize(self, generator=None):
        """Draw the weights as published: Xavier uniform, small embeddings, gates and output 0, biases 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in (self.map_layer0, self.map_layer1, self.map_label):
            if module is not None:
                nn.init.normal_(module.weight, std=SMALL_STD, generator=generator)
        for module in (*(block.affine for block in self.blocks), self.affine, self.last):
            nn.init.zeros_(module.weight)

    def embed(self, c_noise, labels, augment=None):
        """The embedding [B, width] of noise levels c_noise [B] and of labels [B], -1 for none, or None."""
        e = self.map_layer1(F.silu(self.map_layer0(sines(c_noise, NOISE_CHANNELS))))
        if self.map_label is not None and labels is not None:
            e = e + self.map_label(labels.clamp(min=0)) * (labels >= 0)[:, None]
        if augment is not None:
            e = e + self.map_augment(augment.to(e.dtype))
        return F.silu(e)

    def forward(self, x, c_noise, labels=None, augment=None):
        embedding = self.embed(c_noise, labels, augment)
        grid = self.side, self.patch
        x = x.unflatten(3, grid).unflatten(2, grid).permute(0, 2, 4, 1, 3, 5)
        form = x.shape                                               # [B, side, side, C, patch, patch]
        x = self.first(x.flatten(3).flatten(1, 2)) + self.position   # [B, T, width]
        for block in self.blocks:
            x = block(x, embedding)
        x = self.last(modulated(x, *self.affine(embedding)[:, None].chunk(2, dim=2)))
        return x.view(form).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def matrices(self):
        """The weights that Muon takes: none that reads images, labels or augmentation, or writes images."""
        return [p for name, p in self.named_parameters() if p.ndim > 1
                and not name.startswith(("first", "last", "map_label", "map_augment"))]

    def flops(self):
        """FLOPs of one evaluation of an image, without its embedding: weights and tokens meet each token."""
        tokens, width = self.position.shape
        layers_of = [self.first, self.last]
        for block in self.blocks:
            layers_of += [block.qkv, block.proj, block.mlp0, block.mlp1]
        weights = sum(layer.weight.numel() for layer in layers_of)
        return 2 * tokens * weights + 4 * tokens**2 * width * len(self.blocks)
