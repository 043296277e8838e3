"""Figures, tables of the pages, and the explorer."""
