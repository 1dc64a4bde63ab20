"""Fine-tune a MiniLM encoder on a few labelled texts, with or without layer-wise learning rates.

    python examples/finetune_text/run.py --data texts.csv --text text --label label --shots 8 \\
        --variant tempbalance

The data are a CSV with a header or a JSONL file. Of each class ``--shots`` texts train, as many
validate, the rest test.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch
from bert import Encoder, WordPiece, load_encoder
from rich.console import Console
from rich.progress import track
from rich.table import Table
from texts import Example, read_texts, split_texts
from torch import Tensor, nn

import tbfast

KINDS = ("query", "key", "value", "project", "up", "down")  # the matrices of a block


class Classifier(nn.Module):
    """The encoder under a linear head that starts at zero."""

    def __init__(self, encoder: Encoder, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.width, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.encoder(ids, mask))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="CSV with a header, or JSONL")
    parser.add_argument("--text", default="text", help="column of the texts")
    parser.add_argument("--label", default="label", help="column of the labels")
    parser.add_argument("--model", type=Path, default=Path("build/data/minilm"))
    parser.add_argument("--shots", type=int, default=8, help="training texts per class")
    parser.add_argument(
        "--variant", choices=("plain", "tempbalance", "model-balancing"), default="tempbalance"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1e-4, help="base learning rate")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=32, help="tokens kept of each text")
    args = parser.parse_args()
    try:
        rows = read_texts(args.data, args.text, args.label)
        labels, training, validation, test = split_texts(rows, args.shots, args.seed)
        encoder, tokenizer = load_encoder(args.model), WordPiece(args.model / "vocab.txt")
    except (OSError, ValueError, csv.Error) as error:
        sys.exit(str(error))

    torch.manual_seed(args.seed)
    model = Classifier(encoder, len(labels))
    ids, mask = tokenizer([text for text, _ in training], args.length)
    targets = torch.tensor([target for _, target in training])
    groups = [
        {"params": model.encoder.parameters()},
        {"params": model.head.parameters(), "lr": 10 * args.rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, weight_decay=0.01)
    steps_per_epoch = -(-len(training) // args.batch)
    steps = args.epochs * steps_per_epoch
    # A tenth of the steps rises, the rest falls to zero.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, 10 * (step + 1) / steps) * (1 - step / steps)
    )
    balancer = None
    if args.variant != "plain":
        balancer = tbfast.attach(
            optimizer, model, preset=args.variant, every=steps_per_epoch, budget=None
        )
    for _ in track(range(args.epochs), "fine-tuning", console=Console(stderr=True)):
        for batch in torch.randperm(len(training)).split(args.batch):
            loss = nn.functional.cross_entropy(model(ids[batch], mask[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def accuracy(examples: list[Example]) -> float:
        right = 0
        for start in range(0, len(examples), 64):
            texts, answers = zip(*examples[start : start + 64], strict=True)
            found = model(*tokenizer(list(texts), args.length)).argmax(1)
            right += int((found == torch.tensor(answers)).sum())
        return right / len(examples)

    model.eval()
    console = Console()
    alphas = (
        balancer.alphas if balancer is not None else tbfast.analyze(model.encoder.blocks).alphas
    )
    factors = balancer.factors if balancer is not None else {}
    console.print(_alpha_table(alphas, factors))
    console.print(f"{args.variant}: {len(labels)} classes, {len(training)} training texts")
    console.print(f"validation accuracy {accuracy(validation):.1%} of {len(validation)}")
    console.print(f"test accuracy {accuracy(test):.1%} of {len(test)}")


def _alpha_table(alphas: dict[str, float], factors: dict[str, float]) -> Table:
    """Blocks down, layer types across: alpha and, after ×, the factor of the learning rate."""
    cells: dict[str, dict[str, str]] = {}
    for name, alpha in alphas.items():
        block, kind = name.removesuffix(".weight").split(".")[-2:]
        factor = f" ×{factors[name]:.2f}" if name in factors else ""
        cells.setdefault(block, {})[kind] = f"{alpha:.2f}{factor}"
    table = Table(
        "block", *KINDS, title="alpha ×factor of the learning rate", box=None, padding=(0, 2, 0, 0)
    )
    for block, row in cells.items():
        table.add_row(block, *(row.get(kind, "–") for kind in KINDS))
    return table


if __name__ == "__main__":
    main()
