"""The configuration: YAML groups, whole named runs in `experiment/`, and `compose`, which turns them into a run.

This is the one folder of the checkout with an `__init__.py`: Hydra finds YAML by `pkg://varitok.configs`.
"""
