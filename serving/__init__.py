"""Weir: a text-generation inference server, the maintained drop-in successor of TGI."""

__version__ = "0.1.0"
