"""Stillroom: distil a large language model into a small one that its owner runs.

The main path is one command, `stillroom distill RECIPE`, and one module that reads
like it: `stillroom.pipeline.distillation`. See docs/index.md.
"""

__version__ = "0.1.0"
