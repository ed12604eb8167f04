"""Which energy of a campaign may be compared: joules of one source only."""

from analysis.records.campaign import THEN, Campaign
from fedara_core.errors import InputError


def one_energy_source(campaign: Campaign) -> str | None:
    """The source of all the energy in these records; None where no run has any.

    Raises InputError where runs, or parts of one run, have different sources: counted and modelled
    joules, or joules of different counters, are never compared, averaged or put into one column.
    """
    found = campaign.runs.dropna(subset=["energy_source"]).groupby("energy_source")["run_id"]
    examples = [f"{source} ({run_ids.iloc[0]})" for source, run_ids in found]
    if len(examples) > 1 or any(THEN in example for example in examples):
        raise InputError(
            f"energy of different sources is not compared: {' and '.join(examples)}; "
            "analyse the runs of each source by themselves"
        )
    return str(next(iter(found))[0]) if examples else None


def known_energy(campaign: Campaign) -> tuple[str | None, str]:
    """`one_energy_source` and ""; or None and the reason why no energy can be shown."""
    try:
        source = one_energy_source(campaign)
    except InputError as error:
        return None, str(error)
    return source, "" if source else "not measured in these runs"


def energy_kind(source: str) -> str:
    """Whether joules of this source are counted, modelled or partly modelled."""
    modelled = [part.endswith("-model") for part in source.split("+")]
    if not any(modelled):
        return "counted"
    return "modelled" if all(modelled) else "partly modelled"
