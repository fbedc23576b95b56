"""Our methods in PEFT: ``get_peft_model(model, fl.peft.CURLoRAConfig(...))``.

Importing this module, which the first use of ``fl.peft.CLoRAConfig`` and its like does, writes the three methods into
PEFT's own maps from a type's name to its configuration, its tuner and the prefix of its parameters. Nothing of PEFT is
changed. Import it before ``PeftModel.from_pretrained`` reads a folder of theirs.

CLoRA and LaLoRA are PEFT's LoRA with a penalty attached, its layers swapped in. CURLoRA has a layer of its own.
"""

from __future__ import annotations

import enum
import importlib
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import versions
from ..layers.frozen import is_conv1d, site_of
from ..layers.linear import AdaptedLinear
from ..layers.quantized import kind_of
from ..layers.wrapped import wrap
from ..methods import CLoRA, CURLoRA, LaLoRA, Method
from ..ops.add_lowrank import Term, add_terms
from ..report import LayerReport
from ..targets import supported
from .routes import state_reason
from .swap import take_over
from .views import PENALTIES, OwnLayer

_peft: Any = importlib.import_module("peft")
_tuners: Any = importlib.import_module("peft.tuners.tuners_utils")
_mapping: Any = importlib.import_module("peft.mapping")
_utils: Any = importlib.import_module("peft.utils")
if not hasattr(_tuners.BaseTuner, "_get_adapter_state_dict"):  # earlier ones save the types that they know alone
    raise versions.missing_error("peft", "fl.peft", "BaseTuner._get_adapter_state_dict")
_Module: Any = nn.Module  # its __getattr__ hides PEFT's properties from the type checker
_LoraConfig: Any = _peft.LoraConfig
_LoraModel: Any = _peft.LoraModel
_PeftConfig: Any = _peft.PeftConfig
_BaseTuner: Any = _tuners.BaseTuner
_BaseTunerLayer: Any = _tuners.BaseTunerLayer


class Type(str, enum.Enum):
    """What PEFT's ``PeftType`` is for its own methods."""

    CLORA = "CLORA"
    LALORA = "LALORA"
    CURLORA = "CURLORA"


def _method_of(cls: type[Method], config: Any, **renamed: Any) -> Any:
    """The method with the fields that the configuration has by the same name, and the renamed ones."""
    same = {f.name: getattr(config, f.name) for f in fields(cls) if f.name not in renamed and hasattr(config, f.name)}
    return cls(**{**same, **renamed})


# --------------------------------------------------------------------------------- CLoRA and LaLoRA


class _Penalised(_LoraConfig):
    """PEFT's ``LoraConfig`` and the fields of a method of ours."""

    _type: ClassVar[Type]
    _method: ClassVar[type[Method]]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self._type
        self.method()  # refuses nonsense in the fields

    def method(self) -> Method:
        """The method of this library: its penalties are those of the adapter."""
        return _method_of(self._method, self, rank=self.r, alpha=self.lora_alpha, dropout=self.lora_dropout)


@dataclass
class CLoRAConfig(_Penalised):
    """PEFT's ``LoraConfig`` and the fields of ``fl.CLoRA``: add ``fl.penalty(model)`` to the loss.

    Args:
        k: as of ``fl.CLoRA``; so are weight, basis and seed.

    Raises:
        ValueError: a field is out of range.
    """

    k: int = 256
    weight: float = 1.0
    basis: str = "orthogonal"
    seed: int = 0

    _type: ClassVar[Type] = Type.CLORA
    _method: ClassVar[type[Method]] = CLoRA


@dataclass
class LaLoRAConfig(_Penalised):
    """PEFT's ``LoraConfig`` and the fields of ``fl.LaLoRA``: ``fl.calibrate``, then add ``fl.penalty`` to the loss.

    The statistics are saved and loaded with the adapter.

    Args:
        weight: as of ``fl.LaLoRA``; so are curvature, fisher, prior_precision, columns and at_zero.

    Raises:
        ValueError: a field is out of range.
    """

    weight: float = 1e4
    curvature: str = "diag"
    fisher: str = "empirical"
    prior_precision: float = 0.0
    columns: int = 64
    at_zero: str = "literal"

    _type: ClassVar[Type] = Type.LALORA
    _method: ClassVar[type[Method]] = LaLoRA


class PenalisedLoraModel(_LoraModel):
    """PEFT's LoRA on our op, each adapter with the penalties of its configuration."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        take_over(model, {adapter_name: self.peft_config[adapter_name].method().all_penalties()})

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        mine = f".{PENALTIES}.{adapter_name}."
        if mine in key:  # the statistics: PEFT looks for the name in the last two places alone
            return key.replace(mine, f".{PENALTIES}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)


# ----------------------------------------------------------------------------------------- CURLoRA


@dataclass
class CURLoRAConfig(_PeftConfig):
    """``fl.CURLoRA`` for PEFT.

    Args:
        r: columns and rows drawn; ``rank`` of ``fl.CURLoRA``.
        alpha: as of ``fl.CURLoRA``; so are smoothing and seed.
        target_modules: as of ``LoraConfig``; so are exclude_modules, layers_to_transform, layers_pattern,
            modules_to_save and bias ("none" or "all").
        init_weights: False draws U at random, which changes the model at once; for tests.

    Raises:
        ValueError: a field is out of range.
    """

    r: int = 16
    alpha: float = 1.0
    smoothing: float = 1e-3
    seed: int = 0
    target_modules: Any = None
    exclude_modules: Any = None
    layers_to_transform: Any = None
    layers_pattern: Any = None
    modules_to_save: Any = None
    bias: str = "none"
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = Type.CURLORA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and (self.layers_to_transform or self.layers_pattern):
            raise ValueError("layers_to_transform and layers_pattern want target_modules to be a list, not a str")
        self.method()

    def method(self) -> CURLoRA:
        """The method of this library."""
        return _method_of(CURLoRA, self, rank=self.r)


class CURLoRALayer(_Module, _BaseTunerLayer, OwnLayer):
    """A frozen layer with CURLoRA adapters by name, as PEFT has them."""

    adapter_layer_names = ("curlora_adapters",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, name: str, adapter_name: str, config: CURLoRAConfig):
        super().__init__()
        self.base_layer, self.name = base_layer, name
        self.in_features, self.out_features = _tuners._get_in_out_features(base_layer)
        self.curlora_adapters = nn.ModuleDict()
        self.layers: dict[str, AdaptedLinear] = {}  # by adapter; not submodules: their parts are this layer's
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: CURLoRAConfig) -> None:
        """Draw a new adapter."""
        method = config.method()
        adapter: Any = method.build(site_of(self.name, self.base_layer, values=True))
        if not config.init_weights:
            nn.init.normal_(adapter.core)
        self.curlora_adapters[adapter_name] = adapter
        self.layers[adapter_name] = wrap(self.base_layer, adapter, method, self.name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.layers.pop(adapter_name, None)

    def active_layers(self) -> dict[str, AdaptedLinear]:
        return {key: self.layers[key] for key in self.active_adapters if key in self.curlora_adapters}

    def report(self) -> LayerReport:
        active = list(self.active_layers().values())
        rank = sum(layer.adapter.factors()[0].shape[0] for layer in active)
        trainable = sum(p.numel() for p in self.curlora_adapters.parameters() if p.requires_grad)
        if reason := state_reason(self) or (None if active else "none of its adapters is active"):
            path = "base"
        else:
            path, reason = active[0].path(rank)
        return LayerReport("curlora", self.in_features, self.out_features, rank, trainable, path, reason)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [] if self.disable_adapters or self.merged else list(self.active_layers().values())
        if not active:
            return self.base_layer(x, *args, **kwargs)
        terms = [Term(*layer.adapter.factors(), layer.adapter.scale) for layer in active[1:]]
        return add_terms(active[0], x, terms, fresh=True)[0] if terms else active[0](x)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The update in the layout of the base's weight."""
        delta = self.layers[adapter_name].delta()
        return delta.T if is_conv1d(self.base_layer) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        for key in _tuners.check_adapters_to_merge(self, adapter_names):
            if key in self.curlora_adapters:
                self._add(self.get_delta_weight(key), safe_merge)
                self.merged_adapters.append(key)

    def unmerge(self) -> None:
        while self.merged_adapters:
            self._add(-self.get_delta_weight(self.merged_adapters.pop()))

    @torch.no_grad()
    def _add(self, delta: Tensor, safe: bool = False) -> None:
        kind = kind_of(self.base_layer)
        if kind is not None:
            raise ValueError(f"the weight of {self.name} is packed ({kind.title}): nothing can be added to it")
        weight: Any = self.get_base_layer().weight
        result = (weight.to(delta.dtype) + delta).to(weight.dtype)
        if safe and not torch.isfinite(result).all():
            raise ValueError(f"merging makes NaN or Inf of the weight of {self.name}")
        weight.copy_(result)


class CURLoRAModel(_BaseTuner):
    """PEFT's tuner for ``CURLoRAConfig``."""

    prefix = "curlora_"
    tuner_layer_cls = CURLoRALayer
    target_module_mapping = _utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self, config: Any, adapter_name: str, target: Any, target_name: str, parent: Any, current_key: str, **_: Any
    ) -> None:
        if isinstance(target, CURLoRALayer):
            target.update_layer(adapter_name, config)
            return
        if not supported(target):
            raise ValueError(f"Target module {current_key} is not supported: {type(target).__name__}")
        layer = CURLoRALayer(target, current_key, adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


for _type, _config, _tuner in (
    (Type.CLORA, CLoRAConfig, PenalisedLoraModel),
    (Type.LALORA, LaLoRAConfig, PenalisedLoraModel),
    (Type.CURLORA, CURLoRAConfig, CURLoRAModel),
):
    _mapping.PEFT_TYPE_TO_CONFIG_MAPPING[_type] = _config
    _mapping.PEFT_TYPE_TO_TUNER_MAPPING[_type] = _tuner
    _mapping.PEFT_TYPE_TO_PREFIX_MAPPING[_type] = _tuner.prefix
