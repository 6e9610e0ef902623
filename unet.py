"""The DDPM++ and NCSN++ U-Nets and the denoiser D(x; sigma) around them.

The networks of Song et al. (2021, arXiv 2011.13456) as configured by EDM (Karras et al. 2022, arXiv
2206.00364) and by the paper (section 2, appendix A), with the published parameter names, so that
published weights load as they are. DDPM++ and NCSN++ share one U-Net and differ in the encoder
(plain, or with a residual input pyramid), the width of the noise embedding and the resampling filter.

    D = Denoiser("ddpmpp", "vp", img_resolution=32, img_channels=3, width=128)
    x_denoised = D(x, sigma)             # x [B, C, H, W] in [-1, 1] plus noise, sigma [B]
    loss = D.loss(y, sigma, noise)       # [B]
"""
import contextlib
import dataclasses
import math
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from diffusion.dit import DiT
from diffusion.objectives import Objective
from kernels import layers

ARCHITECTURES = dict(
    ddpmpp=dict(residual_encoder=False, noise_mult=1, taps=(1, 1), embedding="positional"),
    ncsnpp=dict(residual_encoder=True, noise_mult=2, taps=(1, 3, 3, 1), embedding="fourier"),
    dit=dict(embedding="positional"))  # no U-Net, but the transformer of diffusion/dit.py
EMBEDDINGS = ("positional", "fourier")
PRECISIONS = ("fp32", "tf32", "bf16")
PRECISION_CHOICES = ("auto", *PRECISIONS)  # of --precision: see `precision_on`

# Larger values are typos, and are refused before they exhaust the memory
MAX_CHANNELS, MAX_BLOCKS, MAX_LABELS = 8192, 100, 2**24
MAX_PARAMETERS = 2**31

AUGMENT_DIM = 9        # numbers that images/augment.py tells of an image
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
    """F(x; c_noise, labels): [B, C, H, W] -> [B, C, H, W]. Arguments as for `Denoiser`."""

    def __init__(self, arch, img_resolution, img_channels, label_dim, width, blocks, channel_mult,
                 attn_resolutions, embedding, skip_connections, dropout, augment_dim=0):
        super().__init__()
        form = ARCHITECTURES[arch]
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
        """The embedding [B, 4 width] of noise levels c_noise [B], labels [B] or None, augment as in `loss`.

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


class Denoiser(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; c_noise), a preconditioned network F (EDM, table 1).

    arch              "ddpmpp" or "ncsnpp", U-Nets, or "dit", which has no use for what is said of levels
    precond           "vp", "ve", "edm" or "flow": preconditioning, loss weight and noise levels of training
    img_resolution    pixels a side, divisible by 2^(levels - 1)
    img_channels      1 (grey) or 3
    label_dim         number of labels, 0 for an unconditional model
    width             channels of the first convolution, or of a token; a multiple of 4
    blocks            residual blocks a resolution (the decoder has one more), or of the transformer
    channel_mult      channels of each level in units of `width`; its length is the number of levels
    attn_resolutions  resolutions with self-attention; none of them by default means half of img_resolution
    embedding         "positional" or "fourier"; by default what arch was published with
    skip_connections  0/1 mask in encoder order, (blocks + 1) a level; a 0 replaces that skip by zeros
    dropout           probability, in training mode
    generator         draws the initial weights (torch's default generator if None)
    predict, loss_weight, loss    as in objectives.Objective
    patch             pixels a side of a token of "dit"
    augment_dim       numbers that say how an image was augmented; 0 without augmentation

    Raises ValueError, naming the value and the rule, for what cannot be built.
    """

    def __init__(self, arch, precond, img_resolution, img_channels, label_dim=0, width=128, blocks=2,
                 channel_mult=(2, 2, 2), attn_resolutions=None, embedding=None, skip_connections=None,
                 dropout=0.13, generator=None, predict=None, loss_weight="published", loss="l2",
                 patch=2, augment_dim=0):
        super().__init__()
        self.objective = Objective(precond, predict, loss_weight, loss)
        if arch == "dit":
            channel_mult, attn_resolutions, embedding, skip_connections = (1,), (), None, None
        embedding = embedding or ARCHITECTURES.get(arch, {}).get("embedding")
        attn_resolutions = [img_resolution // 2] if attn_resolutions is None else list(attn_resolutions)
        skips = (blocks + 1) * len(channel_mult)
        skip_connections = [1] * skips if skip_connections is None else [int(s) for s in skip_connections]
        for value, allowed in ((arch, tuple(ARCHITECTURES)), (embedding, EMBEDDINGS)):
            if value not in allowed:
                raise ValueError(f"{value!r} is unknown; choose one of {', '.join(allowed)}")
        if not channel_mult or min(channel_mult) < 1 or not 1 <= blocks <= MAX_BLOCKS:
            raise ValueError(f"channel_mult={list(channel_mult)}, blocks={blocks}: "
                             f"both need 1 or more everywhere, and at most {MAX_BLOCKS} blocks")
        if img_resolution < 1 or img_resolution % 2 ** (len(channel_mult) - 1):
            raise ValueError(f"img_resolution={img_resolution} is not divisible by "
                             f"{2 ** (len(channel_mult) - 1)}, "
                             f"as the {len(channel_mult)} levels of channel_mult need")
        if img_channels < 1 or not 0 <= label_dim <= MAX_LABELS:
            raise ValueError(f"img_channels={img_channels}, label_dim={label_dim}: "
                             f"need 1 or more, and 0 to {MAX_LABELS}")
        if width < 4 or width % 4:
            raise ValueError(f"width={width} is not a multiple of 4, as norms and positions need")
        if width * max(channel_mult) > MAX_CHANNELS:
            raise ValueError(f"width={width} times {max(channel_mult)} is more than {MAX_CHANNELS} channels; "
                             "lower one of them")
        if len(skip_connections) != skips or not set(skip_connections) <= {0, 1}:
            raise ValueError(f"skip_connections={skip_connections} must be {skips} zeros or ones: "
                             f"{blocks + 1} at each of {len(channel_mult)} levels")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} is not in [0, 1)")
        self.config = dict(
            dataclasses.asdict(self.objective), arch=arch, img_resolution=img_resolution,
            img_channels=img_channels, label_dim=label_dim, width=width, blocks=blocks, dropout=dropout)
        self.config |= dict(patch=patch) if arch == "dit" else dict(
            channel_mult=list(channel_mult), attn_resolutions=attn_resolutions, embedding=embedding,
            skip_connections=skip_connections)
        self.config |= dict(augment_dim=augment_dim) if augment_dim else {}
        self.precision, self.layout = "fp32", torch.contiguous_format
        parameters = sum(math.prod(shape) for shape in shapes(self.config).values())
        if parameters > MAX_PARAMETERS:
            raise ValueError(f"a network of {parameters:,} parameters; at most {MAX_PARAMETERS:,}: "
                             f"lower width={width} or blocks={blocks}")
        self.model = network(self.config)
        self.model.initialize(generator)
        self.sigma_min, self.sigma_max = self.objective.sigma_range()

    def use(self, precision):
        """From now on evaluate the network, but not its weights, preconditioning and loss, in this precision.

        fp32    as published; TF32 is off on CUDA
        tf32    CUDA's products with 10 bits of mantissa, for all of this process
        bf16    torch's autocast: convolutions, products and attention in bfloat16

        Returns self. Raises ValueError for tf32 on a CPU; warns where bf16 is slower.
        """
        device = next(self.parameters()).device
        precision = precision_on(device, precision)
        if device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        elif precision == "tf32":
            raise ValueError("--precision tf32 is a format of CUDA devices; on a CPU choose fp32 or bf16")
        elif precision == "bf16" and not torch.cpu._is_avx512_bf16_supported():
            warnings.warn("this CPU has no bfloat16 instructions: "
                          "--precision bf16 is many times slower than fp32 here", stacklevel=2)
        # tensor cores read channels_last, and so does the norm for GPUs, while convolutions in float32 take
        # as long either way; for CPUs see kernels/layers.py
        last = device.type == "cuda" and (
            precision != "fp32" or layers.runs_triton(device, layers.forms_are_right))
        self.layout = torch.channels_last if last else torch.contiguous_format
        self.precision = precision
        return self.to(memory_format=self.layout)

    def forward(self, x, sigma, labels=None, augment=None):
        """The denoised image [B, C, H, W] of x at noise level sigma: float32, or float64 after D.double().

        sigma: [B] or a number
        labels: int64 class numbers [B] below label_dim; -1, or None for all: "no label", an all-zero one-hot.
        augment: as in `loss`
        """
        dtype = torch.promote_types(self.model.map_layer0.weight.dtype, torch.float32)
        x = x.to(dtype)
        sigma = torch.as_tensor(sigma, device=x.device).to(dtype).reshape(-1, 1, 1, 1)
        c_skip, c_out, c_in, c_noise = self.objective.coefficients(sigma)
        c_noise = c_noise.flatten()
        low = self.precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16) if low else contextlib.nullcontext():
            F_x = self.model((c_in * x).contiguous(memory_format=self.layout), c_noise, labels, augment)
        return c_skip * x + c_out * F_x.to(dtype)

    def loss(self, y, sigma, noise, labels=None, augment=None):
        """Denoising loss of each image [B]: as published, weight(sigma) * |D(y + sigma noise; sigma) - y|^2.

        y [B, C, H, W] in [-1, 1], sigma [B], noise a unit normal like y (paper, eq. 2; EDM, eq. 8).
        augment: how y was augmented, float32 [B, augment_dim]; None, as all zeros, is not at all.
        """
        s = sigma.reshape(-1, 1, 1, 1)
        return self.objective.measure(self(y + s * noise, sigma, labels, augment) - y, sigma)


def precision_on(device, precision="auto"):
    """The precision to use on a device: "auto" means tf32 on CUDA and float32, as published, elsewhere.

    On CUDA tf32 is several times as fast. Even bfloat16, whose mantissa is three bits shorter, memorizes as
    much as float32 within the interval that was measured (docs/performance.md).
    """
    if precision not in PRECISION_CHOICES:
        raise ValueError(f"precision {precision!r} is unknown; choose one of {', '.join(PRECISION_CHOICES)}")
    if precision == "auto":
        return "tf32" if device.type == "cuda" else "fp32"
    return precision


def build(options, D, generator=None):
    """The Denoiser that the options of train.py describe for the training set D (data.Images)."""
    levels = [D.resolution >> level for level in range(len(options.channel_mult))]
    if not set(options.attn_resolutions or ()) <= set(levels):
        raise ValueError(f"--attn-resolutions {options.attn_resolutions}: this network has {levels}")
    return Denoiser(options.arch, options.precond, D.resolution, D.images.shape[1], D.label_dim,
                    options.width, options.blocks, options.channel_mult, options.attn_resolutions,
                    options.embedding, options.skip_connections, options.dropout, generator,
                    options.predict, options.loss_weight, options.loss, options.patch,
                    AUGMENT_DIM if options.augment else 0)


def network(config):
    """The network F of a Denoiser's config, with weights of no value yet."""
    objective = {field.name for field in dataclasses.fields(Objective)}
    own = {key: value for key, value in config.items() if key not in objective}
    if own["arch"] == "dit":
        del own["arch"]
        return DiT(**own)
    return UNet(**own)


def shapes(config):
    """The shape of every tensor of the network of a Denoiser's config, without the memory that they take."""
    with torch.device("meta"):
        net = network(config)
    return {name: tuple(t.shape) for name, t in net.state_dict().items()}
