"""Anabranch: large language models served on separate worker pools for each kind of work.

This package is the shared library: vocabulary and mathematics. It opens no socket and imports no room.
"""

__version__ = "0.1.0"
