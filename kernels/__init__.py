"""Triton kernels, installed as fastpref.kernels; fastpref.backends.triton launches them."""
