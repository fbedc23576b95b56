"""Methods: one file each. A new one subclasses ``Method`` and ``Adapter``, takes ``@register`` and is done."""

from ..adapter import Adapter, Site
from .base import METHODS, Method, register
from .clora import CLoRA
from .curlora import CURLoRA
from .lalora import LaLoRA
from .lora import LoRA

__all__ = ["METHODS", "Adapter", "CLoRA", "CURLoRA", "LaLoRA", "LoRA", "Method", "Site", "register"]
