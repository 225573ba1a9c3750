"""Families of guides, one class per file; the file's name is the family's name in a recipe."""
