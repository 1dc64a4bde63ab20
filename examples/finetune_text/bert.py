"""A BERT encoder that reads a Hugging Face checkpoint folder, and its uncased WordPiece tokenizer.

Only what inference and fine-tuning of a small encoder such as MiniLM need: ``model.safetensors``,
``config.json`` and ``vocab.txt``; absolute positions, one segment, GELU.
"""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

_OUR_NAMES = {  # replaced in this order
    "bert.": "",
    "encoder.layer.": "blocks.",
    "embeddings.word_embeddings": "words",
    "embeddings.position_embeddings": "positions",
    "embeddings.token_type_embeddings": "segments",
    "embeddings.LayerNorm": "norm",
    "attention.self.": "",
    "attention.output.dense": "project",
    "attention.output.LayerNorm": "project_norm",
    "intermediate.dense": "up",
    "output.dense": "down",
    "output.LayerNorm": "down_norm",
}


class Block(nn.Module):
    """Self-attention and a two-layer perceptron, each followed by its LayerNorm."""

    def __init__(self, width: int, inner: int, heads: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.project, self.project_norm = nn.Linear(width, width), nn.LayerNorm(width, eps)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.down_norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (texts, tokens, width), True: a token
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        drop = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, mask[:, None, None], dropout_p=drop)
        mixed = self.project(mixed.transpose(1, 2).flatten(2))
        x = self.project_norm(x + self.dropout(mixed))
        return self.down_norm(x + self.dropout(self.down(F.gelu(self.up(x)))))


class Encoder(nn.Module):
    """Token ids to one vector per text: the mean of its tokens' last hidden states."""

    def __init__(self, config: dict, dropout: float = 0.1) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.words = nn.Embedding(config["vocab_size"], width)
        self.positions = nn.Embedding(config["max_position_embeddings"], width)
        self.segments = nn.Embedding(config["type_vocab_size"], width)
        self.norm = nn.LayerNorm(width, eps)
        self.dropout = nn.Dropout(dropout)
        shape = (width, config["intermediate_size"], config["num_attention_heads"], eps, dropout)
        self.blocks = nn.ModuleList(Block(*shape) for _ in range(config["num_hidden_layers"]))
        self.width = width

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:  # both (texts, tokens)
        x = self.words(ids) + self.positions.weight[: ids.shape[1]] + self.segments.weight[0]
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            x = block(x, mask)
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def load_encoder(folder: Path) -> Encoder:
    """The encoder of a checkpoint folder, float32; the pooler, if there is one, is left out.

    Raises FileNotFoundError if one of the three files, the tokenizer's included, is missing.
    """
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing; run: python examples/fetch.py")
    encoder = Encoder(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    weights = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "pooler" in name or "position_ids" in name:
            continue
        for theirs, ours in _OUR_NAMES.items():
            name = name.replace(theirs, ours)
        weights[name] = tensor.float()
    encoder.load_state_dict(weights)
    return encoder


class WordPiece:
    """BERT's uncased tokenizer: lower case, no accents, longest known piece first."""

    def __init__(self, vocab: Path) -> None:
        lines = vocab.read_text(encoding="utf-8").splitlines()
        self.ids = {piece: index for index, piece in enumerate(lines)}

    def __call__(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Ids and mask, both (texts, tokens), cut to ``length`` tokens and padded with [PAD]."""
        rows = [
            [self.ids["[CLS]"], *self.pieces(text)[: length - 2], self.ids["[SEP]"]]
            for text in texts
        ]
        ids = torch.full((len(rows), max(map(len, rows))), self.ids["[PAD]"])
        for row, found in enumerate(rows):
            ids[row, : len(found)] = torch.tensor(found)
        return ids, ids != self.ids["[PAD]"]

    def pieces(self, text: str) -> list[int]:
        """Ids of a text's pieces, without [CLS] and [SEP]."""
        return [piece for word in _words(text) for piece in self._split(word)]

    def _split(self, word: str) -> list[int]:
        found, start = [], 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(len(word), start, -1)
            end = next((e for e in ends if prefix + word[start:e] in self.ids), None)
            if end is None or len(word) > 100:
                return [self.ids["[UNK]"]]
            found.append(self.ids[prefix + word[start:end]])
            start = end
        return found


def _words(text: str) -> list[str]:
    """Words and single punctuation marks; Chinese characters stand alone."""
    spaced = []
    for char in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(char)
        if (
            category == "Mn"
            or (category in ("Cc", "Cf") and not char.isspace())
            or char == "\ufffd"
        ):
            continue
        # ASCII symbols such as + and $ count as punctuation, others do not.
        alone = category[0] == "P" or (char.isascii() and category[0] == "S")
        spaced.append(f" {char} " if alone or "\u4e00" <= char <= "\u9fff" else char)
    return "".join(spaced).split()
