"""Layers that PEFT's LoRA adapters train, known by their attributes: PEFT is not imported.

Such a layer acts as W + s·B·A, summed over its active adapters (Hu et al., "LoRA: Low-Rank
Adaptation of Large Language Models", ICLR 2022, eq. 3). That is the weight whose spectrum is
measured; the factor belongs to A and B, W being frozen. Where A and B say that their weight is
another (DoRA), or W cannot be read (quantised), the layer is refused by name.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from tbfast.matrices import MEASURABLE, as_matrices

_PEFT_NAMES = re.compile(r"\bbase_model\.model\.|\.base_layer(?=\.)|\.modules_to_save\.[^.]+")

# The weight of which an adapter's parameter is a part. Groups of an optimizer are plain data, which
# a checkpoint keeps, so they cannot hold it.
_KNOWN: Any = WeakIdKeyDictionary()


class LoraWeight:
    """The weight a LoRA layer acts with, formed anew whenever it is looked at.

    Follows what is done to the layer: adapters switched, added, scaled, disabled or merged.

    Args:
        name: Parameter name of the frozen weight W.
        module: The layer.
        members: Names of the parameters of its adapters; those that train come first.
    """

    def __init__(self, name: str, module: nn.Module, members: tuple[str, ...]) -> None:
        self.name = name
        self.members = members
        self._layer = weakref.ref(module)  # its parameters are keys that must not hold themselves

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of W."""
        return tuple(self._base.shape)

    @property
    def device(self) -> torch.device:
        """Device of W."""
        return self._base.device

    def formed(self) -> Tensor:
        """All of W + s·B·A: the shape of W, float32 (float64 if W is); not to be changed."""
        base = self._base
        stack = self._stack(base)
        for scale, left, right in self._products():
            stack = torch.baddbmm(stack, left.expand(len(right), -1, -1), right, alpha=scale)
        return stack[0] if base.ndim == 2 else stack.permute(1, 2, 0).reshape(base.shape)

    def rows(self, places: Tensor) -> Tensor:
        """Some rows of ``as_matrices`` of :meth:`formed`, without forming the others.

        Args:
            places: Numbers of the rows among those of all matrices, int64.

        Returns:
            (len(places), width) of the dtype of ``formed``.
        """
        stack = as_matrices(self._base, self._kind)
        places = places.to(stack.device)
        matrix, row = places // stack.shape[1], places % stack.shape[1]
        some = stack[matrix, row].to(self._dtype)
        for scale, left, right in self._products():
            if len(right) == 1:
                some = torch.addmm(some, left[row], right[0], alpha=scale)
            else:
                some = some + scale * (left[row].unsqueeze(1) @ right[matrix]).squeeze(1)
        return some

    def seen(self, of: str) -> LoraWeight:
        """Itself, if its spectrum can be measured.

        Raises:
            ValueError: On ``of="grad"`` and ``"momentum"``.
        """
        if of != "weight":
            raise ValueError(
                f"of={of!r} needs the gradient of W + s·B·A, which {self.name} does not have: its "
                "adapter has one of A and one of B; use of='weight'"
            )
        return self

    @property
    def _module(self) -> Any:
        module = self._layer()
        if module is None:
            raise RuntimeError(f"the model of {self.name} is gone; keep it while it is trained")
        return module

    @property
    def _base(self) -> Tensor:
        weight: Tensor = self._module.get_base_layer().weight
        return weight

    @property
    def _kind(self) -> Any:
        return "linear" if self._base.ndim == 2 else "conv"

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self._base.dtype, torch.float32)

    def _stack(self, weight: Tensor) -> Tensor:
        return as_matrices(weight, self._kind).to(self._dtype)

    def _products(self) -> list[tuple[float, Tensor, Tensor]]:
        """(s, left, right) for each product s·left·right that W lacks: (rows, r), (n, r, cols)."""
        module = self._module
        if module.disable_adapters:
            signs = dict.fromkeys(module.merged_adapters, -1.0)  # the next forward takes them out
        else:
            signs = {} if module.merged_adapters else dict.fromkeys(module.active_adapters, 1.0)
        found = []
        for adapter, sign in signs.items():
            if adapter in module.lora_A:
                right = self._stack(module.lora_A[adapter].weight)
                left = self._stack(module.lora_B[adapter].weight)[0]
                if getattr(module, "fan_in_fan_out", False):
                    left, right = right[0].T, left.T.unsqueeze(0)
                found.append((sign * module.scaling[adapter], left, right))
        return found


Weight = Tensor | LoraWeight


def formed(weight: Weight) -> Tensor:
    """The tensor itself, or all of a LoRA layer's weight."""
    return weight.formed() if isinstance(weight, LoraWeight) else weight


def find_lora(
    model: nn.Module, wanted: Callable[[str, Tensor], bool]
) -> tuple[dict[str, LoraWeight], set[str]]:
    """The layers of a model that LoRA adapters train.

    A layer none of whose active adapters trains is frozen, and not among them; nor is an embedding,
    whose adapters are of another kind.

    Args:
        model: Any module.
        wanted: Which layers, by the name of W; see :func:`tbfast.matrices.name_filter`.

    Returns:
        The layers by the name of W, and the paths of modules whose parameters are no layers:
        adapters, and the copies of a module (``modules_to_save``) that are not in use. No path
        means that the model has no adapters.

    Raises:
        ValueError: On a layer whose weight is not W + s·B·A, or whose W is quantised.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, LoraWeight] = {}
    apart: set[str] = set()
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for child in _parts(module):
            inner = module.get_submodule(child).named_modules(prefix=f"{prefix}{child}")
            apart.update(name for name, _ in inner)
        if not _is_lora(module) or not (training := _training(module)):
            continue
        weight = getattr(module.get_base_layer(), "weight", None)
        name = names.get(id(weight), f"{prefix}base_layer.weight")
        if not wanted(name, weight if isinstance(weight, Tensor) else training[0]):
            continue
        if reason := _obstacle(module, weight):
            raise ValueError(f"{name}: {reason}, or leave the layer out with exclude={name!r}")
        own = [
            parameter for part in (module.lora_A, module.lora_B) for parameter in part.parameters()
        ]
        own.sort(key=lambda parameter: not parameter.requires_grad)
        found[name] = LoraWeight(name, module, tuple(names[id(p)] for p in own))
    return found, apart


def plain_name(name: str) -> str:
    """The name a parameter had before PEFT wrapped its model."""
    return _PEFT_NAMES.sub("", name)


def remember(parameter: Tensor, weight: LoraWeight) -> None:
    """Note the weight of which an adapter's parameter is a part, for :func:`lora_of_group`."""
    _KNOWN[parameter] = weight


def lora_of_group(group: Mapping[str, Any]) -> LoraWeight | None:
    """The LoRA layer of a group of ``param_groups``, or None if it is of a plain layer.

    Raises:
        ValueError: If the group's parameters are not those it was made with.
    """
    if not group.get("lora"):
        return None
    found: LoraWeight | None = _KNOWN.get(group["params"][0])
    if found is None:
        raise ValueError(
            f"the group {group['name']!r} does not hold the LoRA parameters that "
            "tbfast.param_groups gave it, so its weight is not known; build the optimizer on "
            "param_groups of the present model, or use tbfast.attach(optimizer, model)"
        )
    return found


def _is_lora(module: nn.Module) -> bool:
    children = module._modules  # PEFT's wrappers answer getattr for what they wrap
    return "lora_A" in children and "lora_B" in children and hasattr(module, "get_base_layer")


def _parts(module: nn.Module) -> list[str]:
    """Children of a PEFT module whose parameters are no layers."""
    children = module._modules
    if _is_lora(module):
        return [name for name in children if name != "base_layer"]
    if "original_module" in children and "modules_to_save" in children:
        saved = module.get_submodule("modules_to_save")
        active: Any = module.active_adapters
        idle = [name for name, _ in saved.named_children() if name not in active]
        return ["original_module", *(f"modules_to_save.{name}" for name in idle)]
    return []


def _training(module: Any) -> list[Tensor]:
    """Parameters of a layer's active adapters that train."""
    active = [name for name in module.active_adapters if name in module.lora_A]
    parts = [part[name] for name in active for part in (module.lora_A, module.lora_B)]
    # An AdaLoRA part is a parameter itself.
    parameters = [p for x in parts for p in ([x] if isinstance(x, Tensor) else x.parameters())]
    return [parameter for parameter in parameters if parameter.requires_grad]


def _obstacle(module: Any, weight: object) -> str | None:
    """Why the weight of a layer is not W + s·B·A of a known W, and the remedy; None if it is."""
    kind, base = type(module).__name__, type(module.get_base_layer()).__name__
    for adapter in module.lora_A:
        variant = getattr(module, "lora_variant", {}).get(adapter)
        if variant is not None or getattr(module, "use_dora", {}).get(adapter):
            label = "DoRALinearVariant" if variant is None else type(variant).__name__
            return (
                f"the weight of its adapter {adapter!r} ({label}) is not W + s·B·A; use plain LoRA"
            )
        if not hasattr(module.lora_A[adapter], "weight") or hasattr(module, "parameter_name"):
            return f"the weight of a {kind} is not known here; use LoRA on a Linear or Conv layer"
    # Tensor classes from elsewhere (torchao) hold packed numbers under a floating-point dtype.
    if (
        not isinstance(weight, Tensor)
        or weight.dtype not in MEASURABLE
        or type(weight.data).__module__.split(".")[0] != "torch"
    ):
        what = f", {weight.dtype}" if isinstance(weight, Tensor) else ""
        return f"its weight is quantised or packed ({base}{what}); load the model unquantised"
    for adapter in module.lora_A:
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        sides = (b.shape[0], a.shape[1])
        sides = sides[::-1] if getattr(module, "fan_in_fan_out", False) else sides
        if (*sides, *a.shape[2:]) != weight.shape:
            return (
                f"B·A of the adapter {adapter!r} is {(*sides, *a.shape[2:])}, but its weight "
                f"({base}) is {tuple(weight.shape)}: grouped or quantised; load it unquantised"
            )
    return None
