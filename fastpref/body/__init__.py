"""A training step on CPUs: the native product for the body's linear layers, and kept memory."""

from fastpref.body.attach import LinearProducts, choose_layers
from fastpref.body.memory import keep_cpu_memory, unkept_reason
from fastpref.body.product import linear, matrix_product, unavailable_reason
from fastpref.body.rates import speedup

__all__ = [
    "LinearProducts",
    "choose_layers",
    "keep_cpu_memory",
    "linear",
    "matrix_product",
    "speedup",
    "unavailable_reason",
    "unkept_reason",
]
