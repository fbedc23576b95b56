# ruff: noqa: F405
"""forgetless: low-rank adapters that do not forget, fused into the frozen layer they sit on.

import forgetless as fl
fl.adapt(model, fl.CLoRA(rank=16, alpha=32, k=256), targets=["q_proj", "v_proj"])
loss = model(**batch).loss + fl.penalty(model)
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

#: Of the public names, those of modules of the same name.
SUBMODULES = ("methods", "ops", "penalties", "training")
__all__ = [
    "CLoRA",
    "CURLoRA",
    "Decay",
    "LaLoRA",
    "Laplace",
    "LoRA",
    "LossDeviation",
    "NullSpace",
    "OutputDeviation",
    "SourceDeviation",
    "WeightDeviation",
    "adapt",
    "adapters",
    "calibrate",
    "consolidate",
    "disabled",
    "drift",
    "explain",
    "export_lora",
    "fit_budget",
    "fuse_penalty",
    "load",
    "merge",
    "methods",
    "ops",
    "packed",
    "penalties",
    "penalty",
    "record_drift",
    "remove",
    "retain",
    "save",
    "scaled",
    "swap_in",
    "swap_out",
    "training",
]

if TYPE_CHECKING:
    from .api import *  # noqa: F403
else:

    class Package(ModuleType):
        """The public names are imported, and torch with them, when the first one is used: ``--help`` needs none."""

        def __getattr__(self, name: str) -> Any:
            if name in __all__ and name not in SUBMODULES:
                api = import_module(f"{__name__}.api")
                vars(self).update({public: getattr(api, public) for public in __all__})
                return vars(self)[name]
            try:
                return import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

        def __setattr__(self, name: str, value: Any) -> None:
            """The import of ``forgetless.calibrate`` does not replace the function of that name."""
            if name in SUBMODULES or name not in __all__ or not isinstance(value, ModuleType):
                super().__setattr__(name, value)

        def __dir__(self) -> list[str]:
            return sorted({*vars(self), *__all__})

    sys.modules[__name__].__class__ = Package
