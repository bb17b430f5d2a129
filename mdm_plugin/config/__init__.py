"""Configs: their options, how they are read and checked, and the components that they name.

May import: errors, torchtune_internals.
"""
