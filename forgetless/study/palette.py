"""One colour for each method, in every plot and on every page: it follows the name, never the order.

The named ones are Okabe and Ito's, which colour-blind readers tell apart.
"""

from __future__ import annotations

import zlib

COLOURS = {
    "lora": "#0072B2",
    "clora": "#D55E00",
    "curlora": "#009E73",
    "lalora": "#CC79A7",
    "lora+source": "#E69F00",
    "lora+decay": "#56B4E9",
    "lora+source+consolidate": "#7A5C00",
    "lora+consolidate": "#004D77",
    "lora+scaled": "#882255",
    "lora+retain": "#228B22",
    "lora+retain+scaled": "#0B5D1E",
    "lora+source+scaled": "#F2C14E",
    "lora+source+retain+scaled": "#8C5A2B",
    "lora+budget": "#44AA99",
    "lora+replay": "#6A3D9A",
    "lora+self-replay": "#999933",
    "lora+kl": "#A6761D",
    "lora+source+retain": "#117733",
    "full": "#000000",
    "base": "#7F7F7F",
}
#: For combinations without an entry above: one of these, chosen by the name.
OTHERS = ("#5D5D81", "#B15928", "#2F4B7C", "#A05195", "#665191")


def method_of(label: str) -> str:
    """The method of a row's label, without its settings: "LoRA+source=0.1:lr=1e-3" is "lora+source"."""
    name = label.partition(" ")[0].partition(":")[0].lower()
    return "+".join(part.partition("=")[0] for part in name.split("+"))


def colour(label: str) -> str:
    """The colour of a row, by its label. All settings of one method share it."""
    name = method_of(label)
    return COLOURS.get(name) or OTHERS[zlib.crc32(name.encode()) % len(OTHERS)]


def nth(labels: list[str]) -> dict[str, int]:
    """label -> which of its method's settings it is, from 0: marks and line styles tell those apart."""
    counts: dict[str, int] = {}
    result = {}
    for label in labels:
        if label not in result:
            result[label] = counts.get(method_of(label), 0)
            counts[method_of(label)] = result[label] + 1
    return result
