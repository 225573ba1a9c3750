"""Data to fit: what ships with a dependency, what is generated or downloaded, the user's own; all split in two."""

from ppl_lvm.datasets._base import Dataset
from ppl_lvm.datasets._load import datasets, load

__all__ = ["Dataset", "datasets", "load"]
