"""Every limit, once: past this package a request's type is the proof."""
