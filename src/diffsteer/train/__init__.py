"""Training of the zoo's models and of the user's own small ones: ``pip install "diffsteer[train]"``."""

from diffsteer.train.export import export
from diffsteer.train.run import train

__all__ = ["export", "train"]
