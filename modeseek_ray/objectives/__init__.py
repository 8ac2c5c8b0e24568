"""The trainer's half of a method: token log-probabilities, token factors, KL and the weighted loss.

`parameters.py` (names, defaults and ranges) is plain Python and may be imported anywhere; every other
file here loads torch and is imported by `actors` alone.
"""
