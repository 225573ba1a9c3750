"""Algorithms of the libraries, one file each: `<name>.py` defines the class `<name>`, which a recipe finds by it."""
