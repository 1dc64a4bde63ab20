"""What becomes of tuned layers while an optimizer runs, said once of each."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

# Model and name of each parameter that was given to an optimizer.
_HOMES: Any = WeakTensorKeyDictionary()


class Notice:
    """Warns of layers, of each once.

    Attributes:
        told: Names of the layers of which something was said.
    """

    def __init__(self) -> None:
        self.told: set[str] = set()

    def __call__(self, names: Iterable[str], words: str) -> None:
        """Warn of those that are news, in one RuntimeWarning: ``"<names> <words>"``."""
        news = [name for name in names if name not in self.told]
        if not news:
            return
        self.told.update(news)
        others = len(news) - 1
        more = f" (and {others} more layer{'s' if others > 1 else ''})" if others else ""
        warnings.warn(f"{news[0]}{more} {words}", RuntimeWarning, stacklevel=3)


class Watch:
    """Whether an optimizer still holds its tuned layers, and still trains those of its model.

    Args:
        layers: Names of the tuned layers.
    """

    def __init__(self, layers: Iterable[str]) -> None:
        self._layers = tuple(layers)
        self._left, self._joined, self._replaced = Notice(), Notice(), Notice()

    def look(self, held: Mapping[str, Sequence[Tensor]]) -> None:
        """Warn of what has changed since the layers were chosen.

        Args:
            held: The parameters that the optimizer holds, by layer.
        """
        self._left(
            [name for name in self._layers if name not in held],
            "left the optimizer: its last alpha still counts for the other layers; detach the "
            "factors and build them anew without it",
        )
        self._joined(
            [name for name in held if name not in self._layers],
            "joined the optimizer after the tuned layers were chosen and keeps the base rate; "
            "detach the factors and build them anew to tune it",
        )
        self._replaced(
            [name for name, parameters in held.items() if any(map(_is_replaced, parameters))],
            "has another tensor in the model than the one that the optimizer steps, so steps do "
            "not reach the model; build the optimizer after what replaces parameters, as "
            "load_state_dict(assign=True) does",
        )


def settle(model: nn.Module) -> None:
    """Note which parameters the model has now."""
    home = weakref.ref(model)
    for name, parameter in model.named_parameters():
        _HOMES[parameter] = (home, name)


def _is_replaced(parameter: Tensor) -> bool:
    """Whether the model has another parameter in the place of this one."""
    home, name = _HOMES.get(parameter, (None, ""))
    model = home and home()
    if model is None:
        return False
    try:
        present = model.get_parameter(name)
    except AttributeError:  # parametrised or pruned since: the parameter has another name
        return False
    # FSDP2 shows plain parameters in the place of the sharded ones that the optimizer steps.
    return present is not parameter and type(present) is type(parameter)
