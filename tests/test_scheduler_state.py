"""TempBalance saved and resumed: under every optimizer and scheduler, to the bit."""

import pytest
import torch
from small_model import SCHEDULERS, make_groups, make_mlp, train
from torch.optim import lr_scheduler as ls

from tbfast import TempBalance

OPTIMIZERS = {
    "SGD momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "AdamW foreach": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "AdamW tensor lr": lambda groups: torch.optim.AdamW(
        [{**group, "lr": torch.tensor(0.01)} for group in groups]
    ),
}
if hasattr(torch.optim, "Adafactor"):
    OPTIMIZERS["Adafactor"] = lambda groups: torch.optim.Adafactor(groups, lr=0.01)
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda groups: torch.optim.Muon(groups, lr=0.01)


@pytest.mark.parametrize("optimizer_first", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resuming_is_exact_to_the_bit(name, optimizer_first, tmp_path):
    def build():
        model = make_mlp(bias=name != "Muon")
        optimizer = OPTIMIZERS[name](make_groups(model))
        base = ls.CosineAnnealingLR(optimizer, 50)
        return model, optimizer, TempBalance(optimizer, base, every=3, ema=0.5, ramp=2)

    straight = build()
    train(*straight[:2], range(40), straight[2])
    half = build()
    train(*half[:2], range(20), half[2])
    torch.save([part.state_dict() for part in half], tmp_path / "half.pt")
    states = torch.load(tmp_path / "half.pt", weights_only=True)
    resumed = build()
    order = (0, 1, 2) if optimizer_first else (0, 2, 1)
    for part in order:
        resumed[part].load_state_dict(states[part])
    train(*resumed[:2], range(20, 40), resumed[2])
    for a, b in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)
    assert straight[2].factors == resumed[2].factors
    assert straight[2].get_last_lr() == resumed[2].get_last_lr()
    assert straight[2].history == resumed[2].history


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:.*epoch parameter.*:UserWarning")
def test_the_state_of_any_base_scheduler_goes_along(name, tmp_path):
    def build():
        model = make_mlp()
        optimizer = torch.optim.SGD(make_groups(model), lr=0.05, momentum=0.9)
        return model, optimizer, TempBalance(optimizer, SCHEDULERS[name](optimizer))

    straight, half, resumed = build(), build(), build()
    train(*straight[:2], range(30), straight[2])
    train(*half[:2], range(15), half[2])
    torch.save([part.state_dict() for part in half], tmp_path / "half.pt")
    states = torch.load(tmp_path / "half.pt", weights_only=True)
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    train(*resumed[:2], range(15, 30), resumed[2])
    assert straight[2].get_last_lr() == resumed[2].get_last_lr()


def test_a_state_with_a_base_needs_one():
    optimizer = torch.optim.SGD(make_groups(make_mlp()), lr=0.1)
    with_base = TempBalance(optimizer, ls.StepLR(optimizer, 5))
    other = torch.optim.SGD(make_groups(make_mlp()), lr=0.1)
    with pytest.raises(ValueError, match="saved with a base scheduler"):
        TempBalance(other).load_state_dict(with_base.state_dict())
