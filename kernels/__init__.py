"""Triton kernels, installed as fastpref.kernels. Empty until the Triton backend lands."""
