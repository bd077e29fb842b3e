"""Measures the engine, the machine, and other engines beside it. Needs PyTorch alone; the peers live in a Python of
their own. `python -m model.bench --help`, or `attendant bench --help`.
"""
