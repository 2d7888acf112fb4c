"""Adapters: any method inside other libraries' pipelines."""

from diffsteer.adapters.attach import Attached, attach

__all__ = ["Attached", "attach"]
