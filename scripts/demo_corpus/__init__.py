"""The text the demo model is trained on: topics, small talk, prose, JSON, code and conversations, all our own.

It must not know tensors: it makes text, and the training script makes numbers of it.
"""
