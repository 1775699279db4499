"""Checkers for the exercises, one module a chapter.

Written by tools/export.py from the chapters: edit those, not this package.
"""
