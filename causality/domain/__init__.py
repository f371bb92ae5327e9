"""Financial formats, operations and windows: identifiers out of payloads.

Empty on purpose: it arrives with the financial formats, which give the same `causality.operations.Operation` records that a
CSV file gives today.
"""
