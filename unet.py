"""The DDPM++ and NCSN++ U-Nets, whose preconditioned form is diffusion/denoiser.py's D(x; sigma).

The networks of Song et al. (2021, arXiv 2011.13456) as configured by EDM (Karras et al. 2022, arXiv
2206.00364) and by the paper (section 2, appendix A), with the published parameter names, so that
published weights load as they are. DDPM++ and NCSN++ share one U-Net and differ in the encoder
(plain, or with a residual input pyramid), the width of the noise embedding and the resampling filter.
"""
import math

import torch
from torch import nn
from torch.nn import functional as F

from kernels import layers

FORMS = dict(
    ddpmpp=dict(residual_encoder=False, noise_mult=1, taps=(1, 1), embedding="positional"),
    ncsnpp=dict(residual_encoder=True, noise_mult=2, taps=(1, 3, 3, 1), embedding="fourier"))
EMBEDDINGS = ("positional", "fourier")

EMBEDDING_MULT = 4     # width of the time embedding, in units of `width`
SKIP_SCALE = 0.5**0.5  # of the sum of a block and its input: keeps the variance
NORM_EPS = 1e-6
SMALL_GAIN = 1e-5      # initial scale of each residual branch's last layer: blocks start near the identity


class Conv2d(nn.Module):
    """A convolution, after resampling by 2 ("up" or "down") with the separable filter `taps`.

    `filter_last` convolves first, padded for both kernel and filter: the order of NCSN++'s input pyramid.
    """

    def __init__(self, cin, cout, kernel, gain=1.0, resample=None, taps=(1, 1), filter_last=False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(cout, cin, kernel, kernel))
        self.bias = nn.Parameter(torch.empty(cout))
        self.gain, self.resample, self.filter_last = gain, resample, filter_last
        self.padding, self.filter_padding = kernel // 2, (len(taps) - 1) // 2
        self.plain_filter = tuple(taps) == (1, 1)  # nearest neighbour up, mean of 2x2 down
        if resample and not self.plain_filter:
            f = torch.tensor(taps, dtype=torch.float32)
            self.register_buffer("filter", torch.outer(f, f)[None, None] / f.sum()**2, persistent=False)

    def forward(self, x):
        return self.convolve(x, self.bias)

    def convolve(self, x, bias, scale=None):
        """The same with another bias, or None, and the weights times a scale."""
        weight = self.weight if scale is None else self.weight * scale
        if self.filter_last:
            x = F.conv2d(x, weight, padding=self.padding + self.filter_padding)
            return self.resampled(x, padding=0) + bias[:, None, None]
        if self.resample == "up" and self.plain_filter and self.padding == 0:
            # of single pixels: the same on a quarter of them
            return layers.resample(layers.conv2d(x, weight, bias), up=True)
        if self.resample:
            x = self.resampled(x, self.filter_padding)
        return layers.conv2d(x, weight, bias)

    def resampled(self, x, padding):
        """x of twice or half the size."""
        if self.plain_filter:
            return layers.resample(x, up=self.resample == "up")
        taps, how = self.filter.expand(x.shape[1], -1, -1, -1), dict(padding=padding, groups=x.shape[1])
        if self.resample == "up":
            return F.conv_transpose2d(x, 4 * taps, stride=2, **how)
        return F.conv2d(x, taps, stride=2, **how)


class GroupNorm(nn.Module):
    """Group norm of x + shift, then silu and dropout."""

    def __init__(self, channels):
        super().__init__()
        self.groups = min(32, channels // 4)
        if self.groups == 0 or channels % self.groups:
            raise ValueError(f"a norm of {channels} channels does not divide into {self.groups} groups; "
                             "choose width and channel_mult so that every layer has "
                             "a multiple of 4 channels, and a multiple of 32 from 128 up "
                             "(a width that is a multiple of 32 always works)")
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x, shift=None, silu=True, dropout=0.0):
        dropout = dropout if self.training else 0.0
        return layers.norm(x, self.weight, self.bias, self.groups, NORM_EPS, shift, silu, dropout)


class Block(nn.Module):
    """Residual block: norm, silu, conv, + time embedding, norm, silu, dropout, conv; then self-attention."""

    def __init__(self, cin, cout, embedding_channels, dropout, attention=False, resample=None, taps=(1, 1)):
        super().__init__()
        self.norm0 = GroupNorm(cin)
        self.conv0 = Conv2d(cin, cout, 3, resample=resample, taps=taps)
        self.affine = nn.Linear(embedding_channels, cout)
        self.norm1 = GroupNorm(cout)
        self.conv1 = Conv2d(cout, cout, 3, gain=SMALL_GAIN)
        self.skip = Conv2d(cin, cout, 1, resample=resample, taps=taps) if cin != cout or resample else None
        self.dropout, self.attention = dropout, attention
        if attention:
            self.norm2 = GroupNorm(cout)
            self.qkv = Conv2d(cout, 3 * cout, 1, gain=0.2**0.5)
            self.proj = Conv2d(cout, cout, 1, gain=SMALL_GAIN)

    def forward(self, x, embedding):
        h = self.conv0.convolve(self.norm0(x), None)
        # [B, C], the same for every pixel
        shift = F.linear(embedding, self.affine.weight, self.affine.bias + self.conv0.bias)
        h = self.norm1(h, shift, dropout=self.dropout)
        x = layers.scaled_sum(self.conv1, h, x, self.skip, SKIP_SCALE)
        if self.attention:
            B, C, H, W = x.shape
            # published rows are [C, 3]; as [3, C] they give q, k and v that need not be copied
            rows = [t.unflatten(0, (C, 3)).transpose(0, 1).flatten(0, 1)
                    for t in (self.qkv.weight, self.qkv.bias)]
            qkv = layers.pixels(layers.conv2d(self.norm2(x, silu=False), *rows))     # [B, HW, 3C]
            qkv = qkv.contiguous().unflatten(2, (3, C)).unsqueeze(1)                 # [B, 1, HW, 3, C]
            h = layers.attention(*qkv.unbind(3))                                     # [B, 1, HW, C]
            x = layers.scaled_sum(self.proj, h.transpose(2, 3).reshape(B, C, H, W), x, None, SKIP_SCALE)
        return x


class UNet(nn.Module):
    """F(x; c_noise, labels): [B, C, H, W] -> [B, C, H, W]. Arguments as for `denoiser.Denoiser`."""

    def __init__(self, arch, img_resolution, img_channels, label_dim, width, blocks, channel_mult,
                 attn_resolutions, embedding, skip_connections, dropout, augment_dim=0):
        super().__init__()
        form = FORMS[arch]
        self.skip_connections, self.label_dim, self.img_channels = skip_connections, label_dim, img_channels
        noise_channels, embedding_channels = width * form["noise_mult"], width * EMBEDDING_MULT
        self.noise_channels = noise_channels
        self.map_noise = nn.Module() if embedding == "fourier" else None
        if self.map_noise is not None:
            self.map_noise.register_buffer("freqs", torch.empty(noise_channels // 2))
        self.map_label = nn.Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = nn.Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = nn.Linear(noise_channels, embedding_channels)
        self.map_layer1 = nn.Linear(embedding_channels, embedding_channels)

        def block(cin, cout, **how):
            return Block(cin, cout, embedding_channels, dropout, taps=form["taps"], **how)

        self.enc, skips, c, pyramid = nn.ModuleDict(), [], width, img_channels
        for level, mult in enumerate(channel_mult):
            r = img_resolution >> level
            if level == 0:
                self.enc[f"{r}x{r}_conv"] = Conv2d(img_channels, c, 3)
            else:
                self.enc[f"{r}x{r}_down"] = block(c, c, resample="down")
                if form["residual_encoder"]:
                    self.enc[f"{r}x{r}_aux_residual"] = Conv2d(
                        pyramid, c, 3, resample="down", taps=form["taps"], filter_last=True)
                    pyramid = c
            skips.append(c)
            for i in range(blocks):
                self.enc[f"{r}x{r}_block{i}"] = block(c, width * mult, attention=r in attn_resolutions)
                c = width * mult
                skips.append(c)

        self.dec = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(channel_mult))):
            r = img_resolution >> level
            if level == len(channel_mult) - 1:
                self.dec[f"{r}x{r}_in0"] = block(c, c, attention=True)
                self.dec[f"{r}x{r}_in1"] = block(c, c)
            else:
                self.dec[f"{r}x{r}_up"] = block(c, c, resample="up")
            for i in range(blocks + 1):
                self.dec[f"{r}x{r}_block{i}"] = block(c + skips.pop(), width * mult,
                                                      attention=i == blocks and r in attn_resolutions)
                c = width * mult
        self.dec[f"{r}x{r}_aux_norm"] = GroupNorm(c)
        self.dec[f"{r}x{r}_aux_conv"] = Conv2d(c, img_channels, 3, gain=SMALL_GAIN)

    @torch.no_grad()
    def initialize(self, generator=None):
        """Draw the weights as published: Xavier uniform times a gain, biases 0, frequencies 16 * normal."""
        if self.map_noise is not None:
            self.map_noise.freqs.normal_(generator=generator).mul_(16)
        for module in self.modules():
            if isinstance(module, (nn.Linear, Conv2d)):
                fan_out, fan_in = module.weight.shape[:2]
                kernel = module.weight[0, 0].numel()
                gain = getattr(module, "gain", 1.0)
                bound = gain * math.sqrt(6 / ((fan_in + fan_out) * kernel))
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.zero_()

    def embed(self, c_noise, labels, augment=None):
        """The embedding [B, 4 width] of c_noise [B], labels [B] or None, augment as for `Denoiser.loss`.

        One noise level and no labels, as in sampling, are embedded once: [1, 4 width].
        """
        if self.map_noise is not None:
            frequencies = 2 * math.pi * self.map_noise.freqs
        else:
            half = self.noise_channels // 2
            powers = torch.arange(half, dtype=c_noise.dtype, device=c_noise.device) / (half - 1)
            frequencies = (1 / 10000) ** powers
        phase = torch.outer(c_noise, frequencies)
        e = torch.cat([phase.sin(), phase.cos()], dim=1)
        if self.map_label is not None:
            e = e + self.map_label.bias
            if labels is not None:  # the published one-hot * sqrt(label_dim) times the matrix, as a look-up
                column = F.embedding(labels.clamp(min=0), self.map_label.weight.t()) * self.label_dim**0.5
                e = e + column * (labels >= 0)[:, None]
        if augment is not None:
            e = e + self.map_augment(augment.to(e.dtype))
        return F.silu(self.map_layer1(F.silu(self.map_layer0(e))))

    def forward(self, x, c_noise, labels=None, augment=None):
        embedding = self.embed(c_noise, labels, augment)
        skips, pyramid = [], x
        for name, layer in self.enc.items():
            if name.endswith("_aux_residual"):
                x = pyramid = (x + layer(pyramid)) * SKIP_SCALE
                # the running sum replaces the stored skip only where that skip is kept
                if self.skip_connections[len(skips) - 1]:
                    skips[-1] = x
            else:
                x = layer(x, embedding) if isinstance(layer, Block) else layers.laid_out(layer(x))
                skips.append(x if self.skip_connections[len(skips)] else torch.zeros_like(x))
        for name, layer in self.dec.items():
            if "_aux_" in name:
                x = layer(x)
            else:
                x = layer(torch.cat([x, skips.pop()], dim=1) if "_block" in name else x, embedding)
        return x

    def matrices(self):
        """The weights that Muon takes: none that reads images, labels or augmentation, or writes images."""
        return [p for name, p in self.named_parameters() if p.ndim > 1
                and self.img_channels not in p.shape[:2]
                and not name.startswith(("map_label", "map_augment"))]

    def flops(self):
        """About the FLOPs of one evaluation of an image: each weight meets each pixel of its level."""
        layers_of = [*self.enc.items(), *self.dec.items()]
        # names begin with the resolution, such as 32x32_conv
        return sum(2 * p.numel() * int(name.split("x")[0])**2
                   for name, layer in layers_of for p in layer.parameters())
