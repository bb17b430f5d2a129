"""One process or many: the ranks, models that are born sharded, their parameters and gradients.

May import: errors, noise, models.
"""
