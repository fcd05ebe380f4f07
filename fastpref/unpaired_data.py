"""Earlier path of the data of single answers, which is in `fastpref.data`."""

from fastpref.data.unpaired import prepare_unpaired_dataset, unpair

__all__ = ["prepare_unpaired_dataset", "unpair"]
