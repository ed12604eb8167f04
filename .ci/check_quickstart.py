"""Ends with 1 unless every method of the quickstart ends clearly above the linear probe."""

import sys
from pathlib import Path

from analysis.load import load_campaign
from analysis.table_summary import data

MARGIN_POINTS = 5.0

frame = data(load_campaign(Path(sys.argv[1]))).set_index("method")
accuracy = frame["accuracy_percent_mean"]
margins = (accuracy - accuracy["head_only"]).drop("head_only")
print(f"points above head_only: {margins.round(1).to_dict()}; needed: {MARGIN_POINTS}")
if set(margins.index) != {"lora", "slora", "fedara"} or (margins < MARGIN_POINTS).any():
    sys.exit("the quickstart does not show what it should")
