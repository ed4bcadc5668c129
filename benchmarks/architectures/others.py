"""Networks that come from no model zoo: graphs, sequences, tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.architectures.entry import CLASSES, ROWS, Architecture

__all__ = ["OTHERS"]

NODES, FEATURES = 10, 8


class DenseGNN(nn.Module):
    """Graphs in dense form: features (B, N, F), adjacency (B, N, N), node mask (B, N)."""

    def __init__(self, convolutions: list[nn.Module], width: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor, mask: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = functional.relu(convolution(x, adjacency, mask))
        weight = mask[..., None].to(x.dtype)
        return self.classifier((x * weight).sum(1) / weight.sum(1))


class SparseGIN(nn.Module):
    """A batch of graphs as one: features (nodes, F), edges (2, edges), graph of each node."""

    def __init__(self, convolutions: list[nn.Module], width: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, edges: Tensor, batch: Tensor, graphs: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = functional.relu(convolution(x, edges))
        total = x.new_zeros(graphs.shape[0], x.shape[1]).index_add(0, batch, x)
        return self.classifier(total)


class GraphHead(nn.Module):
    """Node features (nodes, D) to the logits of their graphs; asks for inputs of the network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor, batch: Tensor, graphs: Tensor) -> Tensor:
        total = x.new_zeros(graphs.shape[0], x.shape[1]).index_add(0, batch, x)
        return self.classifier(total)


class LSTMClassifier(nn.Module):
    """Tokens (B, T) -> (B, classes), by layers of LSTM one after the other."""

    def __init__(self, layers: int = 5, width: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.layers = nn.ModuleList(nn.LSTM(width, width, batch_first=True) for _ in range(layers))
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x, _ = layer(x)
        return self.classifier(x[:, -1])


class TabularTransformer(nn.Module):
    """Numbers (B, F) and categories (B, G), a token each, through encoder layers."""

    def __init__(self, numbers: int = 6, categories: int = 3, width: int = 32) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(numbers, width))
        self.shift = nn.Parameter(torch.randn(numbers, width))
        self.embeddings = nn.ModuleList(nn.Embedding(10, width) for _ in range(categories))
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 64, batch_first=True, norm_first=True)
            for _ in range(5)
        )
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        tokens = [self.class_token.expand(numbers.shape[0], -1, -1)]
        tokens.append(numbers[..., None] * self.scale + self.shift)
        tokens.extend(e(categories[:, i : i + 1]) for i, e in enumerate(self.embeddings))
        x = torch.cat(tokens, 1)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(x[:, 0])


def _dense_graphs() -> dict[str, Tensor]:
    adjacency = (torch.rand(ROWS, NODES, NODES) < 0.3).float()
    adjacency = torch.maximum(adjacency, adjacency.transpose(1, 2))
    size = torch.randint(NODES // 2, NODES + 1, (ROWS, 1))
    return {
        "x": torch.randn(ROWS, NODES, FEATURES),
        "adjacency": adjacency,
        "mask": torch.arange(NODES) < size,
    }


def _dense_gnn() -> tuple[nn.Module, dict[str, Tensor]]:
    from torch_geometric.nn import DenseGCNConv

    widths = [FEATURES, 24, 24, 24, 24, 24]
    layers = [DenseGCNConv(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    return DenseGNN(layers, 24), _dense_graphs()


def _dense_gin() -> tuple[nn.Module, dict[str, Tensor]]:
    from torch_geometric.nn import DenseGINConv

    widths = [FEATURES, 24, 24, 24, 24]
    layers = [
        DenseGINConv(nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, b)))
        for a, b in zip(widths[:-1], widths[1:], strict=True)
    ]
    return DenseGNN(layers, 24), _dense_graphs()


def _sparse_gin() -> tuple[nn.Module, dict[str, Tensor]]:
    from torch_geometric.nn import GINConv

    widths = [FEATURES, 24, 24, 24, 24]
    layers = [
        GINConv(nn.Sequential(nn.Linear(a, b), nn.ReLU(), nn.Linear(b, b)))
        for a, b in zip(widths[:-1], widths[1:], strict=True)
    ]
    sizes = torch.randint(4, NODES, (ROWS,))
    batch = torch.repeat_interleave(torch.arange(ROWS), sizes)
    pair = torch.rand(len(batch), len(batch)) < 0.4
    edges = (pair & (batch[:, None] == batch[None, :])).nonzero().T
    example = {
        "x": torch.randn(len(batch), FEATURES),
        "edges": edges,
        "batch": batch,
        "graphs": torch.arange(ROWS),
    }
    return SparseGIN(layers, 24), example


def select_graphs(
    rows: Tensor, x: Tensor, edges: Tensor, batch: Tensor, graphs: Tensor
) -> dict[str, Tensor]:
    """The nodes and edges of the graphs ``rows``, numbered anew."""
    order = torch.full((len(graphs),), -1)
    order[rows] = torch.arange(len(rows))
    kept = order[batch] >= 0
    number = torch.cumsum(kept, 0) - 1
    inside = kept[edges[0]]
    return {
        "x": x[kept],
        "edges": number[edges[:, inside]],
        "batch": order[batch[kept]],
        "graphs": graphs[rows],
    }


def _lstm() -> tuple[nn.Module, Tensor]:
    return LSTMClassifier(), torch.randint(0, 50, (ROWS, 11))


def _gru() -> tuple[nn.Module, Tensor]:
    model = LSTMClassifier()
    model.layers = nn.ModuleList(nn.GRU(24, 24, batch_first=True, bidirectional=False)
                                 for _ in range(5))  # fmt: skip
    return model, torch.randint(0, 50, (ROWS, 11))


def _mlp() -> tuple[nn.Module, Tensor]:
    blocks = [nn.Sequential(nn.Linear(16 if i == 0 else 48, 48), nn.ReLU()) for i in range(6)]
    return nn.Sequential(*blocks, nn.Linear(48, CLASSES)), torch.randn(ROWS, 16)


def _tabular() -> tuple[nn.Module, dict[str, Tensor]]:
    example = {"numbers": torch.randn(ROWS, 6), "categories": torch.randint(0, 10, (ROWS, 3))}
    return TabularTransformer(), example


def _conv1d() -> tuple[nn.Module, Tensor]:
    widths = [2, 16, 24, 32, 48]
    blocks = [
        nn.Sequential(nn.Conv1d(a, b, 5, stride=2, padding=2), nn.BatchNorm1d(b), nn.ReLU())
        for a, b in zip(widths[:-1], widths[1:], strict=True)
    ]
    end = [nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(48, CLASSES)]
    return nn.Sequential(*blocks, *end), torch.randn(ROWS, 2, 128)


def _other(kind: str, name: str, build: Any, **attach: Any) -> Architecture:
    source = "torch_geometric" if "gnn" in kind else "torch"
    return Architecture(name, source, kind, build, attach)


OTHERS: tuple[Architecture, ...] = (
    _other("gnn", "dense_gcn", _dense_gnn),
    _other("gnn", "dense_gin", _dense_gin),
    _other(
        "gnn-sparse",
        "sparse_gin",
        _sparse_gin,
        select=select_graphs,
        heads=[GraphHead(24) for _ in range(3)],
    ),
    _other("recurrent", "lstm", _lstm),
    _other("recurrent", "gru", _gru),
    _other("mlp", "mlp", _mlp),
    _other("tabular", "tabular_transformer", _tabular),
    _other("series", "conv1d", _conv1d),
)
