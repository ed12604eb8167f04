"""Table: the communicator's allgather of packed rows against the library's bare call."""

from pathlib import Path

import pandas as pd

from analysis.load_micro import MicroCampaign

NAME = "collectives_allgather"


def data(micro: MicroCampaign) -> pd.DataFrame:
    """One row per back end, number of processes and payload; medians over launches."""
    points = micro.points
    rows = points[(points["call"] == "allgather") & points["ratio"].notna()]
    columns = [
        *("backend", "world_size", "payload_bytes", "num_launches", "bare_call"),
        *("median_seconds", "bare_median_seconds", "ratio", "min_ratio", "max_ratio"),
        "sizes_first_ratio",
    ]
    return rows[columns].sort_values(columns[:3], ignore_index=True)


def write(micro: MicroCampaign, out_dir: Path) -> list[Path]:
    """Write collectives_allgather.md (rounded) and .csv (all digits); nothing without a row."""
    frame = data(micro)
    if frame.empty:
        return []
    out_dir.mkdir(parents=True, exist_ok=True)
    markdown, csv = out_dir / f"{NAME}.md", out_dir / f"{NAME}.csv"
    markdown.write_text(_markdown(frame), encoding="utf-8", newline="\n")
    frame.to_csv(csv, index=False, lineterminator="\n")
    return [markdown, csv]


def _markdown(frame: pd.DataFrame) -> str:
    lines = [
        "# Allgather of packed rows against the bare call",
        "",
        "| back end | P | bytes of a process | launches | ours ms | bare ms | ratio | "
        "ratio, sizes first | bare call |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --- |",
    ]
    for _, row in frame.iterrows():
        spread = f" ({row['min_ratio']:.3f} to {row['max_ratio']:.3f})"
        lines.append(
            f"| {row['backend']} | {row['world_size']} | {row['payload_bytes']:g} "
            f"| {row['num_launches']} | {1e3 * row['median_seconds']:.4g} "
            f"| {1e3 * row['bare_median_seconds']:.4g} "
            f"| {row['ratio']:.3f}{spread if row['num_launches'] > 1 else ''} "
            f"| {row['sizes_first_ratio']:.3f} | {row['bare_call']} |"
        )
    lines += [
        "",
        "Seconds: median over launches of each one's median over calls of the slowest process.",
        "ratio: median over launches (smallest to largest) of each one's median over calls of ours",
        "to bare, which ran turn about. ours knows the sizes, as bare does: merge paths have them",
        "from the headers. sizes first: where the call has to exchange them.",
    ]
    return "\n".join(lines) + "\n"
