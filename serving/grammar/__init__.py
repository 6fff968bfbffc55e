"""Grammars: what a generated text has to be, checked before it is taken and followed token by token.

Knows no torch, no request and no model; both wings use it.
"""
