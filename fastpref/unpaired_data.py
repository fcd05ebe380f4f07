"""Data of single answers, which is in `fastpref.data`; a name of earlier versions."""

from fastpref.data.unpaired import prepare_unpaired_dataset, unpair

__all__ = ["prepare_unpaired_dataset", "unpair"]
