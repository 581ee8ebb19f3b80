"""The questions people ask: scenarios in; forecasts, comparisons and reports out.

Reading guide: `load` turns YAML into a checked scenario; `forecast` simulates it many times and sums up what to expect,
with bands; `compare` holds it against what was measured; `answer` and `report` show both; `importers` make runs of
other tools' results; `cli` has one command per question. `shipped` are the scenarios that come with the package.
"""
