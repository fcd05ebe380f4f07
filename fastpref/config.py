"""The trainers" options, which are in `fastpref.trainer`; a name of earlier versions."""

from fastpref.trainer.config import PreferenceConfig, UnpairedPreferenceConfig

__all__ = ["PreferenceConfig", "UnpairedPreferenceConfig"]
