"""What people read of a run. Every report is a pure function of result.json and the catalogue of
figures.
"""
