"""The idea: noise and images are two points of one hypersphere, and a transformer learns to walk from one to the other.

A frozen autoencoder (encode.py) turns an image into a latent z: T tokens of C channels, d = T*C numbers. Scaled to
rms 1, z lies on the sphere of radius sqrt(d), and so does Gaussian noise e. Both are equally long and, d being large,
nearly orthogonal, so mixing in noise is a rotation of z towards e. The denoiser D is given the rotated point and the class y,
not the angle, and predicts z:

    v = cos(a) z + sin(a) e              `rotate`, its angle a drawn by `noise_angle`
    L = |D(v, y) - z|^2                  `losses`: latent reconstruction,
      + w |D(v, y) - sg D(v', y)|^2      and consistency with a point v' on the same arc, nearer to z

Sampling begins at pure noise and takes a few steps, each after a smaller rotation back towards noise (`generate`):

    v = e;  x = D(v, y);  v = rotate(x, e', a_1);  x = D(v, y);  v = rotate(x, e'', a_2);  ...;  image = decode(x), once

Source: "Efficient Image Synthesis with Sphere Latent Encoder", arXiv 2605.15592; geometry after Sphere Encoder, arXiv 2602.15030.
Shapes: B batch, T tokens, C latent channels, D width, H heads.   `python model.py` lists the presets and their sizes.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------- the sphere

SPHERES = ("global", "none")    # none: the ablation


def to_sphere(z, sphere="global"):
    """Project latents onto the hypersphere: z / rms(z), in float32.

    z: (B, T, C), any float dtype. sphere: "global", one of radius sqrt(T*C) for the whole latent; "none", z unchanged.
    Returns (B, T, C) float32. Source: Sphere Encoder, RMS-norm projection f.
    """
    z = z.float()
    return z if sphere == "none" else z * z.pow(2).mean((1, 2), keepdim=True).clamp_min(1e-12).rsqrt()


def rotate(z, noise, angle, sphere="global"):
    """Walk from z towards noise along their great circle: cos(a) z + sin(a) e, e being the part of noise orthogonal to z.

    z, noise: (B, T, C), projected first. angle: (B,) or a scalar, radians. Returns (B, T, C) float32 on the sphere, at
    exactly `angle` from z. With e orthogonal to z this equals Sphere Encoder's f(z + tan(a) e). Under sphere "none" (the
    ablation) it is that sum without f. Source: arXiv 2602.15030, noising on the sphere; paper, "noisy latents are projected".
    """
    z, e = to_sphere(z, sphere), to_sphere(noise, sphere)
    angle = torch.as_tensor(angle, dtype=torch.float32, device=z.device).view(-1, 1, 1)           # (B or 1, 1, 1)
    if sphere == "none":
        return z + angle.tan() * e
    e = to_sphere(e - z * (z * e).mean((1, 2), keepdim=True))
    return angle.cos() * z + angle.sin() * e


def noise_angle(u, max_angle=80.0, mean=0.0, std=1.0):
    """Turn uniform numbers into noise angles: tan(a) = r tan(max_angle), r = sigmoid(mean + std * normal), a logit-normal law.

    u: (B,) in [0, 1), turned into the normal; stratify it over the batch for a calmer loss. max_angle: degrees.
    Returns (B,) float32 radians. What is left of z at angle a is a signal-to-noise ratio of sqrt(T*C) / tan(a).
    Source: the paper's law, its mean and spread unpublished; arXiv 2602.15030 for tangents instead of angles.
    """
    r = torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
    return torch.atan(r * math.tan(math.radians(max_angle)))


def largest_angle(tokens, channels):
    """The largest noise angle to train with, in whole degrees: where a signal-to-noise ratio of 4.8 is left, but at most Sphere Encoder's 85.

    That ratio was best for latents of 128, 512 and 2048 numbers alike (README, "Results"); no one angle was.
    """
    return float(min(85, round(math.degrees(math.atan(math.sqrt(tokens * channels) / 4.8)))))


# ---------------------------------------------------------------------------------------------------- the denoiser

@dataclass(frozen=True)
class ModelConfig:
    """Everything that the weights need to mean something: the latent's shape, the network's size, the sphere."""
    tokens: int = 256               # T, a square grid
    channels: int = 768             # C
    num_classes: int = 1000         # one more row is kept for "no class"
    width: int = 768                # D
    depth: int = 12
    heads: int = 12
    sphere: str = "global"          # one of SPHERES
    max_angle: float = 80.0         # degrees; the noisiest point of training


PRESETS = {    # patch size 1 throughout: a token of the latent is a token of the transformer
    "tiny": dict(width=128, depth=6, heads=4),
    "S": dict(width=384, depth=12, heads=6),
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "XL": dict(width=1152, depth=28, heads=16),
}


class Attention(nn.Module):
    """Self-attention over all tokens, with RMS-normalised queries and keys so that bf16 logits can't run away."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).unbind(2)                          # 3 x (B, T, H, D/H)
        q, k = self.q_norm(q.float()).to(v), self.k_norm(k.float()).to(v)
        x = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))    # (B, H, T, D/H)
        return self.proj(x.transpose(1, 2).flatten(2))                                             # (B, T, D)


class SwiGLU(nn.Module):
    """The MLP: silu(x W1) * (x W2), then W3; two thirds of the usual 4x width, so that it costs the same."""

    def __init__(self, width):
        super().__init__()
        hidden = 8 * round(width / 3)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    """A transformer block whose shifts, scales and gates come from the class alone (adaLN-zero)."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.RMSNorm(width, eps=1e-6)
        self.attention = Attention(width, heads)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width)
        self.adaln = nn.Linear(width, 6 * width)

    def forward(self, x, modulation):
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=2)                  # 6 x (B, 1, D)
        x = torch.addcmul(x, gate1, self.attention(torch.addcmul(shift1, self.norm1(x), 1 + scale1)))    # x + gate * attention(norm(x) * (1 + scale) + shift)
        return torch.addcmul(x, gate2, self.mlp(torch.addcmul(shift2, self.norm2(x), 1 + scale2)))


class Denoiser(nn.Module):
    """A SiT-style transformer from a noisy latent and its class to the clean latent; it is not told the noise angle.

    Source: the released XL/1 state dict (401 tensors, 675,160,896 numbers), which has room for no noise-level embedding.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        width = config.width
        self.embed = nn.Linear(config.channels, width)
        self.register_buffer("position", sincos_2d(config.tokens, width))
        self.classes = nn.Embedding(config.num_classes + 1, width)                                 # last row: no class
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.adaln = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, config.channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.normal_(self.classes.weight)                       # std 1, not DiT's 0.02: adaLN hears the class from step one
        for layer in [block.adaln for block in self.blocks] + [self.adaln, self.out]:
            nn.init.zeros_(layer.weight)                           # adaLN-zero: every block begins as the identity

    def modulation(self, labels):
        """All that the class decides: the shifts, scales and gates of every block, (B, 1, 6 D), and of the output, (B, 1, 2 D)."""
        y = F.silu(self.classes(labels)).unsqueeze(1)                                              # (B, 1, D)
        return [layer(y) for layer in [block.adaln for block in self.blocks] + [self.adaln]]

    def forward(self, z, labels):
        """Predict the clean latent. z: (B, T, C) on the sphere; labels: (B,) int64, num_classes for none, or their `modulation` -> (B, T, C)."""
        *modulations, last = labels if isinstance(labels, list) else self.modulation(labels)
        x = self.embed(z) + self.position                                                          # (B, T, D)
        for block, modulation in zip(self.blocks, modulations):
            x = block(x, modulation)
        shift, scale = last.chunk(2, dim=2)                                                        # 2 x (B, 1, D)
        return self.out(self.norm(x) * (1 + scale) + shift)                                        # (B, T, C)


def flops(config):
    """Floating-point operations of one image's forward pass, a multiply and an add counting as two.

    Matrix products only: 2 * weights * tokens, the class's adaLN layers once per image, and 4 T^2 D per layer for attention.
    """
    T, D, hidden = config.tokens, config.width, 8 * round(config.width / 3)
    block = 2 * T * (4 * D * D + 3 * D * hidden) + 4 * T * T * D + 2 * 6 * D * D
    return config.depth * block + 2 * T * 2 * config.channels * D + 2 * 2 * D * D


def sincos_2d(tokens, width):
    """Fixed sine-cosine positions of a square grid, row by row: (1, T, D), a quarter each for sin x, cos x, sin y, cos y."""
    side = math.isqrt(tokens)
    if side * side != tokens or width % 4:
        raise ValueError(f"positions need a square number of tokens and a width divisible by 4, got {tokens} and {width}")
    frequency = 10000.0 ** (-torch.arange(width // 4) / (width // 4))                              # (D/4,)
    phase = torch.arange(side)[:, None] * frequency                                                # (side, D/4)
    wave = torch.cat([phase.sin(), phase.cos()], dim=1)                                            # (side, D/2)
    return torch.cat([wave.repeat(side, 1), wave.repeat_interleave(side, dim=0)], dim=1)[None]


# ---------------------------------------------------------------------------------------------------- the losses

def losses(model, z, labels, noise, angle, nearer, consistency_weight=0.0, sphere="global"):
    """Latent reconstruction and consistency of one batch, in float32.

    z, noise: (B, T, C) clean latents and Gaussian noise; labels: (B,). angle: (B,) radians of the noisy ("strong") points.
    nearer: (B,) uniform in [0, 1); the "weak" point lies on the same arc at tan(weak) = nearer/2 * tan(angle).
    consistency_weight: w; 0 leaves the weak point out, and with it a quarter of the compute.
    Returns (total, reconstruction (B,), consistency (B,)). Source: paper, the two losses; arXiv 2602.15030 for the weak point.
    """
    mse = lambda a, b: (a.float() - b.float()).pow(2).mean((1, 2))
    out = model(rotate(z, noise, angle, sphere), labels)
    reconstruction = mse(out, z)
    if not consistency_weight:
        return reconstruction.mean(), reconstruction, torch.zeros_like(reconstruction)
    with torch.no_grad():
        target = model(rotate(z, noise, torch.atan(0.5 * nearer * angle.tan()), sphere), labels)
    consistency = mse(out, target)
    return (reconstruction + consistency_weight * consistency).mean(), reconstruction, consistency


# ---------------------------------------------------------------------------------------------------- sampling

@torch.no_grad()
def generate(model, labels, steps=4, cfg_scale=1.0, generator=None, return_all=False, noise=None, start=None, cfg_skip=0,
             same_noise=False, pixel_loop=None):
    """Draw latents in a few steps: from noise to a prediction, back part of the way towards noise, and again. Step k of n goes back by
    tan(a) = (1 - k/n)^1.5 tan(training's largest angle).

    labels: (B,) int64. steps: calls of the denoiser, at least 1. cfg_scale: s of classifier-free guidance, x_null + s (x - x_null);
    1 turns it off, otherwise a step costs two forwards. cfg_skip: so many first steps go unguided, though never the last two: from pure
    noise guidance overshoots, and the later steps still bring the class out (NFE = 2 * steps - cfg_skip).
    noise: (steps, B, T, C), new noise at every step, or (B, T, C), the same at every step; when None it is drawn with `generator`, the
    former, or the latter with same_noise. start: (B, T, C), the first point, when it is not to be pure noise.
    pixel_loop: a codec; decode and encode again between the steps, as Sphere Encoder does, to see what staying in latent space saves.
    Returns (B, T, C) float32, or with return_all (steps, B, T, C), the output of every step. Source: paper, few-step sampling; arXiv 2207.12598, guidance.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    config, device = model.config, labels.device
    limit = math.tan(math.radians(config.max_angle))
    if noise is None:
        shape = (1 if same_noise else steps, len(labels), config.tokens, config.channels)
        noise = torch.randn(shape, generator=generator, device=generator.device if generator else device).to(device)
    noise = noise.expand(steps, *noise.shape[-3:])                                                 # (steps, B, T, C)
    y = labels if cfg_scale == 1 else torch.cat([labels, torch.full_like(labels, config.num_classes)])
    y = model.modulation(y) if isinstance(model, Denoiser) else y                                  # the same at every step
    halves = [slice(None)]

    def predict(v):
        """The denoiser's output; the guided and the unguided one as one batch, or one after the other once memory has been short."""
        nonlocal halves
        try:
            return torch.cat([model(v[half], [m[half] for m in y] if isinstance(y, list) else y[half]).float() for half in halves])
        except torch.OutOfMemoryError:
            if cfg_scale == 1 or len(halves) > 1:
                raise
        halves = [slice(len(labels)), slice(len(labels), None)]
        return predict(v)

    if start is None:
        start = to_sphere(noise[0], config.sphere) * (limit if config.sphere == "none" else 1)
    outputs = []
    for step in range(steps):
        v = start
        if step:
            v = rotate(x, noise[step], math.atan((1 - step / steps) ** 1.5 * limit), config.sphere)
        if cfg_scale == 1:
            x = predict(v)
        elif step < min(cfg_skip, steps - 2):
            x = model(v, [m[:len(v)] for m in y] if isinstance(y, list) else labels).float()
        else:
            x, x_null = predict(torch.cat([v, v])).chunk(2)
            x = x_null + cfg_scale * (x - x_null)
        if pixel_loop is not None and step < steps - 1:
            x = pixel_loop.encode(pixel_loop.decode(x))
        outputs.append(x)
    return torch.stack(outputs) if return_all else x


if __name__ == "__main__":
    for name, preset in PRESETS.items():
        with torch.device("meta"):
            model = Denoiser(ModelConfig(**preset))
        print(f"{name:5s}{sum(t.numel() for t in model.state_dict().values()):13,d} numbers  {flops(model.config) / 1e9:6.1f} GFLOP an image  {preset}")
