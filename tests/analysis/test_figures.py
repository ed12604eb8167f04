"""The data behind figures and tables on hand-made records, with numbers computed by hand; and what
is said where machines, seeds or sources of energy differ."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Text
from typer.testing import CliRunner

from analysis.cli import app
from analysis.figures import (
    alpha,
    client_spread,
    live_triplets,
    local_train,
    partition,
    phases,
    target,
    target_modelled,
)
from analysis.records import caveats
from analysis.records.campaign import NotDrawn, load_campaign
from analysis.records.energy import one_energy_source
from analysis.tables import cost, headline, modelled
from fedara_core.errors import InputError
from support.records import add_energy, row_of, write_record


def change_run(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a record's run.json in place."""
    facts = json.loads((run / "run.json").read_text())
    change(facts)
    (run / "run.json").write_text(json.dumps(facts))


def change_rounds(run: Path, more: Callable[[int], dict[str, Any]]) -> None:
    """Give each round of a record what `more` returns for its index."""
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    text = "".join(json.dumps(line | more(i)) + "\n" for i, line in enumerate(lines))
    (run / "rounds.jsonl").write_text(text)


# ---- figures ----


def test_alpha(tmp_path: Path) -> None:
    # Seeds 0 and 1 end at 70 and 72 %.
    for seed in (0, 1):
        write_record(tmp_path, "lora", seed, alpha=0.1)
    write_record(tmp_path, "lora", 0, alpha=10.0)
    write_record(tmp_path, "fedara", 1, alpha=10.0)
    by_shards = write_record(tmp_path, "lora", 5, alpha=3.0)
    change_run(by_shards, lambda facts: facts["config"]["partition"].update(scheme="shards"))
    other = write_record(tmp_path, "lora", 6, alpha=0.1)  # of its data set the only alpha
    change_run(other, lambda facts: facts["config"]["dataset"].update(name="other"))
    frame = alpha.data(load_campaign(tmp_path))
    assert len(frame) == 3
    assert set(frame["dataset"]) == {"synthetic"}
    point = row_of(frame, method="lora", alpha=0.1)
    assert point["num_seeds"] == 2
    columns = ["accuracy_percent_mean", "accuracy_percent_low", "accuracy_percent_high"]
    assert point[columns].tolist() == pytest.approx([71.0, 70.0, 72.0])
    single = row_of(frame, method="fedara", alpha=10.0)
    assert single["accuracy_percent_mean"] == pytest.approx(72.0)
    assert np.isnan(single["accuracy_percent_low"])
    assert row_of(frame, method="lora", alpha=10.0)["num_seeds"] == 1


def test_client_spread(tmp_path: Path) -> None:
    last = {0: (0.6, 0.2, 0.1), 1: (0.8, 0.4, 0.3)}  # by seed: mean, 10th percentile, deviation

    def spread_of(seed: int) -> Callable[[int], dict[str, Any]]:
        keys = ("client_accuracy_mean", "client_accuracy_p10", "client_accuracy_std")
        evaluated = {0: (0.1, 0.1, 0.1), 1: (), 2: last[seed]}
        return lambda index: dict(zip(keys, evaluated[index], strict=False))

    for seed in (0, 1):
        change_rounds(write_record(tmp_path, "lora", seed), spread_of(seed))
    write_record(tmp_path, "fedara", 0)  # without these keys
    (row,) = client_spread.data(load_campaign(tmp_path)).to_dict("records")
    assert (row["method"], row["num_runs"]) == ("lora", 2)
    found = [row[f"{name}_percent"] for name in ("mean", "p10", "std")]
    assert found == pytest.approx([70.0, 30.0, 20.0])


def test_partition_is_the_lowest_seeds(tmp_path: Path) -> None:
    clients = {0: [{"a": 3, "b": 1}, {"b": 4}], 1: [{"a": 1}, {"a": 1}]}
    for seed in (1, 0):
        run = write_record(tmp_path, "lora", seed)
        entries = [
            {"client_id": client_id, "num_examples": sum(counts.values()), "label_counts": counts}
            for client_id, counts in enumerate(clients[seed])
        ]
        (run / "partition.json").write_text(json.dumps(entries))
    frame = partition.data(load_campaign(tmp_path))
    found = frame[["seed", "client_id", "label", "num_examples", "share"]].values.tolist()
    assert found == [[0, 0, "a", 3, 0.75], [0, 0, "b", 1, 0.25], [0, 1, "b", 4, 1.0]]


def test_live_triplets_are_means_and_only_where_some_die(tmp_path: Path) -> None:
    live = {
        ("fedara", 0): {"a": [4, 2, 0], "b": [4, 4, 4]},
        ("fedara", 1): {"a": [4, 2, 2], "b": [4, 4, 4]},
        ("lora", 0): {"a": [4, 4, 4], "b": [4, 4, 4]},
    }
    for (method, seed), adapters in live.items():
        change_rounds(
            write_record(tmp_path, method, seed),
            lambda i, adapters=adapters: {
                "live_triplets_by_adapter": {name: counts[i] for name, counts in adapters.items()}
            },
        )
    frame = live_triplets.data(load_campaign(tmp_path))
    assert set(frame["method"]) == {"fedara"}
    by_adapter = frame.pivot(index="adapter", columns="round_index", values="live_triplets")
    assert by_adapter.loc["a"].tolist() == [4.0, 2.0, 1.0]
    assert by_adapter.loc["b"].tolist() == [4.0, 4.0, 4.0]


def metered(folder: Path, method: str, seed: int = 0, *, counted: bool = True) -> Path:
    """A record with FLOPs, memory and devices, and maybe counted energy. FedARA halves its FLOPs
    and its modelled joules each round; the other methods keep theirs."""
    run = write_record(folder, method, seed)

    def costs(index: int) -> dict[str, Any]:
        part = 0.5**index if method == "fedara" else 1.0
        of_device = {"modelled_seconds": 1.0 + part, "modelled_joules": 40 * part}
        energy = {
            "energy_joules": {"local_train": 8 * part, "total": 10.0},
            "energy_source": "rapl",
        }
        return {
            "flops": 4e12 * part,
            "num_backward_layers": round(12 * part),
            "adapter_bytes": 1e6 * part,
            "optimizer_bytes": 2e6,
            "peak_memory_bytes_by_phase": {"local_train": 1e9 - index, "evaluate": 2e9},
            "modelled_by_device": {"board": of_device, "phone": of_device},
            **(energy if counted else {}),
        }

    change_rounds(run, costs)
    return run


def test_local_train_by_round(tmp_path: Path) -> None:
    for seed in (0, 1):
        metered(tmp_path, "fedara", seed)
        metered(tmp_path, "lora", seed)
    frame = local_train.data(load_campaign(tmp_path))
    fedara = frame[frame["method"] == "fedara"]
    assert fedara["num_seeds"].tolist() == [2, 2, 2]
    assert fedara["flops_mean"].tolist() == [4e12, 2e12, 1e12]
    assert fedara["num_backward_layers_mean"].tolist() == [12, 6, 3]
    assert fedara["local_train_peak_memory_bytes_mean"].tolist() == [1e9, 1e9 - 1, 1e9 - 2]
    assert fedara["trained_bytes_mean"].tolist() == [3e6, 2.5e6, 2.25e6]
    assert fedara["local_train_joules_mean"].tolist() == [8.0, 4.0, 2.0]
    assert fedara["local_train_seconds_mean"].tolist() == [2.0, 1.5, 1.0]
    assert frame["local_train_peak_device_memory_bytes_mean"].isna().all()


def test_a_cost_that_one_round_lacks_is_no_cost_of_the_panel(tmp_path: Path) -> None:
    metered(tmp_path, "fedara", counted=False)
    run = metered(tmp_path, "lora", counted=False)
    lines = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    del lines[1]["flops"]
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    campaign = load_campaign(tmp_path)
    frame = local_train.data(campaign)
    assert frame["flops_mean"].isna().all()
    assert frame["num_backward_layers_mean"].notna().all()
    flops = cost.data(campaign).set_index("method")["flops"]
    assert flops["fedara"] == 7e12
    assert np.isnan(flops["lora"])


def test_joules_to_target(tmp_path: Path) -> None:
    # Both methods end at 70 % and so reach the target, 66.5 %, in round 2: lora after 30 J counted
    # and 120 J modelled, FedARA after 30 J counted and 40 + 20 + 10 J modelled.
    metered(tmp_path, "fedara")
    metered(tmp_path, "lora")
    campaign = load_campaign(tmp_path)
    counted = row_of(target.data(campaign), method="fedara")
    assert counted["joules_ratio"] == pytest.approx(1.0)
    assert not [name for name in counted.index if "modelled" in name]
    modelled = row_of(target_modelled.data(campaign), method="fedara")
    assert modelled["modelled_joules.board_ratio"] == pytest.approx(70 / 120)
    assert not [name for name in modelled.index if name.startswith("joules")]


def test_joules_of_a_model_are_no_counted_joules(tmp_path: Path) -> None:
    for method in ("fedara", "lora"):
        add_energy(write_record(tmp_path, method, 0), counted=False)
    campaign = load_campaign(tmp_path)
    assert one_energy_source(campaign) == "codecarbon-load-model"
    assert target.data(campaign)["joules_ratio"].isna().all()
    assert local_train.data(campaign)["local_train_joules_mean"].isna().all()
    with pytest.raises(NotDrawn, match="modelled on devices"):
        target_modelled.data(campaign)
    notes = cost.table(campaign).notes
    assert "Energy (J): of the whole run, modelled by codecarbon-load-model." in notes


def test_joules_of_two_sources_are_nowhere_compared(tmp_path: Path) -> None:
    metered(tmp_path, "fedara")
    add_energy(write_record(tmp_path, "lora", 0), counted=False)
    campaign = load_campaign(tmp_path)
    assert target.data(campaign)["joules_ratio"].isna().all()
    assert local_train.data(campaign)["local_train_joules_mean"].isna().all()
    assert "energy_joules" not in cost.data(campaign)
    assert "energy of different sources" in cost.table(campaign).notes[-1]
    ours = headline.data(campaign).set_index("reading")["ours"]
    joules = ours[[reading for reading in ours.index if "joules" in reading]]
    assert (joules == "not in these records").sum() == 3
    assert set(joules) == {"not in these records", "not known of every run"}


def test_a_run_whose_source_changed_is_refused(tmp_path: Path) -> None:
    run = metered(tmp_path, "lora")
    change_rounds(run, lambda index: {"energy_source": "rapl" if index else "rapl+nvml"})
    with pytest.raises(InputError, match=r"rapl\+nvml then rapl \(synthetic-lora"):
        one_energy_source(load_campaign(tmp_path))


# ---- tables ----


def test_headline_names_how_each_number_is_known(tmp_path: Path) -> None:
    metered(tmp_path, "fedara")
    metered(tmp_path, "lora")
    frame = headline.data(load_campaign(tmp_path))
    ours = {
        (row["paper"], row["reading"]): row["ours"]
        for _, row in frame.iterrows()
        if row["paper"] in ("-48.90 %", "-46.95 %")
    }
    assert ours == {
        ("-48.90 %", "measured: seconds of local training, whole run"): "+0.00 %",
        ("-48.90 %", "measured: seconds of local training, last round"): "+0.00 %",
        ("-48.90 %", "counted: FLOPs of local training, whole run"): "-41.67 %",  # 7 of 12
        ("-48.90 %", "counted: FLOPs of local training, last round"): "-75.00 %",
        ("-48.90 %", "modelled: seconds on board, whole run"): "-20.83 %",  # 4.75 of 6
        ("-48.90 %", "modelled: seconds on board, last round"): "-37.50 %",  # 1.25 of 2
        ("-48.90 %", "modelled: seconds on phone, whole run"): "-20.83 %",
        ("-48.90 %", "modelled: seconds on phone, last round"): "-37.50 %",
        ("-46.95 %", "counted by rapl: joules of the whole run"): "+0.00 %",
        ("-46.95 %", "counted: joules of local training, whole run"): "-41.67 %",
        ("-46.95 %", "counted: joules of local training, last round"): "-75.00 %",
        ("-46.95 %", "modelled: joules on board, whole run"): "-41.67 %",
        ("-46.95 %", "modelled: joules on board, last round"): "-75.00 %",
        ("-46.95 %", "modelled: joules on phone, whole run"): "-41.67 %",
        ("-46.95 %", "modelled: joules on phone, last round"): "-75.00 %",
    }
    assert set(frame.loc[frame["num_runs"] > 0, "num_runs"]) == {2}


def test_headline_has_a_block_for_each_setting_of_fedara(tmp_path: Path) -> None:
    for lr in (0.001, 0.01):
        write_record(tmp_path, "fedara", 0, lr=lr)
    write_record(tmp_path, "lora", 0)
    campaign = load_campaign(tmp_path)
    assert headline.data(campaign)["setting"].unique().tolist() == ["lr=0.001", "lr=0.01"]
    assert "fedara's setting" in headline.table(campaign).cells
    write_record(tmp_path, "lora", 0, lr=0.01)  # now LoRA is no one number any more
    with pytest.raises(NotDrawn, match="at one setting"):
        headline.data(load_campaign(tmp_path))


def test_modelled_table(tmp_path: Path) -> None:
    for seed in (0, 1):
        metered(tmp_path, "fedara", seed)
    frame = modelled.data(load_campaign(tmp_path))
    (row,) = frame.to_dict("records")
    assert (row["num_runs"], row["flops"]) == (2, 7e12)
    assert (row["modelled_seconds.board"], row["modelled_joules.board"]) == (4.75, 70.0)
    assert row["run_ids"].split() == [f"synthetic-fedara-seed{s}-0.1-0.001" for s in (0, 1)]
    cells = modelled.table(load_campaign(tmp_path)).cells
    assert cells["board, kJ"].tolist() == ["0.070"]


# ---- what does not compare ----


def machine(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda facts: facts.update(changes)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"cpu": "B CPU"}, "CPU (B CPU or a CPU)"),
        ({"gpu": "a GPU"}, "GPU (a GPU or none)"),
        ({"world_size": 4}, "processes (1 or 4)"),
        ({"parts": [{"world_size": 4}]}, "processes (1 or 1 then 4)"),
    ],
)
def test_unlike_machines_are_named_and_their_seconds_not_compared(
    changes: dict[str, Any], text: str, tmp_path: Path
) -> None:
    metered(tmp_path, "fedara")
    change_run(metered(tmp_path, "lora"), machine(**changes))
    campaign = load_campaign(tmp_path)
    panel = ("synthetic", "dirichlet, alpha 0.1")
    assert caveats.mixed_machines(campaign) == {panel: text}
    (warning,) = caveats.sentences(campaign)
    assert f"runs differ in {text}" in warning
    paid = target.data(campaign)
    assert paid[["seconds_ratio", "joules_ratio"]].isna().all(axis=None)
    assert paid["uplink_bytes_ratio"].notna().all()
    ours = headline.data(campaign).set_index("reading")["ours"]
    assert ours["measured: seconds of local training, whole run"] == caveats.MARK
    assert ours["counted: joules of local training, whole run"] == caveats.MARK
    assert ours["counted: FLOPs of local training, whole run"] == "-41.67 %"
    assert cost.table(campaign).cells["seconds"].tolist() == ["10.0 *", "10.0 *"]


def test_a_panel_of_one_machine_is_not_marked(tmp_path: Path) -> None:
    for method in ("fedara", "lora"):
        write_record(tmp_path, method, 0)
        change_run(write_record(tmp_path, method, 0, alpha=1.0), machine(cpu=f"{method}'s"))
    mixed = caveats.mixed_machines(load_campaign(tmp_path))
    assert list(mixed) == [("synthetic", "dirichlet, alpha 1")]


def test_missing_seeds_and_single_methods_are_said(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_record(tmp_path, "lora", seed)
        write_record(tmp_path, "fedara", seed)
    write_record(tmp_path, "head_only", 0)
    write_record(tmp_path, "lora", 0, alpha=5.0)
    few, single = caveats.sentences(load_campaign(tmp_path))
    assert few == (
        "synthetic, dirichlet, alpha 0.1: means are over different seeds: "
        "0, 1 (fedara, lora); 0 (head_only)."
    )
    assert single == "synthetic, dirichlet, alpha 5: one method, lora: no methods to compare."


def test_peak_memory_of_runs_in_one_process_is_not_compared(tmp_path: Path) -> None:
    runs = [metered(tmp_path, method) for method in ("fedara", "lora")]
    assert caveats.shared_processes(load_campaign(tmp_path)) == set()
    for run in runs:
        change_run(run, lambda facts: facts["processes"][0].update(pid=7))
    campaign = load_campaign(tmp_path)
    assert caveats.shared_processes(campaign) == {("synthetic", "dirichlet, alpha 0.1")}
    assert any("runs shared processes" in text for text in caveats.sentences(campaign))
    frame = local_train.data(campaign)
    assert frame["local_train_peak_memory_bytes_mean"].isna().all()
    assert frame["trained_bytes_mean"].notna().all()


def test_unlike_profiles_of_a_device_are_said(tmp_path: Path) -> None:
    for method, watts in (("fedara", 5.0), ("lora", 6.0)):
        profiles = {"board": {"active_watts": watts}, "phone": {"active_watts": 1.0}}
        change_run(metered(tmp_path, method), machine(device_profiles=profiles))
    (warning,) = caveats.sentences(load_campaign(tmp_path))
    assert "modelled on unlike numbers of board, so" in warning


def test_equal_seeds_on_one_machine_need_no_warning(tmp_path: Path) -> None:
    for method in ("lora", "fedara"):
        write_record(tmp_path, method, 3)
    assert caveats.sentences(load_campaign(tmp_path)) == []


@pytest.mark.slow
def test_a_warning_is_on_screen_page_captions_and_tables(tmp_path: Path) -> None:
    metered(tmp_path / "records", "fedara", 0)
    run = metered(tmp_path / "records", "lora", 1)
    change_run(run, machine(world_size=2))
    out = tmp_path / "out"
    result = CliRunner().invoke(app, [str(tmp_path / "records"), "--out", str(out)])
    assert result.exit_code == 0, result.output
    for words in ("runs differ in processes (1 or 2)", "means are over different seeds"):
        assert f"warning: synthetic, dirichlet, alpha 0.1: {words}" in result.output
        names = [
            "report.html",
            "summary.md",
            "cost.md",
            "headline.md",
            "accuracy.md",
            "modelled.md",
        ]
        names += [f"{figure}.txt" for figure in ("phases", "local_train", "target", "pareto")]
        for name in names:
            assert words in " ".join((out / name).read_text().split()), name
    assert f"({caveats.MARK})" in result.output
    assert (
        f"## synthetic, dirichlet, alpha 0.1 ({caveats.MARK})" in (out / "summary.md").read_text()
    )


@pytest.mark.parametrize("figure", [phases, local_train, target])
def test_seconds_of_unlike_machines_are_marked_in_the_picture(
    figure: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metered(tmp_path, "fedara")
    change_run(metered(tmp_path, "lora"), machine(cpu="B"))
    texts: list[str] = []
    monkeypatch.setattr(
        "analysis.figures.style.save",
        lambda fig, *_: texts.extend(text.get_text() for text in fig.findobj(Text)) or [],
    )
    figure.draw(load_campaign(tmp_path), tmp_path)
    assert any(caveats.MARK in text for text in texts)
