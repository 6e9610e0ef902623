"""The denoiser D(x; sigma): a network, U-Net or transformer, with its preconditioning, precision and loss.

    D = Denoiser("ddpmpp", "vp", img_resolution=32, img_channels=3, width=128)
    x_denoised = D(x, sigma)             # x [B, C, H, W] in [-1, 1] plus noise, sigma [B]
    loss = D.loss(y, sigma, noise)       # [B]
"""
import contextlib
import dataclasses
import math
import warnings
from types import SimpleNamespace

import torch
from torch import nn

from diffusion.dit import DiT
from diffusion.objectives import Objective
from images import augment
from kernels import layers
from unet import EMBEDDINGS, FORMS, UNet

ARCHITECTURES = (*FORMS, "dit")
PRECISIONS = ("fp32", "tf32", "bf16")
PRECISION_CHOICES = ("auto", *PRECISIONS)  # of --precision: see `precision_on`

# Larger values are typos, and are refused before they exhaust the memory
MAX_CHANNELS, MAX_BLOCKS, MAX_LABELS = 8192, 100, 2**24
MAX_PARAMETERS = 2**31


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
        self.config = dict(
            dataclasses.asdict(self.objective), arch=arch, img_resolution=img_resolution,
            img_channels=img_channels, label_dim=label_dim, width=width, blocks=blocks, dropout=dropout)
        if arch == "dit":
            self.config |= dict(patch=patch)
        else:
            self.config |= dict(
                channel_mult=list(channel_mult),
                skip_connections=skip_connections and [int(s) for s in skip_connections],
                attn_resolutions=[img_resolution // 2] if attn_resolutions is None else [*attn_resolutions],
                embedding=embedding or FORMS.get(arch, {}).get("embedding"))
        self.config |= dict(augment_dim=augment_dim) if augment_dim else {}
        check(self.config)
        if arch != "dit" and skip_connections is None:  # all, once it is known that these are not too many
            self.config["skip_connections"] = [1] * ((blocks + 1) * len(channel_mult))
        self.precision, self.layout = "fp32", torch.contiguous_format
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


def check(config):
    """Raise ValueError, naming the value and the rule, for a Denoiser's config that cannot be built."""
    c = SimpleNamespace(**dict(channel_mult=[1], embedding="positional", skip_connections=None) | config)
    for value, allowed in ((c.arch, ARCHITECTURES), (c.embedding, EMBEDDINGS)):
        if value not in allowed:
            raise ValueError(f"{value!r} is unknown; choose one of {', '.join(allowed)}")
    if not c.channel_mult or min(c.channel_mult) < 1 or not 1 <= c.blocks <= MAX_BLOCKS:
        raise ValueError(f"channel_mult={c.channel_mult}, blocks={c.blocks}: "
                         f"both need 1 or more everywhere, and at most {MAX_BLOCKS} blocks")
    levels = len(c.channel_mult)
    if c.img_resolution < 1 or c.img_resolution % 2 ** (levels - 1):
        raise ValueError(f"img_resolution={c.img_resolution} is not divisible by {2 ** (levels - 1)}, "
                         f"as the {levels} levels of channel_mult need")
    if c.img_channels < 1 or not 0 <= c.label_dim <= MAX_LABELS:
        raise ValueError(f"img_channels={c.img_channels}, label_dim={c.label_dim}: "
                         f"need 1 or more, and 0 to {MAX_LABELS}")
    if c.width < 4 or c.width % 4:
        raise ValueError(f"width={c.width} is not a multiple of 4, as norms and positions need")
    if c.width * max(c.channel_mult) > MAX_CHANNELS:
        raise ValueError(f"width={c.width} times {max(c.channel_mult)} is more than {MAX_CHANNELS} channels; "
                         "lower one of them")
    kept, skips = c.skip_connections, (c.blocks + 1) * levels
    if kept is not None and not (len(kept) == skips and {*kept} <= {0, 1}):
        raise ValueError(f"skip_connections={kept} must be {skips} zeros or ones: "
                         f"{c.blocks + 1} at each of {levels} levels")
    if not 0 <= c.dropout < 1:
        raise ValueError(f"dropout={c.dropout} is not in [0, 1)")
    parameters = sum(math.prod(shape) for shape in shapes(config).values())
    if parameters > MAX_PARAMETERS:
        raise ValueError(f"a network of {parameters:,} parameters; at most {MAX_PARAMETERS:,}: "
                         f"lower width={c.width} or blocks={c.blocks}")


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
                    augment.DIM if options.augment else 0)


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
