"""What the notebooks share: settings, data, networks, runs, records, evidence, tables and figures.

The way from parameters to numbers is one: notebook parameters -> `Settings` -> a run -> a record -> tables and figures.
Nothing here imports torch at the top but `networks`: a notebook's parameters are checked before torch is loaded.
"""
