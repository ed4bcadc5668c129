"""Small backbones of different kinds, used all over the tests. Weights come from the seed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["MLP", "MaskedEncoder", "ResidualCNN", "example_of", "make"]


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResidualCNN(nn.Module):
    """(B, 3, 16, 16) -> (B, classes)."""

    def __init__(self, classes: int = 5, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1)
        self.layer1 = nn.Sequential(ResidualBlock(width, width, 1), ResidualBlock(width, width, 1))
        self.layer2 = nn.Sequential(
            ResidualBlock(width, 2 * width, 2), ResidualBlock(2 * width, 2 * width, 1)
        )
        self.layer3 = nn.Sequential(
            ResidualBlock(2 * width, 4 * width, 2), ResidualBlock(4 * width, 4 * width, 1)
        )
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class MLP(nn.Module):
    """(B, 12) -> (B, classes)."""

    def __init__(self, classes: int = 4, width: int = 32, depth: int = 5) -> None:
        super().__init__()
        sizes = [12] + [width] * depth
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.ReLU())
            for a, b in zip(sizes[:-1], sizes[1:], strict=True)
        )
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.fc(x)


class EncoderBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + self.proj(y.transpose(1, 2).reshape(b, t, d))
        return x + self.mlp(self.norm2(x))


class MaskedEncoder(nn.Module):
    """Tokens (B, T) and an attention mask (B, T) -> {"logits": (B, classes)}."""

    def __init__(
        self, classes: int = 3, dim: int = 32, depth: int = 4, vocabulary: int = 50
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(torch.randn(64, dim) * 0.1)
        self.blocks = nn.ModuleList(EncoderBlock(dim, 4) for _ in range(depth))
        self.fc = nn.Linear(dim, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(input_ids) + self.position[: input_ids.shape[1]]
        keep = attention_mask[:, None, None, :].to(torch.bool)
        for block in self.blocks:
            x = block(x, keep)
        weight = attention_mask[..., None].to(x.dtype)
        return {"logits": self.fc((x * weight).sum(1) / weight.sum(1))}


def make(kind: str, seed: int = 0) -> nn.Module:
    """A backbone in eval mode: ``"cnn"``, ``"mlp"`` or ``"encoder"``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = {"cnn": ResidualCNN, "mlp": MLP, "encoder": MaskedEncoder}[kind]()
        for module in model.modules():  # statistics that are not the identity
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def example_of(kind: str, batch: int = 4, seed: int = 1) -> Tensor | dict[str, Tensor]:
    """An input batch for ``make(kind)``; a mapping of keyword arguments for the encoder."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "cnn":
        return torch.randn(batch, 3, 16, 16, generator=generator)
    if kind == "mlp":
        return torch.randn(batch, 12, generator=generator)
    ids = torch.randint(0, 50, (batch, 9), generator=generator)
    length = torch.randint(3, 10, (batch, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(9) < length).long()}
