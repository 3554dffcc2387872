"""The parts of memory_accuracy.py: one module a section, each with `measure(seed, quick)`, and how they are reported.

Rows are dictionaries. `error` is predicted / measured - 1, a signed fraction; None where there is nothing to compare,
with a `reason`. `case` names the row in tables, `predicted_bytes` and `measured_bytes` are what was compared.
"""
