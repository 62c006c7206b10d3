"""What an integration says where its library is missing."""

from __future__ import annotations


def missing(integration: str, package: str) -> ImportError:
    """The error to raise ``from`` the original one. ``package`` is what pip calls it, with its oldest version."""
    return ImportError(f"hicl_fast.integrations.{integration} needs {package}: pip install '{package}'")
