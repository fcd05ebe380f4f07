"""The linear layers of a model's body on the native matrix product of CPUs."""

from fastpref.body.attach import LinearProducts, choose_layers
from fastpref.body.product import linear, matrix_product, unavailable_reason
from fastpref.body.rates import speedup

__all__ = [
    "LinearProducts",
    "choose_layers",
    "linear",
    "matrix_product",
    "speedup",
    "unavailable_reason",
]
