"""The batching decoder: sequences, blocks, scheduling, stopping and detokenising.

Knows no tensor, no thread and no HTTP; it speaks to a device through `serving.plan` alone.
"""
