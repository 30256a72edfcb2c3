"""What the notebooks share: settings, data, networks, runs, records, evidence, tables and figures.

The way from parameters to numbers is one: notebook parameters -> `Settings` -> a run -> a record -> tables and figures.
Only `architectures`, `networks`, `exports` and `cards` import torch at the top, and a notebook none of them: its
parameters are checked before torch is loaded.
"""
