"""Graphs and figures as text: Python code, drawings, differences, tables."""
