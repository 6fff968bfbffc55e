"""The wire contract as checks that can be put to any server: one module a part of it, one check a row."""
