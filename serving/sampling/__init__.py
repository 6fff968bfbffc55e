"""Logits to tokens: processors, filters, and draws that are pure functions.

Knows no model, no schedule and no text.
"""
