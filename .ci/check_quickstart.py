"""Ends with 1 unless every method of the quickstart ends clearly above the linear probe, and
measuring took the share of a round that it may take."""

import sys
from pathlib import Path

from analysis.records.campaign import load_campaign
from analysis.tables.summary import data

MARGIN_POINTS = 5.0
METER_PERCENT = 0.5

campaign = load_campaign(Path(sys.argv[1]))
accuracy = data(campaign).set_index("method")["accuracy_percent_mean"]
margins = (accuracy - accuracy["head_only"]).drop("head_only")
print(f"points above head_only: {margins.round(1).to_dict()}; needed: {MARGIN_POINTS}")
if set(margins.index) != {"lora", "slora", "fedara"} or (margins < MARGIN_POINTS).any():
    sys.exit("the quickstart does not show what it should")
rounds = campaign.rounds
shares = 100 * rounds["meter_seconds"] / rounds["total_seconds"]
metering = shares.groupby(rounds["run_id"]).median().round(3)
print(f"percent of a round for measuring: {metering.to_dict()}; allowed: {METER_PERCENT}")
if (metering > METER_PERCENT).any():
    sys.exit("measuring takes too much of a round")
