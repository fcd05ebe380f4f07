"""Earlier path of the trainers' options, which are in `fastpref.trainer`."""

from fastpref.trainer.config import PreferenceConfig, UnpairedPreferenceConfig

__all__ = ["PreferenceConfig", "UnpairedPreferenceConfig"]
