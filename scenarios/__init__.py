"""The application: scenarios in; forecasts, comparisons and reports out.

Reading guide: `load` turns YAML into a checked scenario; `forecast` simulates it many times and summarises the
replicates, with bands; `compare` holds it against measured runs; `answer` and `report` show both; `importers` convert
other tools' results to runs; `cli` has a module for each command. `shipped` has the scenarios that come with servecast.
"""
