"""Train and test any config of the three toolboxes.

``errors`` and ``config`` are the floor that ``weights`` and ``data`` stand on too; the
other modules stand on those.
"""
