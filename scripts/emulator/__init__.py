"""A local stand-in for SageMaker's runtime API, in front of a container; `scripts/sagemaker_emulator.py` starts it.

Knows no server by name: any container that keeps SageMaker's contract will do.
"""
