"""What the notebooks share: settings, data, networks, runs, records, evidence, tables and figures.

The way from parameters to numbers is one: notebook parameters -> `Settings` -> a run -> a record -> tables and figures.
Only `settings`, `parameters`, `datasets`, `files`, `terminal`, `items` and `grid` are without torch: parameters are
checked by the first of them before anything else is imported.
"""
